"""State of a generation: options, sequences, branches and blocks. Data only."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import torch

from .interpreter import Structure


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token
    LENGTH = "length"  # max_new_tokens, or the model's context
    TOTAL = "max_total_tokens"
    TIME = "max_time"
    CRITERIA = "stopping_criteria"


@dataclass(frozen=True, slots=True)
class StructureOptions:
    """Options of :meth:`generate` that transformers does not have.

    Args:
        structure: ``"guided"`` masks tags the grammar does not allow, ``"lenient"`` takes what comes, ``"off"`` is
            ordinary autoregressive decoding.
        max_depth: blocks around any token.
        max_paths: outlines of a block.
        max_path_tokens: positions along one path, counted from its fork, what is nested in it included. Where not even
            an empty path fits, no block is opened.
        max_total_tokens: tokens of the whole answer, all paths together.
    """

    structure: str = "guided"
    max_depth: int = 4
    max_paths: int = 16
    max_path_tokens: int | None = None
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.structure not in ("guided", "lenient", "off"):
            raise ValueError(f"structure must be 'guided', 'lenient' or 'off', got {self.structure!r}")
        for name in ("max_depth", "max_paths", "max_path_tokens", "max_total_tokens"):
            value = getattr(self, name)
            low = 0 if name == "max_depth" else 1
            optional = name in ("max_path_tokens", "max_total_tokens")
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
            if not fits and not (optional and value is None):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(slots=True)
class GenerationStats:
    """What one answer cost, prompt excluded (paper, section on # parallel).

    Attributes:
        num_tokens: tokens of the answer, all paths, forced ones included.
        length: how far positions ran past the prompt: the critical path, in tokens.
        num_steps: forward passes after the prompt's.
        num_forks: blocks written.
        max_width: most branches alive at once.
        depth: most blocks around a token.
        finish_reason: why it ended.
        malformed: tags that fitted no rule.
        num_closed: branches that a limit closed.
    """

    num_tokens: int = 0
    length: int = 0
    num_steps: int = 0
    num_forks: int = 0
    max_width: int = 1
    depth: int = 0
    finish_reason: FinishReason = FinishReason.STOP
    malformed: int = 0
    num_closed: int = 0

    @property
    def parallelism(self) -> float:
        """The paper's # parallel: tokens over length."""
        return self.num_tokens / self.length if self.length else 1.0


@dataclass(slots=True, eq=False)
class Segment:
    """A run of tokens of one branch: their places in the log, and the block that follows, if one does."""

    entries: list[int] = field(default_factory=list)
    block: "Block | None" = None


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
class Branch:
    """A segment being written.

    Attributes:
        position: position id of its next token.
        sees: (capacity,) bool, the log entries it sees.
        context: visible ids in document order; kept only where something looks at them.
        until: the branch is being closed until this many blocks are open around it; -1 ends the answer.
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


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer being written: its log, and its live branches."""

    index: int
    prompt: Ids[int]
    key: int
    root: Segment
    ids: list[int]
    positions: np.ndarray
    sampled: list[bool]
    live: list[Branch] = field(default_factory=list)
    pending: list[tuple[int, Branch]] = field(default_factory=list)  # log entries the model has not read yet
    num_computed: int = 0
    prompt_length: int = 0  # positions the prompt takes
    budget: int = 0  # positions the answer may take
    max_position: int = 0
    finish: FinishReason | None = None
    end: int | None = None  # the end token the model chose while something was still open
    stats: GenerationStats = field(default_factory=GenerationStats)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # log entry -> what it was chosen from
    is_prompt: bool = True  # still reading the prompt


@dataclass(frozen=True, slots=True)
class BranchEvent:
    """What happened to a branch: for streamers that show branches.

    Attributes:
        sequence: row of the batch.
        kind: ``"token"``, ``"fork"``, ``"close"``, ``"reduce"`` or ``"finish"``.
        branch: the branch's label, e.g. ``"2.1"``; empty outside every block.
        token: the token written, for ``"token"``.
        sampled: the model chose the token.
        num_paths: for ``"fork"``.
    """

    sequence: int
    kind: str
    branch: str
    token: int | None = None
    sampled: bool = False
    num_paths: int = 0
