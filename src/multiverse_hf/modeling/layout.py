"""The layout contract: position id, segment id and visibility for the tokens of a document (Multiverse Attention).

The one definition that training, generation, evaluation and RL share. A block is cut right after ``</Goal>`` and
right after each ``</Path>``; all its paths start at one position and never see each other; what follows the last path
starts one past the greatest position any path reached and sees them all. It nests and repeats without special cases.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from .tags import TagSet


class Event(Enum):
    """What a token does to the structure around it."""

    TEXT = auto()  # nothing: ordinary text, or a tag that fits no rule here
    FORK = auto()  # </Goal> with outlines: the next token begins the first path
    NEXT_PATH = auto()  # </Path>, more paths to come: the next token begins the next path
    REDUCE = auto()  # the last </Path>: the next token sees all paths


@dataclass(slots=True)
class OpenBlock:
    """A block whose goal is closed and whose last path is not."""

    num_paths: int
    path: int = 0  # paths closed so far


@dataclass(slots=True)
class Scanner:
    """Follows the tags of a document from left to right. Total: any sequence of tokens is accepted.

    The engine gives each branch its own scanner; :func:`build_layout` runs one over a whole document. Both ask
    the same question, so they cannot disagree on what a tag means.
    """

    tags: TagSet
    open_blocks: list[OpenBlock] = field(default_factory=list)
    armed: bool = False  # after <Parallel>, before <Goal>
    num_outlines: int | None = None  # inside a goal: outlines opened so far
    in_outline: bool = False
    turn_end: int | None = None  # in a turn of the user's or the system's: the token that ends it
    recent: tuple[int, ...] = ()  # last tokens outside every block, among which such a turn may open

    def hears(self, token: int) -> bool:
        """Take any token, and return whether a tag acts here: not in a turn that is not the assistant's.

        Such a turn opens outside every block only.
        """
        if self.turn_end is not None:
            if token == self.turn_end:
                self.turn_end = None
            return False
        turns = self.tags.turns
        if turns and not self.open_blocks and self.num_outlines is None:
            self.recent = (*self.recent[1 - max(len(opening) for opening, _ in turns) :], token)
            self.open_turn(self.recent)
        return True

    def open_turn(self, ids: tuple[int, ...]) -> None:
        """Note that a turn opens if ``ids`` end in what opens one."""
        for opening, end in self.tags.turns:
            if ids[-len(opening) :] == opening:
                self.turn_end, self.armed = end, False

    def feed(self, token: int) -> Event:
        """Take the next token and say what it does."""
        tags = self.tags
        if self.num_outlines is not None:  # inside a goal only its own tags count
            if token == tags.open("outline") and not self.in_outline:
                self.num_outlines += 1
                self.in_outline = True
            elif token == tags.close("outline"):
                self.in_outline = False
            elif token == tags.close("goal"):
                num_paths, self.num_outlines, self.in_outline = self.num_outlines, None, False
                if num_paths:
                    self.open_blocks.append(OpenBlock(num_paths))
                    return Event.FORK
            return Event.TEXT
        if token == tags.open("parallel"):
            self.armed = True
        elif token == tags.open("goal"):
            if self.armed or tags.names.parallel is None:
                self.armed, self.num_outlines = False, 0
        elif token == tags.close("parallel"):
            self.armed = False
        elif token == tags.close("path") and self.open_blocks:
            self.armed = False
            block = self.open_blocks[-1]
            block.path += 1
            if block.path < block.num_paths:
                return Event.NEXT_PATH
            self.open_blocks.pop()
            return Event.REDUCE
        return Event.TEXT


def has_block(ids: torch.Tensor, tags: TagSet) -> bool:
    """Return whether a row forks anywhere: whether it holds a goal with outlines that is closed.

    Args:
        ids: (L,) token ids.
        tags: the control tags.
    """
    return any(event is Event.FORK for _, event in scan(ids, tags))


def scan(ids: torch.Tensor, tags: TagSet) -> Iterator[tuple[int, Event]]:
    """Yield the index of each tag in a row, and what it does.

    Args:
        ids: (L,) token ids.
        tags: the control tags.
    """
    scanner = Scanner(tags)
    last = {opening[-1] for opening, _ in tags.turns}
    watched = [*tags.control_ids, *last, *(end for _, end in tags.turns)]
    longest = max((len(opening) for opening, _ in tags.turns), default=0)
    for index in torch.isin(ids, torch.tensor(watched, device=ids.device)).nonzero().flatten().tolist():
        token = int(ids[index])
        if scanner.turn_end is not None:
            if token == scanner.turn_end:
                scanner.turn_end = None
        elif token in tags.roles:
            yield index, scanner.feed(token)
        elif token in last and not scanner.open_blocks and scanner.num_outlines is None:
            scanner.open_turn(tuple(ids[max(index + 1 - longest, 0) : index + 1].tolist()))


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of one document.

    Attributes:
        position_ids: (L,) int64, position of every token; the prompt's first token stands at 0.
        segment_ids: (L,) int64, the run of tokens a token belongs to, numbered in document order.
        visible: (S, S) bool, ``visible[query segment, key segment]``. Its diagonal is True.
    """

    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    visible: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Give the dense mask, (L, L) bool, True where the row's token may attend to the column's."""
        causal = torch.ones(len(self.segment_ids), len(self.segment_ids), dtype=torch.bool).tril_()
        return causal.to(self.visible.device) & self.visible[self.segment_ids[:, None], self.segment_ids[None, :]]

    @property
    def length(self) -> int:
        """One past the greatest position: the critical path, prompt included, in tokens."""
        return int(self.position_ids.max()) + 1 if len(self.position_ids) else 0


@dataclass(slots=True)
class _Frame:
    """Bookkeeping of one open block while a layout is built."""

    fork_position: int
    goal_segment: int
    last_segments: list[int] = field(default_factory=list)  # the segment each closed path ended in
    max_position: int = 0


def build_layout(ids: torch.Tensor | Sequence[int], tags: TagSet) -> Layout:
    """Lay out a document. Total: a tag that fits no rule, or a block cut short, is plain text.

    Args:
        ids: (L,) token ids, paths one after the other.
        tags: the control tags.

    Returns:
        Its layout, on the CPU; O(L + S^2) memory for S segments.
    """
    ids = torch.as_tensor(ids, dtype=torch.long, device="cpu").reshape(-1)
    position_ids = torch.arange(len(ids))
    segment_ids = torch.zeros(len(ids), dtype=torch.long)
    rows: list[set[int]] = [{0}]  # visible segments of every segment
    frames: list[_Frame] = []
    segment, begin, position = 0, 0, 0  # the open segment, its first index, and that token's position

    for index, event in scan(ids, tags):
        if event is Event.TEXT:
            continue
        end = position + index - begin  # position of this tag
        position_ids[begin : index + 1] = torch.arange(position, end + 1)
        segment_ids[begin : index + 1] = segment
        if event is Event.FORK:
            frames.append(_Frame(end, segment))
        else:
            frames[-1].last_segments.append(segment)
            frames[-1].max_position = max(frames[-1].max_position, end)
        frame = frames[-1]
        if event is Event.REDUCE:
            seen = set().union(*(rows[s] for s in frame.last_segments))
            position = frame.max_position + 1
            frames.pop()
        else:
            seen = set(rows[frame.goal_segment])
            position = frame.fork_position + 1
        segment = len(rows)
        rows.append(seen | {segment})
        begin = index + 1
    position_ids[begin:] = torch.arange(position, position + len(ids) - begin)
    segment_ids[begin:] = segment

    visible = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for query, seen in enumerate(rows):
        visible[query, list(seen)] = True
    return Layout(position_ids, segment_ids, visible)


_PLAIN: contextvars.ContextVar[bool] = contextvars.ContextVar(f"{__name__}.plain", default=False)


@contextlib.contextmanager
def plain_layout() -> Iterator[None]:
    """Have tags be text inside the context: every row is read as by the base class. For ``structure="off"``."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Return whether tags are text here, inside :func:`plain_layout`."""
    return _PLAIN.get()
