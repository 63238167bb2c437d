"""Writing: what a token does to a branch, its block and its answer. Host data only.

A token is appended to the log and fed to the grammar. ``</Goal>`` forks: one branch for each outline, or as many
as may be written at once. The last ``</Path>`` of a block reduces: one branch that sees all paths. What a limit ends
is closed with the tokens that make it well formed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.generation.stopping_criteria import StopStringCriteria

from .budget import ANSWER
from .cache import LogCache
from .grammar import Event, Stage, Structure, TokenMask
from .sampling import TokenScores, mix
from .state import Block, Branch, BranchEvent, FinishReason, GenerationStats, Ready, Request, Segment, Sequence
from .tags import TagSet


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token chosen for a branch, and what it was chosen from.

    Attributes:
        scores: (V,) after the processors; with drafts only where criteria look at it.
        logits: (V,) before them; with drafts only where they are kept.
        likelihood: where some request asks for it.
    """

    token: int
    scores: torch.Tensor | None
    logits: torch.Tensor | None
    likelihood: TokenScores | None


class Writer:
    """Writes tokens to answers.

    A branch that a limit or a criterion ends goes through ``_stop``, which closes the path or the whole answer, then
    ``_cut``, which keeps account of it, and ``_close``, which writes the closing tags. A branch that ends by itself
    goes through ``_close`` or ``_end`` alone.

    Args:
        tags: the control tags.
        device: where stopping criteria expect the ids they are given.
    """

    def __init__(self, tags: TagSet, device: torch.device) -> None:
        self.tags, self.device = tags, device
        self.masks: dict[Any, TokenMask] = {}

    def read_prompt(self, sequence: Sequence) -> None:
        """Feed the prompt to the grammar like any other text, so that one which ends inside blocks leaves the
        branches it ends in: the open path, and its siblings still to come."""
        sees = np.zeros(len(sequence.positions), dtype=bool)
        sequence.live = [Branch(Structure(self.tags, masks=self.masks), sequence.root, 0, sees, [], mix(0), "", [])]
        for token in sequence.request.prompt:
            self._append(sequence, sequence.live[0], token)  # a prompt's live branches are in document order
        sequence.prompt_length = sequence.max_position + 1

    def begin(self, sequence: Sequence) -> None:
        """Go on from where the prompt ends."""
        most = sequence.request.options.max_branches
        for branch in reversed(sequence.live[most:]):  # none of them has begun
            sequence.held.append((branch.blocks[-1], branch.path))
        del sequence.live[most:]
        sequence.is_prompt = False
        # the prompt's own pass is not counted
        sequence.stats = GenerationStats(num_steps=-1, max_width=len(sequence.live))
        sequence.stats.depth = max(branch.structure.depth for branch in sequence.live)
        self._tell_open_blocks(sequence)
        for branch in list(sequence.live):
            self._start(sequence, branch)
        self.start_held(sequence)
        sequence.budget.count()

    def mask(self, sequence: Sequence, branch: Branch) -> TokenMask | None:
        """Return what a branch may not choose now."""
        request, options = sequence.request, sequence.request.options
        if not request.structured:
            return None
        return branch.structure.mask(
            options.structure == "guided", options.max_depth, options.max_paths, request.eos, options.max_blocks
        )

    def end_at_once(self, sequence: Sequence) -> None:
        """End an answer before its first token: there is no room even for the tags that close its prompt."""
        sequence.is_prompt, sequence.finish = False, FinishReason.LENGTH
        for branch in sequence.live:
            branch.segment.ended = True
        sequence.live.clear()

    def take(self, sequence: Sequence, branch: Branch, ready: Ready) -> None:
        """Do what a chosen token says.

        Raises:
            Exception: of a stopping criterion or a streamer, or if there was no token to choose.
        """
        if isinstance(ready.chosen, Exception):
            raise ready.chosen
        request, chosen, token = sequence.request, ready.chosen, ready.chosen.token
        entry = len(sequence.ids) if ready.entry is None else ready.entry
        if token in request.eos and request.structured and branch.structure.closing_tokens():
            if branch.blocks:  # as if </Path>
                self._close(sequence, branch, len(branch.blocks) - 1)
            else:
                sequence.finish, sequence.end = FinishReason.STOP, token
                self._close(sequence, branch, ANSWER)
            return
        budget = sequence.budget
        if branch.position < branch.text_end and budget.room > 0 and token not in self.tags.roles:
            budget.room -= 1
        elif (limit := budget.spend(branch, token)) is not None:
            self._stop(sequence, branch, *limit)
            return
        if request.keep_logits:
            sequence.logits[entry] = chosen.logits.clone()
        if request.num_logprobs is not None:
            sequence.scores[entry] = chosen.likelihood
        self._append(sequence, branch, token, sampled=True, read=ready.entry)
        if branch.segment.ended:  # it forked or closed
            return
        if token in request.eos:
            sequence.finish = FinishReason.STOP
            self._end(sequence, branch)
        elif request.criteria and self._ask_criteria(request, branch, chosen.scores):
            self.stop(sequence, branch)
        else:
            self._settle(sequence, branch)

    def stop(self, sequence: Sequence, branch: Branch) -> None:
        """End what a stopping criterion ends: the branch's path, or the whole answer."""
        whole = sequence.request.options.stop_scope == "answer"
        self._stop(sequence, branch, FinishReason.CRITERIA, ANSWER if whole else len(branch.blocks) - 1)

    def _ask_criteria(self, request: Request, branch: Branch, scores: torch.Tensor) -> bool:
        """Ask the stopping criteria about a branch; any of them may stop it, as in transformers."""
        ids = torch.tensor([branch.context], device=self.device)
        return any(
            # a stop string is looked for in the path's own text
            bool(criterion(ids[:, branch.own :] if isinstance(criterion, StopStringCriteria) else ids, scores[None]))
            for criterion in request.criteria
        )

    def _append(
        self, sequence: Sequence, branch: Branch, token: int, sampled: bool = False, read: int | None = None
    ) -> None:
        """Write a token at the end of a branch and interpret it.

        Args:
            sequence, branch, token: where to write what.
            sampled: the model chose it.
            read: its log entry, if the model has read it already.
        """
        if read is None:
            entry = len(sequence.ids)
            if entry == len(sequence.positions):
                self.grow(sequence)
            sequence.ids.append(token)
            sequence.positions[entry] = branch.position
            sequence.sampled.append(sampled)
            sequence.labels.append(branch.label)
            sequence.pending.append((entry, branch.sees))
        else:
            entry, sequence.sampled[read] = read, sampled
            sequence.num_unwritten -= 1
        sequence.max_position = max(sequence.max_position, branch.position)
        branch.segment.entries.append(entry)
        branch.sees[entry] = True
        branch.position += 1
        request = sequence.request
        if request.needs_context:
            branch.context.append(token)
        if request.on_event is not None:
            scores = sequence.scores.get(entry)
            self.emit(sequence, "token", branch.label, token, sampled, 0, branch.position - 1, scores)
        if not request.structured:
            return
        if token in self.tags.roles:
            branch.text_end = 0
        malformed = branch.structure.malformed
        event = branch.structure.feed(token)
        sequence.stats.malformed += branch.structure.malformed - malformed
        if event is Event.FORK:
            self._fork(sequence, branch)
        elif event is not Event.TEXT:  # whichever path closes last reduces, not the last one of the document
            self._path_closed(sequence, branch)

    def emit(self, sequence: Sequence, kind: str, *args: Any, **kwargs: Any) -> None:
        """Send an event to the request's listener, but none of its own prompt."""
        request = sequence.request
        if request.on_event is None or sequence.is_prompt:
            return
        event = BranchEvent(request.index, kind, *args, **kwargs)
        if sequence.early is not None:
            sequence.early.append(event)
        else:
            request.on_event(event)

    def _tell_open_blocks(self, sequence: Sequence) -> None:
        """Send the events by which a listener knows the branches that its prompt leaves."""
        held = [(f"{block.branch.label}.{path + 1}".lstrip("."), [block]) for block, path in sequence.held]
        left = [(branch.label, branch.blocks) for branch in sequence.live] + held
        for block in dict.fromkeys(block for _, blocks in left for block in blocks):
            self.emit(sequence, "fork", block.branch.label, num_paths=len(block.paths))
            for number in range(1, len(block.paths) + 1):
                path = f"{block.branch.label}.{number}".lstrip(".")
                if not any(label == path or label.startswith(f"{path}.") for label, _ in left):
                    self.emit(sequence, "close", path)

    def _fork(self, sequence: Sequence, branch: Branch) -> None:
        """Make one branch per outline, each with its forced start."""
        request, structure = sequence.request, branch.structure
        num_paths = structure.open_blocks[-1].num_paths
        block = Block(structure, branch, num_open=num_paths)
        branch.segment.block = block
        branch.segment.ended = True
        block.paths = [Segment() for _ in range(num_paths)]
        block.tails = [[] for _ in range(num_paths)]
        at = sequence.live.index(branch)
        others = len(sequence.live) - 1
        room = num_paths if sequence.is_prompt else max(request.options.max_branches - others, 1)
        paths = [self._open_path(block, path) for path in range(min(num_paths, room))]
        sequence.live[at : at + 1] = paths
        sequence.held += [(block, path) for path in reversed(range(len(paths), num_paths))]
        sequence.stats.num_forks += 1
        sequence.stats.max_width = max(sequence.stats.max_width, len(sequence.live))
        sequence.stats.depth = max(sequence.stats.depth, structure.depth)
        self.emit(sequence, "fork", branch.label, num_paths=num_paths)
        if not sequence.is_prompt:
            for each in paths:
                self._start(sequence, each)

    def _open_path(self, block: Block, path: int) -> Branch:
        """Make the branch of a path, which sees what the branch saw that forked."""
        fork = block.branch
        return Branch(
            block.structure.for_path(path),
            block.paths[path],
            position=fork.position,  # all paths begin at one position
            sees=LogCache.fork(fork.sees),
            context=list(fork.context),
            key=mix(fork.key, path + 1),
            label=f"{fork.label}.{path + 1}".lstrip("."),
            blocks=[*fork.blocks, block],
            path=path,
            until=fork.until,
            own=len(fork.context),
            trust=fork.trust,
            flow=fork.flow,
        )

    def start_held(self, sequence: Sequence) -> None:
        """Start paths that wait while there is room, those of the latest block first: so few blocks stay open."""
        while sequence.held and len(sequence.live) < sequence.request.options.max_branches:
            block, path = sequence.held.pop()
            branch = self._open_path(block, path)
            branch.sees = np.pad(branch.sees, (0, len(sequence.positions) - len(branch.sees)))
            sequence.live.append(branch)
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
        self.emit(sequence, "close", branch.label, finish_reason=branch.closed_by)
        if block.num_open:
            del sequence.live[at]
            return
        block.reduced = Segment()
        sees = LogCache.reduce([*block.sees, np.zeros(len(sequence.positions), dtype=bool)])
        context = fork.context + [token for tail in block.tails for token in tail]
        reduced = Branch(
            block.structure.after_reduce(),
            block.reduced,
            position=block.max_position + 1,  # one past the longest path
            sees=sees,
            context=context,
            key=fork.key,
            label=fork.label,
            blocks=fork.blocks,
            path=fork.path,
            until=fork.until,
            after=block,
            own=fork.own,
            trust=branch.trust,
            flow=branch.flow,
        )
        block.sees, block.tails = [], []
        sequence.live[at] = reduced
        self.emit(sequence, "reduce", fork.label)
        if not sequence.is_prompt:
            self._start(sequence, reduced)

    def grow(self, sequence: Sequence) -> None:
        """Make room in a sequence's arrays."""
        extra = len(sequence.positions) // 2 + 64
        sequence.positions = np.pad(sequence.positions, (0, extra))
        for branch in sequence.live:
            branch.sees = np.pad(branch.sees, (0, extra))

    def _start(self, sequence: Sequence, branch: Branch) -> None:
        """Write what is left of a branch's forced start, unless it has begun otherwise."""
        written = [sequence.ids[entry] for entry in branch.segment.entries]
        block = branch.blocks[-1] if branch.blocks else None
        if block is not None and branch.segment is block.paths[branch.path]:
            forced = branch.structure.path_prefix(branch.path)
        elif branch.after is not None and branch.segment is branch.after.reduced:
            forced = self.tags.reduce_prefix
        else:
            forced = []
        begun = len(written) if forced[: len(written)] == written else 0
        if begun or branch.structure.stage in (Stage.FORKED, Stage.REDUCED):
            for token in forced[begun:]:
                self._append(sequence, branch, token)
            if len(written) <= len(forced):
                branch.structure.has_text = False  # a label says nothing yet
        self._settle(sequence, branch)

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
        elif branch.position >= branch.text_end or sequence.budget.room <= 0:
            limit = sequence.budget.find_limit(branch)
            if limit is not None:
                self._stop(sequence, branch, *limit)

    def _stop(self, sequence: Sequence, branch: Branch, reason: FinishReason, until: int) -> None:
        """Close as a limit says."""
        if until == ANSWER:
            self.finish(sequence, reason)
        else:
            self._cut(sequence, branch, reason, until)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
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
            if sequence.end is not None and sequence.budget.spend(branch, sequence.end) is None:
                self._append(sequence, branch, sequence.end)
            self._end(sequence, branch)

    def complete(self, sequence: Sequence) -> None:
        """Complete the account of a finished answer, and tell its listener."""
        stats = sequence.stats
        stats.num_tokens = sequence.num_written
        stats.length = max(sequence.max_position + 1 - sequence.prompt_length, 0)
        stats.num_steps = max(stats.num_steps, 0)
        stats.finish_reason = sequence.finish or FinishReason.STOP
        if sequence.error is None:
            try:
                self.emit(sequence, "finish", "", finish_reason=stats.finish_reason)
            except BaseException as err:
                sequence.error = err

    def _end(self, sequence: Sequence, branch: Branch) -> None:
        branch.segment.ended = True
        sequence.live.remove(branch)
