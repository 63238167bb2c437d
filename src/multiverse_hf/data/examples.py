"""From curated or published rows to the examples of a dataset: checked, each in both its forms.

Three kinds of rows are read. Curated rows have the columns of :mod:`.records` and any ``provenance``. Published rows
have the columns of Multiverse-1K. Rows of s1K-1.1 bring only the sequential form: the original reasoning, for the
examples that answer the same question.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.data.records import Reason, RowError, is_encodable, read_record
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX
from multiverse_hf.documents import Document, DocumentError, Think, check, parse_document
from multiverse_hf.modeling.tags import MULTIVERSE

_THINK, _END_THINK = MULTIVERSE.open("think"), MULTIVERSE.close("think")
PUBLISHED = {
    "prompt": "question",
    "document": "deepseek_thinking_trajectory_parallel",
    "answer": "deepseek_attempt",
    "sequential": "deepseek_thinking_trajectory_sequential",
}
# columns of published rows about a question's origin
_PUBLISHED_PROVENANCE = ("source_type", "cot_type", "metadata", "deepseek_grade")
_S1K = ("question", "deepseek_thinking_trajectory")


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer in both forms, checked.

    Attributes:
        id: unique in its dataset.
        prompt: without a sentence of record.
        document: the parallel answer, as a tree.
        sequential: the sequential answer, as text.
        answer: the answer alone, None where it is not known.
        source: name of the file or dataset that the row comes from.
        sequential_from: origin of the sequential answer: "document", "published" or "s1K-1.1".
        provenance: how the row was made, as JSON with sorted keys.
    """

    id: str
    prompt: str
    document: Document
    sequential: str
    answer: str | None
    source: str
    sequential_from: str
    provenance: str


