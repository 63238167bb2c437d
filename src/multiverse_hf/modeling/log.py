"""The log of an answer, as its tree of segments has it: in what order it is read, and what each entry sees."""

import numpy as np

from .state import Segment, Sequence


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


def log_visibility(sequence: Sequence) -> list[tuple[int, np.ndarray]]:
    """Give every log entry with what it sees, from the tree of segments: to read a whole log again.

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
    return [each for each in seen if each is not None]
