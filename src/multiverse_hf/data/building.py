"""From rows of a dataset to the rows of a trainer, with a report of dropped and doubtful rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.data.curriculum import Choice
from multiverse_hf.data.records import Form, Record, RowError, read_record
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.data.suffixes import Suffix

_SHOWN = 5  # rows of each kind that are printed; the file has all of them


@dataclass
class RowReport:
    """Counts of a dataset's rows, and the rows that were dropped or are doubtful.

    Attributes:
        unit: what a row's number counts, from 1: "line" of a JSONL file, or "row".
        dropped, doubtful: each row's number, id if it has one, reason and detail.
    """

    num_rows: int = 0
    num_cut: int = 0
    dropped: list[dict[str, Any]] = field(default_factory=list)
    doubtful: list[dict[str, Any]] = field(default_factory=list)
    unit: str = "row"

    @property
    def num_kept(self) -> int:
        """Rows that are trained on."""
        return self.num_rows - len(self.dropped)

    @property
    def bad(self) -> list[dict[str, Any]]:
        """Dropped and doubtful rows, in the order of the dataset."""
        return sorted([*self.dropped, *self.doubtful], key=lambda entry: entry[self.unit])

    def drop(self, number: int, row: Any, error: RowError) -> None:
        """Record a dropped row."""
        self.dropped.append(
            self._entry(number, row, str(error.reason), error.detail.removeprefix(f"line {number} is "))
        )

    def doubt(self, number: int, row: Any, detail: str) -> None:
        """Record a row that is kept but may be wrong."""
        self.doubtful.append(self._entry(number, row, "doubtful", detail))

    def _entry(self, number: int, row: Any, reason: str, detail: str) -> dict[str, Any]:
        name = row.get("id") if isinstance(row, Mapping) else None
        return {self.unit: number} | ({} if name is None else {"id": name}) | {"reason": reason, "detail": detail}

    def summary(self) -> dict[str, Any]:
        """Return the counts, by reason."""
        reasons = Counter(entry["reason"] for entry in self.dropped)
        counts = {"rows": self.num_rows, "kept": self.num_kept, "dropped": dict(reasons.most_common())}
        return counts | self._others()

    def _others(self) -> dict[str, int]:
        return {name: count for name, count in (("cut", self.num_cut), ("doubtful", len(self.doubtful))) if count}

    def lines(self, entries: Sequence[Mapping[str, Any]]) -> str:
        """Return entries as JSON lines."""
        return "".join(json.dumps(entry, default=str) + "\n" for entry in entries)

    def describe(self) -> str:
        """Return the counts and the first dropped and doubtful rows, one per line."""
        counts = {"kept": self.num_kept, "dropped": len(self.dropped)} | self._others()
        lines = [", ".join([f"{self.num_rows} rows read", *(f"{count} {what}" for what, count in counts.items())])]
        for entries, what in ((self.dropped, "dropped"), (self.doubtful, "doubtful")):
            lines += [f"  {self.name(entry)}: {_shorten(entry)}" for entry in entries[:_SHOWN]]
            lines += [f"  and {len(entries) - _SHOWN} more {what}"] if len(entries) > _SHOWN else []
        return "\n".join(lines)

    def name(self, entry: Mapping[str, Any]) -> str:
        """Return a row's name for people: ``line 3 (id a)``."""
        return f"{self.unit} {entry[self.unit]}" + (f" (id {entry['id']})" if "id" in entry else "")


def _shorten(entry: Mapping[str, Any]) -> str:
    text = " ".join(f"{entry['reason']}: {entry['detail']}".split())
    return text if len(text) <= 200 else text[:197] + "..."


