"""The engine: all branches of all sequences take one step together.

Every sequence has one append-only log. A step reads the log entries that are new, whichever branches wrote them, as
query positions of one forward pass; then every live branch chooses its next token; then the interpreter says what the
token does. Fork and reduce only make rows of visibility and set positions.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList

from .attention import SLIDING, layer_kinds, to_additive
from .cache import SCRATCH, LogCache
from .interpreter import Stage, Structure
from .layout import Event
from .sampling import Sampler, mix, sequence_key
from .state import Block, Branch, BranchEvent, FinishReason, GenerationStats, Segment, Sequence, StructureOptions
from .tags import TagSet

ANSWER = -1  # as `until`: close the whole answer


class Engine:
    """Writes the answers of one batch of prompts.

    Args:
        model: a causal LM of transformers whose backbone takes positions, a 4-D mask and a cache.
        tags: the control tags.
        options: structure and limits.
        sampler: chooses tokens.
        max_new_tokens: bound on the length of each answer, in positions.
        context: positions the model can tell apart; None if there is no bound.
        eos_token_ids: tokens that end a branch.
        stopping_criteria: transformers criteria, asked with each branch's own visible ids.
        max_time: seconds after which every answer is closed.
        keep_logits: keep the logits each token was chosen from.
        on_event: called with every :class:`BranchEvent`.
        on_step: called after every step.
    """

    def __init__(
        self,
        model: Any,
        tags: TagSet,
        options: StructureOptions,
        sampler: Sampler,
        max_new_tokens: int,
        context: int | None = None,
        eos_token_ids: Ids[int] = (),
        stopping_criteria: StoppingCriteriaList | None = None,
        max_time: float | None = None,
        keep_logits: bool = False,
        on_event: Callable[[BranchEvent], None] | None = None,
        on_step: Callable[["Engine"], None] | None = None,
    ) -> None:
        self.model, self.tags, self.options, self.sampler = model, tags, options, sampler
        self.max_new_tokens, self.context = max_new_tokens, context
        self.eos = frozenset(eos_token_ids)
        self.criteria = stopping_criteria or StoppingCriteriaList()
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.keep_logits = keep_logits
        self.on_event, self.on_step = on_event, on_step
        self.needs_context = sampler.needs_context or bool(self.criteria)
        self.structured = options.structure != "off"
        self.kinds = layer_kinds(model.config)
        self.sequences: list[Sequence] = []
        self.running: list[Sequence] = []
        self.cache: LogCache | None = None

    @torch.no_grad()
    def generate(self, prompts: Ids[Ids[int]]) -> list[Sequence]:
        """Answer every prompt.

        Args:
            prompts: token ids, without padding; one that contains or ends inside a block is gone on with.

        Returns:
            The finished sequences, in order.
        """
        seen: dict[tuple[int, ...], int] = {}
        for index, prompt in enumerate(prompts):
            occurrence = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
            self.sequences.append(self._admit(index, list(prompt), sequence_key(prompt, occurrence)))
        room = min(self.max_new_tokens * (4 if self.structured else 1), 2048)
        self.cache = LogCache(self.model.config.num_hidden_layers, max(map(len, prompts)) + room)
        self.running = list(self.sequences)
        self._release()
        while self.running:
            self.step()
        return self.sequences

    def step(self) -> None:
        """Take one step: prepare, forward, sample, interpret, release."""
        queries = [(sequence, branch) for sequence in self.running for branch in sequence.live]
        logits = self._forward(queries)
        self._choose(queries, logits)
        self._enforce()
        if self.on_step is not None:
            self.on_step(self)
        self._release()

    # Admit

    def _admit(self, index: int, prompt: list[int], key: int) -> Sequence:
        """Start a sequence: its prompt goes through the interpreter like any other text, so that one which ends inside
        blocks leaves the branches it ends in: the open path, and its siblings still to come."""
        capacity = len(prompt) + min(self.max_new_tokens * 2, 2048) + 8
        root = Segment()
        sequence = Sequence(index, prompt, key, root, [], np.zeros(capacity, dtype=np.int64), [])
        sees = np.zeros(capacity, dtype=bool)
        sequence.live = [Branch(Structure(self.tags), root, 0, sees, [], mix(0), "", [])]
        on_event, self.on_event = self.on_event, None
        for token in prompt:
            self._append(sequence, sequence.live[0], token)  # live branches are kept in document order
        self.on_event = on_event
        sequence.prompt_length = sequence.max_position + 1
        sequence.budget = self.max_new_tokens
        if self.context is not None:
            sequence.budget = min(sequence.budget, self.context - sequence.prompt_length)
            if sequence.budget < 1:
                raise ValueError(
                    f"prompt {index} takes {sequence.prompt_length} positions and the model's context has "
                    f"{self.context}; shorten the prompt"
                )
        sequence.is_prompt = False
        sequence.stats = GenerationStats(num_steps=-1)  # the prompt's own pass is not counted
        for branch in list(sequence.live):
            self._start(sequence, branch)
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
        self._settle(sequence, branch)

    # Prepare and forward

    def _forward(self, queries: list[tuple[Sequence, Branch]]) -> torch.Tensor:
        """Read every log entry that is new; give (len(queries), V), the logits each branch chooses its token from."""
        begins, ends = [s.num_computed for s in self.running], [len(s.ids) for s in self.running]
        width, columns = max(e - b for b, e in zip(begins, ends, strict=True)), SCRATCH + max(ends)
        mask = np.zeros((len(self.running), width, columns), dtype=bool)
        ids, positions = np.zeros(mask.shape[:2], dtype=np.int64), np.zeros(mask.shape[:2], dtype=np.int64)
        last: dict[int, tuple[int, int]] = {}  # id of a branch -> where its last new entry stands in the batch
        for row, (sequence, begin, end) in enumerate(zip(self.running, begins, ends, strict=True)):
            ids[row, : end - begin] = sequence.ids[begin:end]
            positions[row, : end - begin] = sequence.positions[begin:end]
            for query, (entry, branch) in enumerate(sequence.pending):
                mask[row, query, SCRATCH : SCRATCH + entry + 1] = branch.sees[: entry + 1]
                last[id(branch)] = row, query
            mask[row, end - begin :, 0] = True
            sequence.pending.clear()
            sequence.num_computed = end
            sequence.stats.num_steps += 1
        places = [last[id(branch)] for _, branch in queries]
        needed = sorted({query for _, query in places})
        kept = {query: number for number, query in enumerate(needed)}
        device = self.model.device
        self.cache.prepare(begins, ends, device)
        output = self.model(
            input_ids=torch.from_numpy(ids).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            attention_mask=self._masks(mask, positions, ends),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(needed, device=device),
        )
        rows = torch.tensor([row * len(needed) + kept[query] for row, query in places], device=device)
        logits = output.logits.flatten(0, 1).index_select(0, rows)  # five times as fast as indexing by pairs
        return logits if logits.dtype == torch.float64 else logits.float()

    def _masks(self, mask: np.ndarray, positions: np.ndarray, ends: list[int]) -> Any:
        """Give the model's ``attention_mask``: one tensor, or one for each kind of layer."""
        masks = {}
        for kind in self.kinds:
            allowed = mask
            if kind == SLIDING:
                keys = np.zeros((len(self.running), mask.shape[2]), dtype=np.int64)
                for row, sequence in enumerate(self.running):
                    keys[row, SCRATCH : SCRATCH + ends[row]] = sequence.positions[: ends[row]]
                near = positions[:, :, None] - keys[:, None, :] < self.model.config.sliding_window
                near[:, :, :SCRATCH] = True
                allowed = mask & near
            tensor = torch.from_numpy(allowed)[:, None].to(self.model.device)
            if self.model.config._attn_implementation == "eager":
                tensor = to_additive(tensor, self.model.dtype)
            masks[kind] = tensor
        return masks if len(masks) > 1 else masks.popitem()[1]

    # Sample and interpret

    def _choose(self, queries: list[tuple[Sequence, Branch]], logits: torch.Tensor) -> None:
        """Choose the next token of every branch and do what it says."""
        headroom = {id(sequence): self._headroom(sequence) for sequence in self.running}
        tokens, scores = self.sampler(
            logits,
            [(len(s.prompt), branch.context) for s, branch in queries] if self.sampler.needs_context else None,
            [self._forbidden(sequence, branch, headroom[id(sequence)]) for sequence, branch in queries],
            [(sequence.key, branch.key, branch.position) for sequence, branch in queries],
        )
        for row, ((sequence, branch), token) in enumerate(zip(queries, tokens, strict=True)):
            if self.keep_logits:
                sequence.logits[len(sequence.ids)] = logits[row]
            self._take(sequence, branch, token, scores[row])

    def _enforce(self) -> None:
        """Hold the limits that concern an answer as a whole."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        for sequence in self.running:
            if late and sequence.live:
                self._finish(sequence, FinishReason.TIME)
            headroom = self._headroom(sequence)
            if headroom is not None and sequence.live and headroom < len(sequence.live):
                self._finish(sequence, FinishReason.TOTAL)
            sequence.stats.max_width = max(sequence.stats.max_width, len(sequence.live))

    def _take(self, sequence: Sequence, branch: Branch, token: int, scores: torch.Tensor) -> None:
        """Do what a chosen token says."""
        if branch not in sequence.live:  # closed by a sibling's limit in this very step
            sequence.logits.pop(len(sequence.ids), None)
            return
        if token in self.eos and self.structured and branch.structure.closing_tokens():
            sequence.logits.pop(len(sequence.ids), None)
            if branch.blocks:  # as if </Path>
                self._close(sequence, branch, len(branch.blocks) - 1)
            else:
                sequence.finish, sequence.end = FinishReason.STOP, token
                self._close(sequence, branch, ANSWER)
            return
        self._append(sequence, branch, token, sampled=True)
        if branch not in sequence.live:  # it forked or closed
            return
        if token in self.eos:
            sequence.finish = FinishReason.STOP
            sequence.live.remove(branch)
        elif self.criteria and bool(self._ask_criteria(branch, scores)):
            if branch.blocks:
                self._close(sequence, branch, len(branch.blocks) - 1)
            else:
                self._finish(sequence, FinishReason.CRITERIA)
        else:
            self._settle(sequence, branch)

    def _ask_criteria(self, branch: Branch, scores: torch.Tensor) -> bool:
        return bool(self.criteria(torch.tensor([branch.context], device=self.model.device), scores[None]).all())

    def _append(self, sequence: Sequence, branch: Branch, token: int, sampled: bool = False) -> None:
        """Write a token at the end of a branch and interpret it."""
        entry = len(sequence.ids)
        if entry == len(sequence.positions):
            self._grow(sequence)
        sequence.ids.append(token)
        sequence.positions[entry] = branch.position
        sequence.sampled.append(sampled)
        sequence.pending.append((entry, branch))
        sequence.max_position = max(sequence.max_position, branch.position)
        branch.segment.entries.append(entry)
        branch.sees[entry] = True
        branch.position += 1
        if self.needs_context:
            branch.context.append(token)
        if self.on_event is not None:
            self.on_event(BranchEvent(sequence.index, "token", branch.label, token, sampled))
        if not self.structured:
            return
        malformed = branch.structure.malformed
        event = branch.structure.feed(token)
        sequence.stats.malformed += branch.structure.malformed - malformed
        if event is Event.FORK:
            self._fork(sequence, branch)
        elif event is not Event.TEXT:
            self._path_closed(sequence, branch)

    def _fork(self, sequence: Sequence, branch: Branch) -> None:
        """Make one branch per outline, each with its forced start."""
        structure = branch.structure
        num_paths = structure.scanner.open_blocks[-1].num_paths
        block = Block(structure, branch, num_open=num_paths)
        branch.segment.block = block
        sees = LogCache.fork(branch.sees, num_paths)
        block.paths = [Segment() for _ in range(num_paths)]
        block.tails = [[] for _ in range(num_paths)]
        paths = [
            Branch(
                structure.for_path(path), block.paths[path], branch.position, sees[path], list(branch.context),
                mix(branch.key, path + 1), f"{branch.label}.{path + 1}".lstrip("."), [*branch.blocks, block],
                path, branch.until,
            )
            for path in range(num_paths)
        ]  # fmt: skip
        at = sequence.live.index(branch)
        sequence.live[at : at + 1] = paths
        sequence.stats.num_forks += 1
        sequence.stats.depth = max(sequence.stats.depth, structure.depth)
        if self.on_event is not None:
            self.on_event(BranchEvent(sequence.index, "fork", branch.label, num_paths=num_paths))
        if not sequence.is_prompt:
            for path in paths:
                self._start(sequence, path)

    def _path_closed(self, sequence: Sequence, branch: Branch) -> None:
        """Take a path off; when it is the last one, merge: go on from one past the block's greatest position, seeing
        all of its paths."""
        block = branch.blocks[-1]
        fork = block.branch
        at = sequence.live.index(branch)
        block.num_open -= 1
        block.max_position = max(block.max_position, branch.position - 1)
        block.sees.append(branch.sees)
        block.tails[branch.path] = branch.context[len(fork.context) :]
        if self.on_event is not None:
            self.on_event(BranchEvent(sequence.index, "close", branch.label))
        if block.num_open:
            del sequence.live[at]
            return
        block.reduced = Segment()
        capacity = len(sequence.positions)
        sees = LogCache.reduce([np.pad(path, (0, capacity - len(path))) for path in block.sees])
        context = fork.context + [token for tail in block.tails for token in tail]
        reduced = Branch(
            block.structure.after_reduce(), block.reduced, block.max_position + 1, sees, context,
            fork.key, fork.label, fork.blocks, fork.path, fork.until, block,
        )  # fmt: skip
        block.sees, block.tails = [], []
        sequence.live[at] = reduced
        if self.on_event is not None:
            self.on_event(BranchEvent(sequence.index, "reduce", fork.label))
        if not sequence.is_prompt:
            self._start(sequence, reduced)

    # Limits

    def _forbidden(self, sequence: Sequence, branch: Branch, headroom: int | None) -> frozenset[int]:
        """Give the control tags a branch may not choose now."""
        if not self.structured:
            return frozenset()
        structure, options = branch.structure, self.options
        may_open = may_outline = may_think = True
        if structure.stage not in (Stage.ARMED, Stage.GOAL, Stage.OUTLINE):
            thinking = 2 * (len(self.tags.newline) + 1)  # both of its tags
            may_think = self._room(sequence, branch) >= thinking and (headroom is None or headroom > thinking)
            opening = structure.opening_length() + structure.closing_length() + 12
            may_open = structure.depth < options.max_depth and self._room(sequence, branch) > opening
            may_open = may_open and (headroom is None or headroom > len(sequence.live) * 2 * opening)
            if options.max_path_tokens is not None:  # an empty path has to fit
                may_open = may_open and options.max_path_tokens >= structure.empty_path_length()
        elif structure.stage is Stage.GOAL:
            may_outline = len(structure.outlines) < options.max_paths
            opening = structure.opening_length() + 12
            may_outline = may_outline and (headroom is None or headroom > len(sequence.live) * 2 * opening)
        if options.structure == "guided":
            return structure.forbidden(may_open, may_outline, may_think)
        return structure.over_limit(may_open, may_outline, may_think)

    def _room(self, sequence: Sequence, branch: Branch) -> int:
        """Positions left to a branch, by the answer's budget and by that of every path it is in."""
        room = sequence.prompt_length + sequence.budget - branch.position
        if self.options.max_path_tokens is not None:
            for block in branch.blocks:
                room = min(room, block.branch.position + self.options.max_path_tokens - branch.position)
        return room

    def _headroom(self, sequence: Sequence) -> int | None:
        """Tokens left to an answer after all it takes to close it, None without ``max_total_tokens``."""
        if self.options.max_total_tokens is None:
            return None
        if not self.structured:
            return self.options.max_total_tokens - (len(sequence.ids) - len(sequence.prompt))
        path_end = len(self.tags.newline) + 1
        cost, blocks = path_end, set()
        for branch in sequence.live:
            cost += branch.structure.closing_tokens_bound()
            blocks |= {id(block) for block in branch.blocks}
        cost += len(blocks) * (len(self.tags.conclusion_prefix()) + 3 * path_end)
        return self.options.max_total_tokens - (len(sequence.ids) - len(sequence.prompt)) - cost

    def _settle(self, sequence: Sequence, branch: Branch) -> None:
        """Close a branch that is to be closed, or that has only the room left which closing takes."""
        if branch not in sequence.live:
            return
        structure, depth = branch.structure, len(branch.blocks)
        if branch.until is not None and depth <= branch.until:
            branch.until = None
        if branch.until is not None:
            self._close(sequence, branch, branch.until)
        elif sequence.finish not in (None, FinishReason.STOP):
            self._close(sequence, branch, ANSWER)
        else:
            used = branch.position - sequence.prompt_length
            if used + (structure.closing_length() if self.structured else 0) >= sequence.budget:
                sequence.stats.num_closed += depth > 0
                if depth == 0:
                    sequence.finish = FinishReason.LENGTH
                # siblings may have room left: only this path ends here, and what follows the block ends by itself
                self._close(sequence, branch, depth - 1)
            elif self.options.max_path_tokens is not None:
                self._settle_path(sequence, branch)

    def _settle_path(self, sequence: Sequence, branch: Branch) -> None:
        """Close the outermost path around a branch that has used up ``max_path_tokens``."""
        for level, block in enumerate(branch.blocks):
            used = branch.position - block.branch.position
            if used + branch.structure.closing_length(level) >= self.options.max_path_tokens:
                sequence.stats.num_closed += 1
                self._close(sequence, branch, level)
                return

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Close a whole answer early."""
        sequence.finish = reason
        for branch in list(sequence.live):
            if branch in sequence.live:
                sequence.stats.num_closed += bool(branch.blocks)
                self._close(sequence, branch, ANSWER)

    def _close(self, sequence: Sequence, branch: Branch, until: int) -> None:
        """Write the tokens that close a branch until only ``until`` blocks are open around it.

        With :data:`ANSWER` the answer ends, with the end token if the model chose one.
        """
        branch.until = until
        for token in branch.structure.closing_tokens() if self.structured else []:
            self._append(sequence, branch, token)
        if branch in sequence.live:  # outside every block, where nothing is left to close
            if sequence.end is not None:
                self._append(sequence, branch, sequence.end)
            sequence.live.remove(branch)

    # Release

    def _grow(self, sequence: Sequence) -> None:
        """Make room in a sequence's arrays."""
        extra = len(sequence.positions) // 2 + 64
        sequence.positions = np.pad(sequence.positions, (0, extra))
        for branch in sequence.live:
            branch.sees = np.pad(branch.sees, (0, extra))

    def _release(self) -> None:
        """Let finished sequences and their memory go."""
        for sequence in self.running:
            if not sequence.live:
                sequence.pending.clear()
                sequence.stats.num_tokens = len(sequence.ids) - len(sequence.prompt)
                sequence.stats.length = max(sequence.max_position + 1 - sequence.prompt_length, 0)
                sequence.stats.num_steps = max(sequence.stats.num_steps, 0)
                sequence.stats.finish_reason = sequence.finish or FinishReason.STOP
                if self.on_event is not None:
                    self.on_event(BranchEvent(sequence.index, "finish", ""))
        rows = [row for row, sequence in enumerate(self.running) if sequence.live]
        if len(rows) < len(self.running):
            self.running = [self.running[row] for row in rows]
            self.cache.keep(rows)


def document_entries(root: Segment) -> list[int]:
    """Give the log entries of an answer in document order: paths one after the other."""
    entries: list[int] = []
    stack: list[Segment] = [root]
    while stack:
        segment = stack.pop()
        entries += segment.entries
        if segment.block is not None:
            if segment.block.reduced is not None:
                stack.append(segment.block.reduced)
            stack += reversed(segment.block.paths)
    return entries
