"""From rows of a dataset to what a trainer reads, with a report of what was dropped and why."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.data.curriculum import Choice
from multiverse_hf.data.records import Form, Record, RowError, read_record
from multiverse_hf.data.rows import RowEncoder


@dataclass
class RowReport:
    """What became of the rows of a dataset."""

    num_rows: int = 0
    num_cut: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        """Rows that are trained on."""
        return self.num_rows - len(self.dropped)

    def drop(self, row: Any, error: RowError) -> None:
        """Count a row out."""
        name = row.get("id") if isinstance(row, dict) else None
        entry = {"row": self.num_rows - 1} | ({} if name is None else {"id": name})
        self.dropped.append(entry | {"reason": str(error.reason), "detail": error.detail})

    def summary(self) -> dict[str, Any]:
        """Give the counts, by reason."""
        reasons = Counter(entry["reason"] for entry in self.dropped)
        counts = {"rows": self.num_rows, "kept": self.num_kept, "dropped": dict(reasons.most_common())}
        return counts | ({"cut": self.num_cut} if self.num_cut else {})

    def lines(self) -> str:
        """Give what was dropped as JSON lines: the row's number from 0, its id, the reason and the detail."""
        return "".join(json.dumps(entry, default=str) + "\n" for entry in self.dropped)


@dataclass
class TrainingRows:
    """Encoded rows, and where the forms of each record stand among them."""

    records: list[Record] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    report: RowReport = field(default_factory=RowReport)

    def describe(self) -> str:
        """Say in a line what the kept rows are like."""
        blocks = [block for record in self.records for block, _ in record.document.blocks()]
        with_blocks = sum(record.document.num_paths > 0 for record in self.records)
        lengths = sorted(max(choice.parallel_length, choice.sequential_length) for choice in self.choices)
        widths = [len(block.paths) for block in blocks]
        depth = max((record.document.depth for record in self.records), default=0)
        what = f"{min(widths)} to {max(widths)} paths a block, {depth} deep at most" if blocks else "no block at all"
        return (
            f"{with_blocks} of {len(lengths)} rows have blocks ({what}); median {lengths[len(lengths) // 2]} tokens, "
            f"{lengths[-1]} at most"
        )


def build_rows(
    source: Iterable[Any], encoder: RowEncoder, forms: Sequence[Form], system_prompt: str | None = None
) -> TrainingRows:
    """Encode every row in each form that is asked for. A row that one form fails is dropped, with the reason; so is
    one whose parallel form fails, whatever is asked for: a baseline reads the rows of the model it is compared with.

    Args:
        source: rows as :func:`~.records.load_rows` gives them, or :class:`~.records.Record` objects.
        encoder: turns records into ids and labels.
        forms: the forms that some epoch reads: ``PARALLEL``, ``SEQUENTIAL``, or both in this order.
        system_prompt: said before a chat that has no system message of its own.
    """
    built = TrainingRows()
    for row in source:
        built.report.num_rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            record = row if isinstance(row, Record) else read_record(row, encoder.tags.names, system_prompt)
            read_in = [record.form] if record.form else forms
            encoded = [encoder.encode(record, form) for form in read_in]
            if not record.form and Form.PARALLEL not in forms:
                encoder.encode(record, Form.PARALLEL)  # too long for the parallel model: the baseline does not read it
        except RowError as err:
            built.report.drop(row, err)
            continue
        first, last = len(built.rows), len(built.rows) + len(encoded) - 1  # the same where there is one form
        lengths = [len(each["input_ids"]) for each in encoded]
        built.choices.append(Choice(first, last, lengths[0], lengths[-1]))
        was_cut = [each.pop("full_length") > len(each["input_ids"]) for each in encoded]
        built.report.num_cut += any(was_cut)
        built.rows += encoded
        built.records.append(record)
    return built
