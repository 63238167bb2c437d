"""The engine: all branches of all sequences take one step together.

Every sequence has one append-only log. A step reads log entries that are new, whichever branches wrote them, as query
positions of one forward pass; then every live branch chooses its next token; then the interpreter says what the token
does. Fork and reduce only make rows of visibility and set positions. Sequences enter and leave at any step.
"""

import bisect
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from .agreement import Agreement
from .cache import LogCache
from .interpreter import Mask, Stage, Structure
from .layout import Event
from .limits import ANSWER, block_cost, branch_cost, cost_near_end, find_limit, path_cost, set_limits, structure_mask
from .log import log_visibility
from .runner import ModelRunner, Reading
from .sampling import TokenScores, check_best, choose, mask_scores, mix, score_tokens
from .state import Block, Branch, BranchEvent, FinishReason, GenerationStats, Request, Segment, Sequence
from .tags import TagSet

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
        self.model, self.tags, self.cache = model, tags, cache
        self.max_num_seqs, self.prefill_chunk, self.on_step = max_num_seqs, prefill_chunk, on_step
        self.context = getattr(model.config, "max_position_embeddings", None)
        self.runner = ModelRunner(model, cache, decoding)
        self.agree = Agreement(model)
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
            self._choose(queries, logits)
            self.num_steps += 1
        if self.on_step is not None:
            self.on_step()
        return done + self._release()

    # Begin

    def begin(self, request: Request) -> Sequence:
        """Start a sequence, in any thread.

        Its prompt goes through the interpreter like any other text, so that one which ends inside blocks leaves the
        branches it ends in: the open path, and its siblings still to come.

        Raises:
            ValueError: if it can never be answered within its limits, the model's context or the cache.
        """
        capacity = len(request.prompt) + 64
        root = Segment()
        sequence = Sequence(request, next(self._arrivals), root, np.zeros(capacity, dtype=np.int64))
        sees = np.zeros(capacity, dtype=bool)
        sequence.live = [Branch(Structure(self.tags), root, 0, sees, [], mix(0), "", [])]
        for token in request.prompt:
            self._append(sequence, sequence.live[0], token)  # a prompt's live branches are in document order
        sequence.prompt_length = sequence.max_position + 1
        set_limits(sequence, self.context, self.cache)
        for branch in reversed(sequence.live[request.options.max_branches :]):  # none of them has begun
            self._hold(sequence, branch.blocks[-1], branch.path)
        del sequence.live[request.options.max_branches :]
        sequence.is_prompt = False
        # the prompt's own pass is not counted
        sequence.stats = GenerationStats(num_steps=-1, max_width=len(sequence.live))
        sequence.stats.depth = max(branch.structure.depth for branch in sequence.live)
        for branch in list(sequence.live):
            self._start(sequence, branch)
        self._start_held(sequence)
        return sequence

    def _start(self, sequence: Sequence, branch: Branch) -> None:
        """Write what is left of a branch's forced start, unless it has begun otherwise."""
        written = [sequence.ids[entry] for entry in branch.segment.entries]
        block = branch.blocks[-1] if branch.blocks else None
        if block is not None and branch.segment is block.paths[branch.path]:
            forced = branch.structure.path_prefix(branch.path)
        elif branch.after is not None and branch.segment is branch.after.reduced:
            forced = self.tags.conclusion_prefix()
        else:
            forced = []
        begun = len(written) if forced[: len(written)] == written else 0
        if begun or branch.structure.stage in (Stage.FORKED, Stage.REDUCED):
            for token in forced[begun:]:
                self._append(sequence, branch, token)
            if len(written) <= len(forced):
                branch.structure.has_text = False  # a label says nothing yet
        self._settle(sequence, branch)

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
            victim.slots, victim.pages = victim.slots[:0], None
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
                sequence.live_cost = cost_near_end(sequence)
                queries += [(sequence, branch) for branch in sequence.live]
            del sequence.pending[: len(reading.entries)]
        return queries, logits if logits.dtype == torch.float64 else logits.float()

    # Sample and interpret

    def _choose(self, queries: list[tuple[Sequence, Branch]], logits: torch.Tensor) -> None:
        """Choose the next token of every branch and do what it says."""
        masks = [structure_mask(sequence, branch) for sequence, branch in queries]
        rows, scores = self._process(queries, masks, logits)
        if not rows:
            return
        keys = [
            (s.request.sampler.seed, s.request.key, b.key, b.position) if s.request.sampler.do_sample else None
            for s, b in (queries[row] for row in rows)
        ]
        tokens, best = choose(scores, keys)
        counts = [s.request.num_logprobs for s, _ in queries if s.request.num_logprobs is not None]
        read = logits if len(rows) == len(queries) else logits[rows]
        likely = score_tokens(read, tokens, max(counts)) if counts else None
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            sequence, branch = queries[row]
            if branch.segment.ended:  # closed by a sibling's limit, or failed, in this very step
                continue
            kept = logits[row].clone() if sequence.request.keep_logits else None
            likelihood = likely[place] if likely is not None and sequence.request.num_logprobs is not None else None
            try:
                check_best(best[place], masks[row])
                self._take(sequence, branch, token, scores[place], kept, likelihood)
            except BaseException as err:  # of a stopping criterion or a streamer, too: the others go on
                self._fail(sequence, err)
        for sequence in dict.fromkeys(sequence for sequence, _ in queries):
            try:
                self._start_held(sequence)
            except BaseException as err:
                self._fail(sequence, err)

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
                piece = sampler.process(scores, contexts, [masks[row] for row in some])
            except BaseException as err:
                sequences = list(dict.fromkeys(queries[row][0] for row in some))
                if len(sequences) == 1:
                    self._fail(sequences[0], err)
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

    def _take(
        self,
        sequence: Sequence,
        branch: Branch,
        token: int,
        scores: torch.Tensor,
        logits: torch.Tensor | None,
        likelihood: TokenScores | None,
    ) -> None:
        """Do what a chosen token says."""
        request, entry = sequence.request, len(sequence.ids)
        if token in request.eos and request.structured and branch.structure.closing_tokens():
            if branch.blocks:  # as if </Path>
                self._close(sequence, branch, len(branch.blocks) - 1)
            else:
                sequence.finish, sequence.end = FinishReason.STOP, token
                self._close(sequence, branch, ANSWER)
            return
        limit = find_limit(sequence, branch, token)
        if limit is not None:
            self._stop(sequence, branch, *limit)
            return
        if logits is not None:
            sequence.logits[entry] = logits
        if likelihood is not None:
            sequence.scores[entry] = likelihood
        self._append(sequence, branch, token, sampled=True)
        if branch.segment.ended:  # it forked or closed
            return
        if token in request.eos:
            sequence.finish = FinishReason.STOP
            self._end(sequence, branch)
        elif request.criteria and self._ask_criteria(request, branch, scores):
            self._stop(sequence, branch, FinishReason.CRITERIA, len(branch.blocks) - 1)
        else:
            self._settle(sequence, branch)

    def _ask_criteria(self, request: Request, branch: Branch, scores: torch.Tensor) -> bool:
        """Ask the stopping criteria about a branch; any of them may stop it, as in transformers."""
        ids = torch.tensor([branch.context], device=self.model.device)
        return any(
            # a stop string is looked for in the path's own text
            bool(criterion(ids[:, branch.own :] if isinstance(criterion, StopStringCriteria) else ids, scores[None]))
            for criterion in request.criteria
        )

    def _append(self, sequence: Sequence, branch: Branch, token: int, sampled: bool = False) -> None:
        """Write a token at the end of a branch and interpret it."""
        entry = len(sequence.ids)
        if entry == len(sequence.positions):
            self._grow(sequence)
        sequence.ids.append(token)
        sequence.positions[entry] = branch.position
        sequence.sampled.append(sampled)
        sequence.labels.append(branch.label)
        sequence.pending.append((entry, branch.sees))
        sequence.max_position = max(sequence.max_position, branch.position)
        branch.segment.entries.append(entry)
        branch.sees[entry] = True
        branch.position += 1
        request = sequence.request
        if request.needs_context:
            branch.context.append(token)
        if request.on_event is not None:
            scores = sequence.scores.get(entry)
            self._emit(sequence, "token", branch.label, token, sampled, 0, branch.position - 1, scores)
        if not request.structured:
            return
        malformed = branch.structure.malformed
        self._count_cost(sequence, branch, -1)
        event = branch.structure.feed(token)
        sequence.stats.malformed += branch.structure.malformed - malformed
        if event is Event.FORK:
            self._fork(sequence, branch)
        elif event is Event.TEXT:
            self._count_cost(sequence, branch)
        else:
            self._path_closed(sequence, branch)

    def _count_cost(self, sequence: Sequence, branch: Branch, sign: int = 1) -> None:
        """Keep account of what closing the live branches takes, as a branch comes, changes or goes."""
        if sequence.live_cost is not None:
            sequence.live_cost += sign * branch_cost(sequence, branch)

    def _emit(self, sequence: Sequence, kind: str, *args: Any, **kwargs: Any) -> None:
        """Tell the request's listener, but not of its own prompt."""
        request = sequence.request
        if request.on_event is None or sequence.is_prompt:
            return
        event = BranchEvent(request.index, kind, *args, **kwargs)
        if sequence.early is not None:
            sequence.early.append(event)
        else:
            request.on_event(event)

    def _fork(self, sequence: Sequence, branch: Branch) -> None:
        """Make one branch per outline, each with its forced start."""
        request, structure = sequence.request, branch.structure
        num_paths = structure.scanner.open_blocks[-1].num_paths
        block = Block(structure, branch, num_open=num_paths)
        branch.segment.block = block
        branch.segment.ended = True
        block.paths = [Segment() for _ in range(num_paths)]
        block.tails = [[] for _ in range(num_paths)]
        sequence.reserved += block_cost(block)
        at = sequence.live.index(branch)
        others = len(sequence.live) - 1
        room = num_paths if sequence.is_prompt else max(request.options.max_branches - others, 1)
        paths = [self._open_path(block, path) for path in range(min(num_paths, room))]
        sequence.live[at : at + 1] = paths
        for each in paths:
            self._count_cost(sequence, each)
        for path in reversed(range(len(paths), num_paths)):
            self._hold(sequence, block, path)
        sequence.stats.num_forks += 1
        sequence.stats.max_width = max(sequence.stats.max_width, len(sequence.live))
        sequence.stats.depth = max(sequence.stats.depth, structure.depth)
        self._emit(sequence, "fork", branch.label, num_paths=num_paths)
        if not sequence.is_prompt:
            for each in paths:
                self._start(sequence, each)

    def _open_path(self, block: Block, path: int) -> Branch:
        """Make the branch of a path, which sees what the branch saw that forked."""
        fork = block.branch
        return Branch(
            block.structure.for_path(path), block.paths[path], fork.position, LogCache.fork(fork.sees),
            list(fork.context), mix(fork.key, path + 1), f"{fork.label}.{path + 1}".lstrip("."),
            [*fork.blocks, block], path, fork.until, own=len(fork.context),
        )  # fmt: skip

    def _hold(self, sequence: Sequence, block: Block, path: int) -> None:
        """Have a path wait."""
        sequence.held.append((block, path))
        sequence.reserved += path_cost(block, path)

    def _start_held(self, sequence: Sequence) -> None:
        """Start paths that wait while there is room, those of the latest block first: so few blocks stay open."""
        while sequence.held and len(sequence.live) < sequence.request.options.max_branches:
            block, path = sequence.held.pop()
            sequence.reserved -= path_cost(block, path)
            branch = self._open_path(block, path)
            branch.sees = np.pad(branch.sees, (0, len(sequence.positions) - len(branch.sees)))
            sequence.live.append(branch)
            self._count_cost(sequence, branch)
            self._start(sequence, branch)

    def _path_closed(self, sequence: Sequence, branch: Branch) -> None:
        """Take a path off; when it is the last one, merge: go on from one past the block's greatest position, seeing
        all of its paths."""
        block = branch.blocks[-1]
        fork = block.branch
        at = sequence.live.index(branch)
        branch.segment.ended = True
        block.num_open -= 1
        block.max_position = max(block.max_position, branch.position - 1)
        block.sees.append(branch.sees)
        block.tails[branch.path] = branch.context[len(fork.context) :]
        self._emit(sequence, "close", branch.label, finish_reason=branch.closed_by)
        if block.num_open:
            del sequence.live[at]
            return
        sequence.reserved -= block_cost(block)
        block.reduced = Segment()
        sees = LogCache.reduce([*block.sees, np.zeros(len(sequence.positions), dtype=bool)])
        context = fork.context + [token for tail in block.tails for token in tail]
        reduced = Branch(
            block.structure.after_reduce(), block.reduced, block.max_position + 1, sees, context,
            fork.key, fork.label, fork.blocks, fork.path, fork.until, block, fork.own,
        )  # fmt: skip
        block.sees, block.tails = [], []
        sequence.live[at] = reduced
        self._count_cost(sequence, reduced)
        self._emit(sequence, "reduce", fork.label)
        if not sequence.is_prompt:
            self._start(sequence, reduced)

    def _grow(self, sequence: Sequence) -> None:
        """Make room in a sequence's arrays."""
        extra = len(sequence.positions) // 2 + 64
        sequence.positions = np.pad(sequence.positions, (0, extra))
        for branch in sequence.live:
            branch.sees = np.pad(branch.sees, (0, extra))

    # Limits

    def _settle(self, sequence: Sequence, branch: Branch) -> None:
        """Close a branch that is to be closed, or that has only the room left which closing takes."""
        if branch.segment.ended:
            return
        if branch.until is not None and len(branch.blocks) <= branch.until:
            branch.until = None
        if branch.until is not None:
            self._close(sequence, branch, branch.until)
        elif sequence.finish not in (None, FinishReason.STOP):
            self._cut(sequence, branch, sequence.finish, ANSWER)
        else:
            limit = find_limit(sequence, branch, None)
            if limit is not None:
                self._stop(sequence, branch, *limit)

    def _stop(self, sequence: Sequence, branch: Branch, reason: FinishReason, until: int) -> None:
        """Close as a limit says."""
        if until == ANSWER:
            self._finish(sequence, reason)
        else:
            self._cut(sequence, branch, reason, until)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Close a whole answer early."""
        sequence.finish = reason
        for branch in list(sequence.live):
            if not branch.segment.ended:
                self._cut(sequence, branch, reason, ANSWER)

    def _cut(self, sequence: Sequence, branch: Branch, reason: FinishReason, until: int) -> None:
        """Close a branch before it ended by itself, and keep account of that."""
        if branch.blocks:
            branch.closed_by = reason
            sequence.stats.closed_by[reason] = sequence.stats.closed_by.get(reason, 0) + 1
        self._close(sequence, branch, until)

    def _close(self, sequence: Sequence, branch: Branch, until: int) -> None:
        """Write the tokens that close a branch until only ``until`` blocks are open around it.

        With :data:`ANSWER` the answer ends, with the end token if the model chose one.
        """
        branch.until = until
        for token in branch.structure.closing_tokens() if sequence.request.structured else []:
            self._append(sequence, branch, token)
        if not branch.segment.ended:  # outside every block, where nothing is left to close
            if sequence.end is not None and find_limit(sequence, branch, sequence.end) is None:
                self._append(sequence, branch, sequence.end)
            self._end(sequence, branch)

    def _end(self, sequence: Sequence, branch: Branch) -> None:
        branch.segment.ended = True
        self._count_cost(sequence, branch, -1)
        sequence.live.remove(branch)

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
                    self._finish(sequence, reasons[sequence.arrival])
                    self._start_held(sequence)
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
                self._emit(sequence, "finish", "", finish_reason=stats.finish_reason)
            except BaseException as err:
                sequence.error = err
