"""The engine: all branches of all sequences take one step together.

Every sequence has one append-only log. A step reads log entries that are new, whichever branches wrote them, as query
positions of one forward pass; then every live branch chooses its next token; then the grammar says what the token
does. Fork and reduce only make rows of visibility and set positions. Sequences enter and leave at any step.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .budget import Budget
from .cache import LogCache
from .cpu import packed_weights
from .distributed import Broadcast
from .drafts import check_drafts, draft, foresee, go_ahead, step_costs
from .grammar import TokenMask
from .runner import make_runner
from .sampling import choose, mask_scores, nothing_to_choose, penalize_path
from .scheduler import Scheduler
from .state import Branch, FinishReason, Reading, Ready, Request, Segment, Sequence
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
        max_num_seqs, prefill_chunk: as for :class:`~.scheduler.Scheduler`.
        decoding: as for :func:`~.runner.make_runner`.
        on_step: called after every step.
        pack_weights: use packed weights where a CPU can (:func:`~.cpu.packed_weights`). They are looked at when
            answers begin after a pause, so they must not change while answers are written.
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
        pack_weights: bool = True,
    ) -> None:
        self.model, self.cache, self.on_step, self.packs_weights = model, cache, on_step, pack_weights
        self.max_positions = getattr(model.config, "max_position_embeddings", None)
        self.scheduler = Scheduler(cache, max_num_seqs, prefill_chunk)
        self.runner = make_runner(model, cache, decoding)
        self.broadcast, self.costs = Broadcast(model), step_costs(model)
        self.writer = Writer(tags, model.device)
        self.num_steps = 0
        self._arrivals = itertools.count()

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
        sequence.budget = Budget(sequence, self.max_positions, self.cache)
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

    def enqueue(self, sequence: Sequence) -> None:
        """Put a sequence in the queue, in its order of arrival."""
        self.scheduler.add(sequence)
        early, sequence.early = sequence.early, None
        try:
            for event in early or ():
                sequence.request.on_event(event)
        except BaseException as err:
            self._fail(sequence, err)

    def add(self, request: Request) -> Sequence:
        """Put a request in the queue: :meth:`begin` and :meth:`enqueue`."""
        sequence = self.begin(request)
        self.enqueue(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Have a sequence end at the next step, with its branches closed; what is written stays. Any thread may."""
        sequence.is_cancelled = True

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self.scheduler.sequences)

    # The step

    @torch.no_grad()
    def step(self) -> list[Sequence]:
        """Take one step: admit, prepare, forward, sample, interpret, release.

        Returns:
            The sequences that ended, those that failed among them: their ``error`` says why.
        """
        self._stop_due()
        done = self._release()  # what was stopped gives its memory to what is scheduled
        if self.packs_weights and self.scheduler.waiting and not self.scheduler.running:
            self.runner.packed_layers = packed_weights(self.model)
        begin = time.perf_counter()
        drafting = [sequence for sequence in self.scheduler.running if sequence.request.options.speculate]
        if drafting:
            go_ahead(drafting, self.writer, self.cache)
            draft(drafting, self.writer, self.cache, self.costs, self.broadcast)
        batch = self.scheduler.schedule()
        is_decoding = not any(reading.sequence.is_reading for reading in batch)
        if batch:
            logits = self.runner(batch)
            queries = self._advance(batch)
            self._interpret(queries, self._sample(queries, logits))
            self.num_steps += 1
            if drafting and is_decoding:
                self.costs.note(sum(len(reading.entries) for reading in batch), time.perf_counter() - begin)
        if self.on_step is not None:
            self.on_step()
        return done + self._release()

    def _stop_due(self) -> None:
        """Close what was cancelled or has had its time: write its closing tags, which may start held paths."""
        now, reasons = time.monotonic(), {}
        for sequence in self.scheduler.sequences:
            if sequence.is_cancelled:
                reasons[sequence.arrival] = FinishReason.CANCELLED
            elif sequence.deadline is not None and now >= sequence.deadline:
                reasons[sequence.arrival] = FinishReason.TIME
        if self.broadcast.group is not None:
            reasons = self.broadcast(reasons)
        for sequence in self.scheduler.sequences if reasons else ():
            if sequence.live and sequence.arrival in reasons:
                try:
                    self.writer.finish(sequence, reasons[sequence.arrival])
                    self.writer.start_held(sequence)
                except BaseException as err:
                    self._fail(sequence, err)

    def _advance(self, batch: list[Reading]) -> list[tuple[Sequence, Branch]]:
        """Note what was read, and return the branches that choose a token now, in the order of their logits.

        A branch with drafts stands there once more for each, as it will be if the draft is right.
        """
        queries: list[tuple[Sequence, Branch]] = []
        for reading in batch:
            sequence = reading.sequence
            sequence.num_computed = reading.end
            del sequence.pending[: len(reading.entries)]
            if reading.is_last:
                sequence.is_reading = False
                sequence.stats.num_steps += 1
                ahead = foresee(sequence) if sequence.request.options.speculate else sequence.live
                queries += [(sequence, branch) for branch in ahead]
        return queries

    def _sample(self, queries: list[tuple[Sequence, Branch]], logits: torch.Tensor) -> list[Chosen | Exception | None]:
        """Choose the next token of every branch, with one copy from the device.

        Args:
            queries: the branches, N of them.
            logits: (N, V).

        Returns:
            For each branch its token, why there is none to choose, or None if its sequence failed.
        """
        choices: list[Chosen | Exception | None] = [None] * len(queries)
        if not queries:
            return choices
        logits = logits if logits.dtype == torch.float64 else logits.float()
        masks = [self.writer.mask(sequence, branch) for sequence, branch in queries]
        rows: list[int] = []
        pieces: list[torch.Tensor] = []
        for _, run in itertools.groupby(range(len(queries)), key=lambda row: queries[row][0].request.sampler.group):
            for some, scores in self._process(list(run), queries, masks, logits, choices):
                rows += some
                pieces.append(scores)
        if not rows:
            return choices
        scores = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        keys = [
            (s.request.sampler.seed, s.request.key, b.key, b.position) if s.request.sampler.do_sample else None
            for s, b in (queries[row] for row in rows)
        ]
        counts = [s.request.num_logprobs for s, _ in queries if s.request.num_logprobs is not None]
        read = logits if len(rows) == len(queries) else logits[rows]
        chosen = choose(scores, keys, read, max(counts, default=None))
        for row, after, (token, best, likelihood) in zip(rows, scores, chosen, strict=True):
            if not math.isfinite(best):
                choices[row] = nothing_to_choose(best, masks[row])
            else:
                request, own = queries[row][0].request, logits[row]
                if request.options.speculate and request.calls is None:  # it may wait long: keep what is looked at
                    after = after.clone() if request.criteria else None
                    own = own.clone() if request.keep_logits else None
                choices[row] = Chosen(token, after, own, likelihood)
        return choices

    def _process(
        self,
        some: list[int],
        queries: list[tuple[Sequence, Branch]],
        masks: list[TokenMask | None],
        logits: torch.Tensor,
        choices: list[Chosen | Exception | None],
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Mask the logits of some neighbouring rows, and run the requests' processors on them.

        What raises fails its own sequence only. With drafts it is the choice of its row, which may never be written.

        Returns:
            The rows that are left, in groups with their scores.
        """
        sampler, own = queries[some[0]][0].request.sampler, [queries[row] for row in some]
        own_masks = [masks[row] for row in some]
        scores = mask_scores(own_masks, logits[some[0] : some[-1] + 1].clone())
        for row, (sequence, branch) in enumerate(own):
            if (penalty := sequence.request.options.path_repetition_penalty) != 1:
                penalize_path(scores[row], branch, penalty)
        if not sampler.has_processors:
            return [(some, scores)]
        try:
            return [(some, sampler.process(scores, own_masks, own))]
        except BaseException as err:
            sequences = list(dict.fromkeys(sequence for sequence, _ in own))
            if len(sequences) == 1 and sequences[0].request.options.speculate and sampler.calls is None:
                if len(some) > 1:
                    return [each for row in some for each in self._process([row], queries, masks, logits, choices)]
                if isinstance(err, Exception):
                    choices[some[0]] = err
                    return []
            if len(sequences) == 1 or sampler.calls is not None:  # the caller's own saw them all at once
                for sequence in sequences:
                    self._fail(sequence, err)
                return []
        runs = [[row for row in some if queries[row][0] is sequence] for sequence in sequences]
        return [each for run in runs for each in self._process(run, queries, masks, logits, choices)]

    def _interpret(self, queries: list[tuple[Sequence, Branch]], choices: list[Chosen | Exception | None]) -> None:
        """Do what the chosen tokens say. What a criterion or a streamer raises fails its own sequence only.

        A token of each live branch is written at a time, so that an answer is written as it is without drafts.
        """
        if any(sequence.request.options.speculate for sequence, _ in queries):
            check_drafts(queries, choices, self.cache)
        else:
            for (_, branch), chosen in zip(queries, choices, strict=True):
                branch.ready += [] if chosen is None else [Ready(chosen)]
        going, stopped = list(dict.fromkeys(sequence for sequence, _ in queries)), ()
        while going := [
            each for each in going if each.live and all(branch.ready for branch in each.live) and each not in stopped
        ]:
            taken = [(each, branch, branch.ready.pop(0)) for each in going for branch in each.live]
            for sequence, branch, ready in taken:
                if branch.segment.ended:  # closed by a sibling's limit, or failed, in this very step
                    continue
                try:
                    self.writer.take(sequence, branch, ready)
                except BaseException as err:
                    self._fail(sequence, err)
            if any(sequence.request.has_criteria for sequence, _, _ in taken):
                self._ask_callers(taken)
            for sequence in going:
                if sequence.held:
                    try:
                        self.writer.start_held(sequence)
                    except BaseException as err:
                        self._fail(sequence, err)
            stopped = [each for each in going if each.is_cancelled]  # without drafts, this would be the next step

    def _ask_callers(self, choices: list[tuple[Sequence, Branch, Ready]]) -> None:
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

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """Take a sequence out of the way of the others; its caller gets the error."""
        sequence.error = error
        for branch in sequence.live:
            branch.segment.ended = True
        sequence.live.clear()
        sequence.held.clear()

    def fail_running(self, error: BaseException) -> list[Sequence]:
        """Fail what is running, after the model failed; what waits continues. Return what :meth:`step` does."""
        for sequence in self.scheduler.running:
            self._fail(sequence, error)
        return self._release()

    def _release(self) -> list[Sequence]:
        """Let finished sequences and their memory go, and complete what is known of them."""
        done = self.scheduler.release()
        for sequence in done:
            self.writer.complete(sequence)
        return done
