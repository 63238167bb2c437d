"""State of a generation: options, sequences, branches and blocks. Data only."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList

from .grammar import Structure
from .sampling import Sampler, TokenScores


class FinishReason(StrEnum):
    """Why a sequence or a path ended.

    Attributes:
        STOP: an end token.
        LENGTH: ``max_new_tokens``, or the model's context.
        PATH: ``max_path_tokens`` of a path; no answer ends by it.
        TOTAL: ``max_total_tokens``.
        CACHE: the engine's whole cache is full.
        TIME: ``max_time``.
        CRITERIA: a stop string or another stopping criterion.
        CANCELLED: the request was cancelled.
    """

    STOP = "stop"
    LENGTH = "length"
    PATH = "max_path_tokens"
    TOTAL = "max_total_tokens"
    CACHE = "max_cache_tokens"
    TIME = "max_time"
    CRITERIA = "stopping_criteria"
    CANCELLED = "cancelled"


AUTO = "auto"  # of speculate


@dataclass(frozen=True, slots=True)
class StructureOptions:
    """Options of :meth:`generate` that transformers does not have.

    Args:
        structure: ``"guided"`` masks tags the grammar does not allow, ``"lenient"`` takes what comes, ``"off"`` is
            ordinary autoregressive decoding.
        max_depth: blocks around any token. This default and the next are Multiverse's: see :class:`~.families.Family`.
        max_paths: outlines of a block.
        max_branches: branches of the answer that are written at once. Further paths wait until one closes: what each
            writes does not depend on that, but a step's memory and time do.
        max_path_tokens: positions along one path, counted from its fork, what is nested in it included.
        max_total_tokens: tokens of the whole answer, all paths together. By default ``max_paths`` times
            ``max_new_tokens``: what a model that never stops forking can cost at most.
        stop_scope: what a stop string or a stopping criterion ends inside a path: ``"path"``, that path, or
            ``"answer"``, the whole answer, as ``stop`` means to a client of OpenAI's API.
        max_blocks: blocks of an answer, those in other paths not counted.
        path_repetition_penalty: as ``repetition_penalty`` of transformers, but in paths only, and for the tokens that
            the path itself has.
        speculate: tokens each branch may draft for a step to check (:mod:`~.drafts`): a number, ``"off"`` (0), or
            ``"auto"``: as many as the measured time of steps pays for. No answer depends on it.
    """

    structure: str = "guided"
    max_depth: int = 4
    max_paths: int = 16
    max_branches: int = 256
    max_path_tokens: int | None = None
    max_total_tokens: int | None = None
    stop_scope: str = "path"
    speculate: int | str = 0
    max_blocks: int | None = None
    path_repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.speculate == "off":
            object.__setattr__(self, "speculate", 0)
        if self.structure not in ("guided", "lenient", "off"):
            raise ValueError(f"structure must be 'guided', 'lenient' or 'off', got {self.structure!r}")
        if self.stop_scope not in ("path", "answer"):
            raise ValueError(f"stop_scope must be 'path' or 'answer', got {self.stop_scope!r}")
        penalty = self.path_repetition_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
            raise ValueError(f"path_repetition_penalty must be a number above 0, got {penalty!r}")
        optional_counts = ("max_path_tokens", "max_total_tokens", "max_blocks")
        for name in (*optional_counts, "max_depth", "max_paths", "max_branches", "speculate"):
            value = getattr(self, name)
            low = 0 if name in ("max_depth", "speculate") else 1
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
            if fits or (name in optional_counts and value is None) or (name == "speculate" and value == AUTO):
                continue
            words = "'auto', 'off' or " if name == "speculate" else ""
            raise ValueError(f"{name} must be {words}an integer of at least {low}, got {value!r}")


@dataclass(slots=True)
class GenerationStats:
    """What one answer cost, prompt excluded (paper, section on # parallel).

    Attributes:
        num_tokens: tokens of the answer, all paths, forced ones included.
        length: how far positions ran past the prompt: the critical path, in tokens.
        num_steps: forward passes after the prompt's.
        num_forks: blocks written.
        max_width: most branches written at once.
        depth: most blocks around a token.
        finish_reason: why it ended.
        malformed: tags that fitted no rule.
        closed_by: branches closed before they ended by themselves, by what closed them.
        num_drafted, num_accepted: tokens that branches drafted, and those that the model chose as well.
    """

    num_tokens: int = 0
    length: int = 0
    num_steps: int = 0
    num_forks: int = 0
    max_width: int = 1
    depth: int = 0
    finish_reason: FinishReason = FinishReason.STOP
    malformed: int = 0
    closed_by: dict[FinishReason, int] = field(default_factory=dict)
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def num_closed(self) -> int:
        """Branches closed before they ended by themselves, by a limit or a stopping criterion."""
        return sum(self.closed_by.values())

    @property
    def parallelism(self) -> float:
        """The paper's # parallel: tokens over length."""
        return self.num_tokens / self.length if self.length else 1.0


@dataclass(slots=True, eq=False)
class Segment:
    """A run of tokens of one branch: their places in the log, and the block that follows, if one does."""

    entries: list[int] = field(default_factory=list)
    block: "Block | None" = None
    ended: bool = False  # nothing more will be written to it


@dataclass(slots=True, eq=False)
class Block:
    """A block while its paths are written, and afterwards its place in the document.

    Attributes:
        structure: state right after the goal, with the block open.
        branch: the branch that forked; its ``position`` is that of every path's first token.
        num_open: paths still being written.
        max_position: greatest position a closed path reached.
        sees: for every closed path, (capacity,) bool, the log entries it saw.
        tails: by path, the ids it added to the context.
        paths: where each path begins.
        reduced: what follows the paths.
    """

    structure: Structure
    branch: "Branch"
    num_open: int
    max_position: int = 0
    sees: list[np.ndarray] = field(default_factory=list)
    tails: list[list[int]] = field(default_factory=list)
    paths: list[Segment] = field(default_factory=list)
    reduced: Segment | None = None


@dataclass(slots=True, eq=False)
class Ready:
    """A token that a branch chose and has not written yet.

    Attributes:
        chosen: the token (:class:`~.writing.Chosen`), or why there was none to choose.
        entry: the log entry from which the model reads it before it is written, None if it does not.
    """

    chosen: Any
    entry: int | None = None


@dataclass(slots=True, eq=False)
class Branch:
    """A segment being written.

    Attributes:
        position: position id of its next token.
        sees: (capacity,) bool, the log entries it sees.
        context: visible ids in document order; kept only where something looks at them.
        until: the branch is being closed until this many blocks are open around it; -1 ends the answer.
        closed_by: the limit or criterion that closes it, if one does.
        text_end: below this position its budget has room for text, as long as it has tokens; 0 if it has to be asked.
        ready: tokens to write next, one in each step of the answer.
        drafts: log entries of the tokens that it guesses to come.
        trust: how often the first of its drafts was right, a running mean, and ``flow`` how often one after a right
            one. A path begins with those of the branch that forked.
    """

    structure: Structure
    segment: Segment
    position: int
    sees: np.ndarray
    context: list[int]
    key: int
    label: str
    blocks: list[Block]
    path: int = 0
    until: int | None = None
    after: Block | None = None  # the block this branch follows, if it begins with a reduce
    own: int = 0  # where in the context the path it belongs to begins
    closed_by: FinishReason | None = None
    text_end: int = 0
    ready: list[Ready] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    trust: float = 0.3
    flow: float = 0.5

    @property
    def asking(self) -> list[int]:
        """Log entries after which it chooses a token in this step: its last one, and its drafts. None if it waits."""
        last = self.ready[-1].entry if self.ready else self.segment.entries[-1]
        return [] if last is None else [last, *self.drafts]


@dataclass(slots=True, eq=False)
class Request:
    """What is asked of the engine: one prompt, and how to answer it.

    Attributes:
        prompt: token ids; may contain blocks, and may end inside one.
        key: of the sampling noise, with the sampler's seed.
        options: structure and limits.
        sampler: chooses tokens.
        max_new_tokens: bound on the answer's length, in positions.
        eos: tokens that end a branch.
        criteria: transformers' stopping criteria, asked with each branch's own visible ids.
        max_time: seconds from its submission after which the answer is closed.
        keep_logits: keep the logits each token was chosen from.
        num_logprobs: keep each sampled token's log-probability and the entropy, and those of this many likeliest
            tokens; None keeps none. Of the model's own distribution, before any processor.
        on_event: called with every :class:`BranchEvent`, in the thread that steps the engine.
        index: number the events bear, and the row of its batch.
        calls: the caller's own processors and criteria of its batch (:mod:`~.callables`), None if there are none.
        structured: tags are control, not text.
        needs_context: something looks at the ids each branch sees.
        has_criteria: the caller's own stopping criteria are asked.
    """

    prompt: Ids[int]
    key: int
    options: StructureOptions
    sampler: Sampler
    max_new_tokens: int
    eos: frozenset[int] = frozenset()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    max_time: float | None = None
    keep_logits: bool = False
    num_logprobs: int | None = None
    on_event: "Callable[[BranchEvent], None] | None" = None
    index: int = 0
    submitted: float = field(default_factory=time.monotonic)
    calls: Any | None = None
    structured: bool = field(init=False)
    needs_context: bool = field(init=False)
    has_criteria: bool = field(init=False)

    def __post_init__(self) -> None:
        self.structured = self.options.structure != "off"
        self.needs_context = (
            self.sampler.needs_context or bool(self.criteria) or self.calls is not None or bool(self.options.speculate)
        ) or self.options.path_repetition_penalty != 1
        self.has_criteria = self.calls is not None and bool(self.calls.criteria)

    @property
    def max_total_tokens(self) -> int:
        """Tokens the answer may take, all paths together."""
        if self.options.max_total_tokens is not None:
            return self.options.max_total_tokens
        return self.max_new_tokens * (self.options.max_paths if self.structured else 1)


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer being written: its log, and its live branches.

    Attributes:
        ids, positions, sampled, labels: of every log entry: token, position, whether the model chose it, its branch.
        live: branches being written.
        held: paths that wait to be written, each as its block and its number in it, the next one last.
        pending: log entries the model has not read yet, each with the (entries,) bool of what it sees.
        num_computed: log entries the model has read.
        prompt_length: positions the prompt takes.
        budget: what the answer may still write (:class:`~.budget.Budget`).
        end: the end token the model chose while something was still open.
        logits, scores: by log entry, what it was chosen from.
        early: events from before it was in the queue, kept for the thread that steps the engine; None from then on.
        error: what made it fail.
        arrival: number in the order of submission.
        num_unwritten: log entries that are no part of the answer: drafts, and tokens that are ready.
        deadline: when the answer is to be closed, by :func:`time.monotonic`.
    """

    request: Request
    arrival: int
    root: Segment
    positions: np.ndarray
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    live: list[Branch] = field(default_factory=list)
    held: list[tuple[Block, int]] = field(default_factory=list)
    pending: list[tuple[int, np.ndarray]] = field(default_factory=list)
    num_computed: int = 0
    prompt_length: int = 0
    budget: Any = None
    max_position: int = 0
    finish: FinishReason | None = None
    end: int | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[int, TokenScores] = field(default_factory=dict)
    early: "list[BranchEvent] | None" = field(default_factory=list)
    error: BaseException | None = None
    is_prompt: bool = True  # its prompt is being interpreted
    is_reading: bool = True  # the model is reading its prompt, or after a preemption its log
    is_cancelled: bool = False
    num_unwritten: int = 0
    deadline: float | None = field(init=False)

    def __post_init__(self) -> None:
        limit = self.request.max_time
        self.deadline = None if limit is None else self.request.submitted + limit

    @property
    def num_written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.request.prompt) - self.num_unwritten


@dataclass(slots=True)
class Reading:
    """Log entries of one sequence that a step reads.

    Attributes:
        entries: each with the (entries,) bool of what it sees.
        queries: their place in the packed row of the step.
        first, end: the first of them, and one past the last.
        is_last: nothing is left to read then: the sequence's branches choose their next tokens.
        rows: log entries whose logits are wanted: :attr:`Branch.asking` of each branch. None unless it is the last.
    """

    sequence: Sequence
    entries: list[tuple[int, np.ndarray]]
    queries: slice
    first: int
    end: int
    is_last: bool
    rows: list[int]


@dataclass(frozen=True, slots=True)
class BranchEvent:
    """What happened to a branch: for streamers that show branches.

    Attributes:
        sequence: row of the batch.
        kind: ``"token"``, ``"fork"``, ``"close"``, ``"reduce"`` or ``"finish"``.
        branch: the branch's label, e.g. ``"2.1"``; empty outside every block. Blocks that follow one another label
            their paths alike: each ``"fork"`` begins anew. Blocks that the prompt leaves open come first.
        token: the token written, for ``"token"``.
        sampled: the model chose the token.
        num_paths: for ``"fork"``.
        position: position id of the token, for ``"token"``.
        scores: of a sampled token, where they were asked for.
        finish_reason: for ``"finish"``; for ``"close"`` the limit or criterion that closed the path, if one did.
    """

    sequence: int
    kind: str
    branch: str
    token: int | None = None
    sampled: bool = False
    num_paths: int = 0
    position: int = 0
    scores: TokenScores | None = None
    finish_reason: FinishReason | None = None


def document_entries(root: Segment) -> list[int]:
    """Return the log entries of an answer in document order: paths one after the other."""
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


def log_visibility(sequence: Sequence) -> list[tuple[int, np.ndarray]]:
    """Return every log entry with what it sees, to read a whole log again.

    Returns:
        For each entry its number and (entries,) bool, of which its own and later ones of its segment are to be left
        out.
    """
    seen: list[tuple[int, np.ndarray] | None] = [None] * len(sequence.ids)

    def walk(segment: Segment, sees: np.ndarray) -> np.ndarray:
        while True:
            sees = sees.copy()
            sees[segment.entries] = True
            for entry in segment.entries:
                seen[entry] = entry, sees
            block = segment.block
            if block is None:
                return sees
            ends = [walk(path, sees) for path in block.paths]
            if block.reduced is None:
                return sees
            segment, sees = block.reduced, np.logical_or.reduce(ends)

    walk(sequence.root, np.zeros(len(sequence.positions), dtype=bool))
    return seen