@dataclass
class TrainingRows:
    """Encoded rows, and for each record the indices of its forms among them."""

    records: list[Record] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    report: RowReport = field(default_factory=RowReport)

    def describe(self) -> str:
        """Return one line about the blocks and lengths of the kept rows."""
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

    def columns(self, places: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Return the collator's columns, of all rows or of the rows at ``places``."""
        rows = self.rows if places is None else [self.rows[at] for at in places]
        return {name: [row[name] for row in rows] for name in ("input_ids", "labels", "kinds", "plain")}

    def hold_out(self, count: int) -> tuple["TrainingRows", "TrainingRows"]:
        """Split the last ``count`` records off, for evaluation.

        Raises:
            ValueError: if nothing is left to train on.
        """
        at = len(self.records) - count
        if at < 1:
            raise ValueError(
                f"eval_rows holds out {count} of {len(self.records)} rows; add rows to train on, or give eval_rows 0 "
                "and eval_strategy no"
            )
        first, last = (
            TrainingRows(self.records[part], self.rows, self.choices[part], self.report)
            for part in (slice(at), slice(at, None))
        )
        return first, last


@dataclass
class _Repeats:
    """Finds rows that repeat the prompt or the document of an earlier row."""

    unit: str
    prompts: dict[bytes, int] = field(default_factory=dict)
    documents: dict[bytes, int] = field(default_factory=dict)

    def find(self, number: int, record: Record) -> str | None:
        """Return how a row repeats an earlier one, None if it does not."""
        chat = [
            (message["role"], " ".join(Suffix.PARALLEL.exchange(message["content"]).split()))
            for message in record.messages
        ]
        prompt, document = (
            hashlib.blake2b(text.encode(), digest_size=16).digest()
            for text in (json.dumps(chat), record.document.render())
        )
        asked, answered = self.prompts.setdefault(prompt, number), self.documents.setdefault(document, number)
        if number == asked == answered:
            return None
        if asked == answered:
            return f"repeats the prompt and the document of {self.unit} {asked}"
        if asked != number:
            return f"repeats the prompt of {self.unit} {asked}, with another document"
        return f"repeats the document of {self.unit} {answered}, under another prompt"


def build_rows(
    source: Iterable[tuple[int, Any]],
    encoder: RowEncoder,
    forms: Sequence[Form],
    system_prompt: str | None = None,
    unit: str = "row",
) -> TrainingRows:
    """Encode every row in each form that is asked for.

    A row is dropped with its reason if one of its forms fails. It is also dropped if its parallel form fails, even if
    only the sequential form is asked for: a baseline reads the same rows as the model it is compared with.

    Args:
        source: rows with their numbers, as :func:`~.records.number_rows` yields them, or :class:`~.records.Record`
            objects, which are never doubtful.
        encoder: turns records into ids and labels.
        forms: the forms that some epoch reads: ``PARALLEL``, ``SEQUENTIAL``, or both in this order.
        system_prompt: system message for chats that have none.
        unit: what the numbers count: "line" or "row".
    """
    built = TrainingRows(report=RowReport(unit=unit))
    repeats = _Repeats(unit)
    for number, row in source:
        built.report.num_rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            record = row if isinstance(row, Record) else read_record(row, encoder.tags.names, system_prompt)
            read_in = [record.form] if record.form else forms
            encoded = [encoder.encode(record, form) for form in read_in]
            if not record.form and Form.PARALLEL not in forms:
                encoder.encode(record, Form.PARALLEL)  # a row too long for the parallel model is none for the baseline
        except RowError as err:
            built.report.drop(number, row, err)
            continue
        doubts = [] if isinstance(row, Record) else [record.doubt, repeats.find(number, record)]
        if found := "; ".join(filter(None, doubts)):
            built.report.doubt(number, row, found)
        first, last = len(built.rows), len(built.rows) + len(encoded) - 1  # equal if there is one form
        lengths = [len(each["input_ids"]) for each in encoded]
        built.choices.append(Choice(first, last, lengths[0], lengths[-1]))
        was_cut = [each.pop("full_length") > len(each["input_ids"]) for each in encoded]
        built.report.num_cut += any(was_cut)
        built.rows += encoded
        built.records.append(record)
    return built