@dataclass
class ExampleReader:
    """Reads rows of several sources into examples, and keeps a list of dropped rows.

    Attributes:
        dropped: each row's source, line (or number) from 1, id if it has one, reason and detail.
        num_rows: rows read, by source.
    """

    dropped: list[dict[str, Any]] = field(default_factory=list)
    num_rows: Counter[str] = field(default_factory=Counter)
    num_kept: Counter[str] = field(default_factory=Counter)
    _trajectories: dict[str, str] = field(default_factory=dict)  # of s1K-1.1, by question
    _ids: set[str] = field(default_factory=set)
    _contents: set[bytes] = field(default_factory=set)

    def read_trajectories(self, rows: Iterable[tuple[int, Any]], source: str) -> None:
        """Read sequential forms from rows of s1K-1.1. Call this before the examples with these questions are read."""
        for number, row in rows:
            self.num_rows[source] += 1
            try:
                question, trajectory = (_text(row, name) for name in _S1K)
            except RowError as err:
                self._drop(source, number, row, err)
                continue
            self.num_kept[source] += 1
            self._trajectories.setdefault(_key(question), trajectory)

    def read(self, rows: Iterable[tuple[int, Any]], source: str, is_published: bool = False) -> Iterator[Example]:
        """Yield the examples of a source in order. Other rows are dropped, with the reason."""
        for number, row in rows:
            self.num_rows[source] += 1
            try:
                example = self._example(_renamed(row) if is_published else row, source, number)
            except RowError as err:
                self._drop(source, number, row, err)
                continue
            self.num_kept[source] += 1
            yield example

    def dropped_lines(self) -> str:
        """Return the dropped rows as JSON lines."""
        return "".join(json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n" for entry in self.dropped)

    def _drop(self, source: str, number: int, row: Any, error: RowError) -> None:
        entry = {"source": source, "line": number, "reason": str(error.reason), "detail": error.detail}
        if isinstance(row, Mapping) and row.get("id") is not None:
            entry["id"] = str(row["id"]).encode("utf-8", "backslashreplace").decode("utf-8")
        self.dropped.append(entry)

    def _example(self, row: Any, source: str, number: int) -> Example:
        if isinstance(row, RowError):
            raise row
        record = read_record(row)
        if len(record.messages) != 1 or record.messages[0]["role"] != "user":
            raise RowError(
                Reason.COLUMNS, f"needs one message of the user before the answer, got {len(record.messages)}"
            )
        prompt = record.messages[0]["content"]
        prompt = prompt.removesuffix(PARALLEL_SUFFIX).removesuffix(SEQUENTIAL_SUFFIX).rstrip()
        sequential, sequential_from = record.document.sequential(), "document"
        for reasoning, origin in (
            (self._trajectories.get(_key(prompt)), "s1K-1.1"),
            (row.get("sequential"), "published"),
        ):
            if reasoning is not None:
                sequential, sequential_from = _with_reasoning(record.document, reasoning, origin), origin
                break
        provenance = row.get("provenance")
        if isinstance(provenance, str):
            provenance = _parsed(provenance)
        provenance = json.dumps(provenance, ensure_ascii=False, sort_keys=True, default=str)
        name = _id(row.get("id")) or f"{source.rpartition('.')[0] or source}-{number:05d}"
        if any(not is_encodable(text) for text in (name, provenance)):
            raise RowError(Reason.UNREADABLE, "half a character (a lone surrogate) in the id or the provenance")
        content = hashlib.sha256(json.dumps([prompt, record.document.render()]).encode()).digest()
        if name in self._ids:
            raise RowError(Reason.DUPLICATE, f"another row has the id {name}; give each its own")
        if content in self._contents:
            raise RowError(Reason.DUPLICATE, "another row has this prompt and this document")
        self._ids.add(name)
        self._contents.add(content)
        answer = row.get("answer")
        return Example(
            name,
            prompt,
            record.document,
            sequential,
            None if answer is None or not str(answer).strip() else str(answer).strip(),
            source,
            sequential_from,
            provenance,
        )


def _id(value: Any) -> str:
    """Return an id column as text, empty if there is none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(Reason.COLUMNS, f"id must be text or a number, got {value!r:.40}")
    return str(value).strip()


def _renamed(row: Any) -> Any:
    """Return a published row with the columns of a curated one."""
    if not isinstance(row, Mapping):
        return row
    for name in (PUBLISHED["prompt"], PUBLISHED["document"]):
        _text(row, name)
    provenance = {name: row[name] for name in _PUBLISHED_PROVENANCE if row.get(name) is not None}
    renamed = {ours: row.get(theirs) for ours, theirs in PUBLISHED.items()}
    return renamed | {"id": row.get("id"), "provenance": provenance or None}


def _text(row: Any, column: str) -> str:
    """Return the text of a column."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(Reason.UNREADABLE, f"a row is an object with columns, got {json.dumps(row, default=str):.60}")
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(name for name, each in row.items() if each is not None) or "none"
        raise RowError(Reason.COLUMNS, f"needs text in the column {column}; found {found}")
    return value


def _key(question: str) -> str:
    """Return a question's words, which its copies have in common."""
    return " ".join(question.split())


def _parsed(text: str) -> Any:
    """Return provenance that a text column holds as JSON; other text stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_reasoning(document: Document, reasoning: str, origin: str) -> str:
    """Return a document's sequential text with other reasoning. The text after the reasoning stays.

    Raises:
        RowError: if the reasoning contains control tags, or is no text.
    """
    if not isinstance(reasoning, str) or not reasoning.strip():
        raise RowError(Reason.COLUMNS, f"the sequential reasoning ({origin}) must be text")
    text, own = reasoning.strip(), document.sequential()
    if any(isinstance(child, Think) for child in document.children):
        if not text.startswith(_THINK):
            text = f"{_THINK}\n{text}\n{_END_THINK}"
        text += own.partition(_END_THINK)[2]
    try:
        parsed = parse_document(text)
        check(parsed)
    except DocumentError as err:
        raise RowError(Reason.MALFORMED, f"the sequential reasoning ({origin}): {err}") from err
    if parsed.num_paths:
        raise RowError(Reason.MALFORMED, f"the sequential reasoning ({origin}) has blocks; it must have none")
    return text


def split_examples(examples: Sequence[Example], test_share: float, seed: int) -> dict[str, list[Example]]:
    """Split examples into ``train`` and ``test``, in their own order. Examples of one prompt stay together.

    The held-out prompts depend only on the seed and the prompts' texts, not on their order.

    Args:
        examples: at least one.
        test_share: share of prompts to hold out, from 0 to below 1. Above 0 at least one of two or more is held out.
        seed: seed of the choice.
    """
    prompts = {_key(example.prompt) for example in examples}
    count = round(test_share * len(prompts))
    if test_share > 0:
        count = min(max(1, count), len(prompts) - 1)
    drawn = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    held_out = set(drawn[:count])
    return {
        "train": [example for example in examples if _key(example.prompt) not in held_out],
        "test": [example for example in examples if _key(example.prompt) in held_out],
    }
