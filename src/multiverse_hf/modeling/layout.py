"""The layout contract: position id, segment id and visibility for the tokens of a document (Multiverse Attention).

Training, evaluation and RL lay documents out here. Generation follows the same rules step by step
(:mod:`~.writing`), and tests hold the two to be equal. A block is cut right after ``</Goal>`` and right after each
``</Path>``. All its paths start at one position and never see each other. What follows the last path starts one past
the greatest position that any path reached, and sees them all. It nests and repeats without special cases.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .grammar import IN_GOAL, Event, Scanner
from .tags import TagSet


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
            yield index, scanner.read_tag(token)
        elif token in last and not scanner.open_blocks and scanner.stage not in IN_GOAL:
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
        """Return the dense mask, (L, L) bool, True where the row's token may attend to the column's."""
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
    """Lay out a document, whatever it is: a tag that fits no rule, or a goal that is not closed, is plain text.

    The paths of an unfinished block keep their layout.

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
