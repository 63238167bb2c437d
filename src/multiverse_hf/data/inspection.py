"""How training reads a row: segments, positions, visibility and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from multiverse_hf.data.collation import row_layout
from multiverse_hf.data.records import Form, Record
from multiverse_hf.data.rows import IGNORE, RowEncoder, TokenKind
from multiverse_hf.modeling.grammar import Event, Structure


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Adjacent tokens of one kind in a segment.

    Attributes:
        part: "prompt" and "forced" tokens have no label, "label" tokens are learnt.
        start, stop: indices into the row.
        position: position of the first token.
    """

    part: str
    start: int
    stop: int
    position: int
    text: str


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Tokens with consecutive positions that see the same segments.

    Attributes:
        name: "prompt, goal", "path 1" or "after 1 to 2".
        sees: numbers of the segments that it attends to, including its own.
    """

    name: str
    sees: list[int]
    runs: list[TokenRun]

    @property
    def num_tokens(self) -> int:
        return self.runs[-1].stop - self.runs[0].start

    @property
    def positions(self) -> tuple[int, int]:
        """First and last position."""
        return self.runs[0].position, self.runs[0].position + self.num_tokens - 1


@dataclass(frozen=True, slots=True)
class ReadRow:
    """A row as the trainer reads it.

    Attributes:
        length: number of positions including the prompt's: the critical path.
        was_cut: the row was longer than the encoder's ``max_length``.
    """

    form: Form
    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    segment_ids: list[int]
    length: int
    was_cut: bool
    segments: list[RowSegment]

    @property
    def num_labels(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def read_row(record: Record, encoder: RowEncoder, form: Form) -> ReadRow:
    """Encode a record and lay it out, as training does.

    Raises:
        RowError: as :meth:`~.rows.RowEncoder.encode`.
    """
    form = record.form or form
    row = encoder.encode(record, form)
    ids, labels, layout = row["input_ids"], row["labels"], row_layout(row, encoder.tags)
    positions, segment_ids = layout.position_ids.tolist(), layout.segment_ids.tolist()
    parts = [
        "prompt" if kind is TokenKind.PROMPT else "forced" if label == IGNORE else "label"
        for kind, label in zip(row["kinds"], labels, strict=True)
    ]
    names = ["all of it"] if len(layout.visible) == 1 else _names(ids, encoder)
    segments = []
    for number, name in enumerate(names):
        indices = [index for index, segment in enumerate(segment_ids) if segment == number]
        runs = []
        for part, group in groupby(indices, key=lambda index: parts[index]):
            start, *rest = group
            stop = (rest or [start])[-1] + 1
            text = encoder.tokenizer.decode(ids[start:stop], skip_special_tokens=False)
            runs.append(TokenRun(part, start, stop, positions[start], text))
        if runs:  # a row that ends with a path has no tokens after it
            segments.append(RowSegment(name, layout.visible[number].nonzero().flatten().tolist(), runs))
    was_cut = row["full_length"] > len(ids)
    return ReadRow(form, ids, labels, positions, segment_ids, layout.length, was_cut, segments)


def _names(ids: Sequence[int], encoder: RowEncoder) -> list[str]:
    """Return the name of each segment of a row, from the labels of its paths."""
    structure, names, closed = Structure(encoder.tags), ["prompt, goal"], []
    for token in ids:
        open_labels = structure.labels[-1] if structure.labels else []
        event = structure.feed(token)
        if event is Event.REDUCE:
            closed = [_label(label, encoder.tokenizer) for label in open_labels]
            names.append(f"after {closed[0]} to {closed[-1]}" if len(closed) > 1 else f"after {closed[0]}")
        elif event is not Event.TEXT:
            at = structure.open_blocks[-1].path
            names.append(f"path {_label(structure.labels[-1][at], encoder.tokenizer)}")
    return names


def _label(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids).strip().rstrip(":")
