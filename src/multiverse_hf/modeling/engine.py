"""The engine: all branches of all sequences take one step together.

Every sequence has one append-only log. A step reads log entries that are new, whichever branches wrote them, as query
positions of one forward pass; then every live branch chooses its next token; then the interpreter says what the token
does. Fork and reduce only make rows of visibility and set positions. Sequences enter and leave at any step.
"""

import bisect
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .agreement import Agreement
from .budget import Budget
from .cache import LogCache
from .interpreter import Mask
from .log import log_visibility
from .runner import ModelRunner, Reading
from .sampling import check_best, choose, mask_scores
from .state import Branch, FinishReason, Request, Segment, Sequence
from .tags import TagSet
from .writing import Chosen, Writer

logger = logging.get_logger(__name__)

DEFAULT_CHUNK = 512


class Engine:
    """Writes the answers to requests, step by step, in the thread that calls it.

    Args:
        model: a causal LM of transformers whose backbone takes positions, a 4-D mask and a cache.
        tags: the control tags.
        cache: the pool of logs.
        max_num_seqs: sequences that may run at once; others wait, first come, first served.
        prefill_chunk: prompt tokens read in one step, all sequences together, so that a long prompt does not hold up
            those that are writing.
        decoding: ``"packed"`` reads all sequences in one pass; ``"static"`` does so in fixed shapes, which a GPU
            replays as CUDA graphs; ``"simple"`` reads each in a pass of its own, with the model's own attention:
            slower, needs nothing of the model, and the oracle of the others.
        on_step: called after every step.
    """

    def __init__(
        self,
        model: Any,
        tags: TagSet,
        cache: LogCache,
        max_num_seqs: int = 256,
        prefill_chunk: int = DEFAULT_CHUNK,
        decoding: str = "packed",
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.cache = model, cache
        self.max_num_seqs, self.prefill_chunk, self.on_step = max_num_seqs, prefill_chunk, on_step
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.runner = ModelRunner(model, cache, decoding)
        self.agree = Agreement(model)
        self.writer = Writer(tags, model.device)
        self.waiting: list[Sequence] = []  # both in order of arrival
        self.running: list[Sequence] = []
        self.num_steps = self.num_preemptions = 0
        self._arrivals = itertools.count()

    # Requests

    def add(self, request: Request) -> Sequence:
        """Put a request in the queue: :meth:`begin` and :meth:`enqueue`."""
        sequence = self.begin(request)
        self.enqueue(sequence)
        return sequence

    def enqueue(self, sequence: Sequence) -> None:
        """Put a sequence in the queue, in its order of arrival."""
        bisect.insort(self.waiting, sequence, key=lambda each: each.arrival)
        early, sequence.early = sequence.early, None
        try:
            for event in early or ():
                sequence.request.on_event(event)
        except BaseException as err:
            self._fail(sequence, err)

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence end at the next step, with its branches closed; what is written stays. Any thread may."""
        sequence.is_cancelled = True

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self.waiting or self.running)

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Take one step: admit, prepare, forward, sample, interpret, release.

        Returns:
            The sequences that ended, those that failed among them: their ``error`` says why.
        """
        self._enforce()
        done = self._release()
        self._admit()
        batch = self._schedule()
        if batch:
            queries, logits = self._forward(batch)
            self._interpret(self._sample(queries, logits))
            self.num_steps += 1
        if self.on_step is not None:
            self.on_step()
        return done + self._release()

    # Begin

    def begin(self, request: Request) -> Sequence:
        """Start a sequence, in any thread.

        Raises:
            ValueError: if it can never be answered within its limits, the model's context or the cache.
        """
        positions = np.zeros(len(request.prompt) + 64, dtype=np.int64)
        sequence = Sequence(request, next(self._arrivals), Segment(), positions)
        if request.calls is not None:
            request.calls.answers[request.index] = sequence
        self.writer.read_prompt(sequence)
        sequence.budget = Budget(sequence, self.context, self.cache)
        if not sequence.budget.can_close():
            opened = f"prompt {request.index} ends inside blocks that its budget cannot close"
            if sequence.root.block is None:
                logger.warning_once(f"{opened}: its tags, and those of its answer, are text")
                return self.begin(replace(request, options=replace(request.options, structure="off")))
            logger.warning_once(f"{opened}: its answer is empty; raise max_new_tokens or max_total_tokens")
            self.writer.end_at_once(sequence)
            return sequence
        self.writer.begin(sequence)
        return sequence

    # Admit and schedule

    def _admit(self) -> None:
        """Let waiting sequences in, in order of arrival, while there is room for what they have to read."""
        for sequence in [each for each in self.waiting if each.live]:
            if len(self.running) == self.max_num_seqs:
                return
            length = len(sequence.ids)
            spare = 16 * len(self.running)  # so that those who run are not preempted at once
            if self.running and not self.cache.growable and length + spare > self.cache.num_free:
                return
            if not self.cache.reserve(sequence.arrival, length, length + 256):
                return
            self.waiting.remove(sequence)
            if len(sequence.pending) < length:  # it was preempted
                sequence.pending = log_visibility(sequence)
            sequence.is_reading = True
            bisect.insort(self.running, sequence, key=lambda each: each.arrival)

    def _schedule(self) -> list[Reading]:
        """Say which log entries of which sequences this step reads, with room in the cache for each."""
        counts: dict[Sequence, int] = {}
        chunk = self.prefill_chunk
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for the sake of one before it
                continue
            count = len(sequence.pending)
            if sequence.is_reading:
                # what the live branches choose their first tokens from is read in one step, the last one
                before = min(branch.segment.entries[-1] for branch in sequence.live) - sequence.num_computed
                if count > chunk and before > 0:
                    count = min(chunk, before)
                chunk = max(chunk - count, 0)
            if count and self._reserve(sequence, sequence.num_computed + count):
                counts[sequence] = count
        batch, begin = [], 0
        for sequence in self.running:
            if count := counts.get(sequence, 0):
                first = sequence.num_computed
                queries = slice(begin, begin + count)
                batch.append(Reading(sequence, sequence.pending[:count], queries, first, first + count))
                begin += count
        return batch

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Make room in the cache, preempting the last come if need be; say no if that was this one itself."""
        while not self.cache.reserve(sequence.arrival, length, length + length // 2 + 64):
            victim = self.running.pop()
            self.cache.release(victim.arrival)
            victim.num_computed = 0
            victim.pending.clear()
            victim.pages, victim.num_weighed = None, 0
            self.enqueue(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    # Forward

    def _forward(self, batch: list[Reading]) -> tuple[list[tuple[Sequence, Branch]], torch.Tensor]:
        """Read log entries.

        Returns:
            The branches that choose a token now, N of them, and the (N, V) logits they choose it from.
        """
        logits = self.runner(batch)
        queries: list[tuple[Sequence, Branch]] = []
        for reading in batch:
            sequence = reading.sequence
            sequence.num_computed = reading.end
            if reading.is_last:
                sequence.is_reading = False
                sequence.stats.num_steps += 1
                queries += [(sequence, branch) for branch in sequence.live]
            del sequence.pending[: len(reading.entries)]
        return queries, logits if logits.dtype == torch.float64 else logits.float()

    # Sample and interpret

    def _sample(
        self, queries: list[tuple[Sequence, Branch]], logits: torch.Tensor
    ) -> list[tuple[Sequence, Branch, Chosen]]:
        """Choose the next token of every branch, with one copy from the device."""
        masks = [self.writer.mask(sequence, branch) for sequence, branch in queries]
        rows, scores = self._process(queries, masks, logits)
        if not rows:
            return []
        keys = [
            (s.request.sampler.seed, s.request.key, b.key, b.position) if s.request.sampler.do_sample else None
            for s, b in (queries[row] for row in rows)
        ]
        counts = [s.request.num_logprobs for s, _ in queries if s.request.num_logprobs is not None]
        read = logits if len(rows) == len(queries) else logits[rows]
        chosen = choose(scores, keys, read, max(counts, default=None))
        choices = []
        for row, after, (token, best, likelihood) in zip(rows, scores, chosen, strict=True):
            sequence, branch = queries[row]
            try:
                check_best(best, masks[row])
            except ValueError as err:
                self._fail(sequence, err)
            else:
                choices.append((sequence, branch, Chosen(token, after, logits[row], likelihood)))
        return choices

    def _process(
        self, queries: list[tuple[Sequence, Branch]], masks: list[Mask | None], logits: torch.Tensor
    ) -> tuple[list[int], torch.Tensor]:
        """Mask the logits and run the requests' processors. What raises fails its own sequence only.

        Returns:
            The rows that are left, and their scores.
        """
        rows: list[int] = []
        pieces: list[torch.Tensor] = []

        def process(some: list[int], scores: torch.Tensor) -> None:
            sampler = queries[some[0]][0].request.sampler
            contexts = [(len(s.request.prompt), b.context) for s, b in (queries[row] for row in some)]
            try:
                own = [queries[row] for row in some]
                piece = sampler.process(scores, contexts, [masks[row] for row in some], own)
            except BaseException as err:
                sequences = list(dict.fromkeys(queries[row][0] for row in some))
                if len(sequences) == 1 or sampler.calls is not None:  # the caller's own saw them all at once
                    for sequence in sequences:
                        self._fail(sequence, err)
                else:
                    for sequence in sequences:
                        own = [row for row in some if queries[row][0] is sequence]
                        process(own, masked(own))  # anew: a processor may have written to what it was given
                return
            rows.extend(some)
            pieces.append(piece)

        def masked(some: list[int]) -> torch.Tensor:
            return mask_scores([masks[row] for row in some], logits[some[0] : some[-1] + 1].clone())

        for _, run in itertools.groupby(range(len(queries)), key=lambda row: queries[row][0].request.sampler.group):
            some = list(run)
            process(some, masked(some))
        return rows, pieces[0] if len(pieces) == 1 else torch.cat(pieces or [logits[:0]])

    def _interpret(self, choices: list[tuple[Sequence, Branch, Chosen]]) -> None:
        """Do what the chosen tokens say. What a criterion or a streamer raises fails its own sequence only."""
        for sequence, branch, chosen in choices:
            if branch.segment.ended:  # closed by a sibling's limit, or failed, in this very step
                continue
            try:
                self.writer.take(sequence, branch, chosen)
            except BaseException as err:
                self._fail(sequence, err)
        self._ask_callers(choices)
        for sequence in dict.fromkeys(sequence for sequence, _, _ in choices):
            try:
                self.writer.start_held(sequence)
            except BaseException as err:
                self._fail(sequence, err)

    def _ask_callers(self, choices: list[tuple[Sequence, Branch, Chosen]]) -> None:
        """Ask the callers' own stopping criteria, once for all rows of a call."""
        asked: dict[int, list[tuple[Sequence, Branch]]] = {}
        for sequence, branch, _ in choices:
            if sequence.request.has_criteria and not branch.segment.ended:
                asked.setdefault(id(sequence.request.calls), []).append((sequence, branch))
        for rows in asked.values():
            try:
                for sequence, branch in rows[0][0].request.calls.stops(rows, self.writer.device):
                    self.writer.stop(sequence, branch)
            except BaseException as err:
                for sequence in dict.fromkeys(sequence for sequence, _ in rows):
                    self._fail(sequence, err)

    # Release

    def _enforce(self) -> None:
        """End what was cancelled or has had its time."""
        now, reasons = time.monotonic(), {}
        for sequence in [*self.running, *self.waiting]:
            if sequence.is_cancelled:
                reasons[sequence.arrival] = FinishReason.CANCELLED
            elif sequence.deadline is not None and now >= sequence.deadline:
                reasons[sequence.arrival] = FinishReason.TIME
        reasons = self.agree(reasons)
        for sequence in [*self.running, *self.waiting]:
            if sequence.live and sequence.arrival in reasons:
                try:
                    self.writer.finish(sequence, reasons[sequence.arrival])
                    self.writer.start_held(sequence)
                except BaseException as err:
                    self._fail(sequence, err)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Take a sequence out of the way of the others; its caller gets the error."""
        sequence.error = error
        for branch in sequence.live:
            branch.segment.ended = True
        sequence.live.clear()
        sequence.held.clear()

    def fail_running(self, error: BaseException) -> list[Sequence]:
        """Give up what is running, after the model failed; what waits goes on. As :meth:`step` otherwise."""
        for sequence in self.running:
            self._fail(sequence, error)
        return self._release()

    def _release(self) -> list[Sequence]:
        """Let finished sequences and their memory go."""
        done = [sequence for sequence in [*self.running, *self.waiting] if not sequence.live]
        for sequence in done:
            self.cache.release(sequence.arrival)
            sequence.pages = None
            self.seal(sequence)
        self.running = [sequence for sequence in self.running if sequence.live]
        self.waiting = [sequence for sequence in self.waiting if sequence.live]
        return done

    def seal(self, sequence: Sequence) -> None:
        """Complete what is known of a finished sequence."""
        sequence.pending.clear()
        stats = sequence.stats
        stats.num_tokens = sequence.num_written
        stats.length = max(sequence.max_position + 1 - sequence.prompt_length, 0)
        stats.num_steps = max(stats.num_steps, 0)
        stats.finish_reason = sequence.finish or FinishReason.STOP
        if sequence.error is None:
            try:
                self.writer.emit(sequence, "finish", "", finish_reason=stats.finish_reason)
            except BaseException as err:
                sequence.error = err
