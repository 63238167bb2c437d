"""Traces: the input of the curator, read from rows with any columns."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiverse_hf.data.records import Reason, RowError, is_encodable, number_rows, open_table
from multiverse_hf.modeling.tags import MULTIVERSE, read_messages

# Usual names of columns in search order, including those of s1K-1.1.
TRACE_COLUMNS = {
    "id": ("id", "unique_id", "uuid"),
    "prompt": ("prompt", "question", "problem"),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "trace", "deepseek_thinking_trajectory"),
    "answer": ("answer", "deepseek_attempt", "completion", "response"),
}
# Markers that chat templates and tokenizers write between turns: left over from a raw transcript.
_MARKER = re.compile(
    r"<[|｜][^|｜<>\n]{1,60}[|｜]>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:start|end)_of_turn>|"
    r"<\|?(?:bos|eos|pad)\|?>|</?s>|</?think(?:ing)?>",
    re.IGNORECASE,
)
_OPENS_THOUGHT = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)
_ENDS_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Trace:
    """A sequential answer with its reasoning, as a model wrote it.

    Attributes:
        number: number of the row in its source, from 1: a line of a JSONL file.
        id: the row's id, else its number.
        prompt: the problem.
        reasoning: the text to curate, without tags around it.
        answer: the text after the reasoning, None if there is none.
    """

    number: int
    id: str
    prompt: str
    reasoning: str
    answer: str | None = None


def read_traces(
    source: str,
    columns: Mapping[str, str],
    subset: str | None = None,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[int, Trace | RowError]]:
    """Yield every ``world_size``-th row of a source with its number, from ``rank`` on.

    Args:
        source, subset, split: as :func:`~multiverse_hf.data.records.number_rows` takes them.
        columns: names of columns that are not in :data:`TRACE_COLUMNS`.
        rank, world_size: select the rows; others are not parsed.

    Raises:
        ValueError: if the source cannot be read.
    """
    for number, row in number_rows(source, subset, split, rank, world_size):
        try:
            yield number, read_trace(number, row, columns)
        except RowError as err:
            yield number, err


def count_rows(source: str, subset: str | None = None, split: str = "train") -> tuple[int, str]:
    """Count the rows of a source.

    Returns:
        The number of rows, and a file's SHA-256 or a dataset's fingerprint.

    Raises:
        ValueError: if the source cannot be read.
    """
    path = Path(source).expanduser()
    if not path.is_file() or path.suffix == ".parquet":
        table = open_table(source, subset, split)
        return len(table), str(table._fingerprint)
    rows, digest = 0, hashlib.sha256()
    try:
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                rows += bool(line.strip())
    except OSError as err:
        raise ValueError(f"cannot read {source}: {err.strerror or err}") from err
    if path.suffix != ".jsonl":
        rows = sum(1 for _ in number_rows(source))
    return rows, digest.hexdigest()


def read_trace(number: int, row: Any, columns: Mapping[str, str]) -> Trace:
    """Return the trace of a row.

    The reasoning has its own column, or stands between ``<think>`` tags before the answer. The answer is in a column,
    or in the last of ``messages``.

    Raises:
        RowError: if a text is missing or no text, or the reasoning contains a control tag.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(Reason.UNREADABLE, "a row is an object with columns")
    prompt, reasoning, answer = (_text(row, name, columns) for name in ("prompt", "reasoning", "answer"))
    if prompt is None and row.get("messages") is not None:
        prompt, answer = _last_exchange(row["messages"])
    if reasoning is None and answer is not None and (thought := _THOUGHT.fullmatch(answer)):
        reasoning, answer = thought[1], thought[2]
    for name, value in (("prompt", prompt), ("reasoning", reasoning)):
        if value is None or not value.strip():
            there = ", ".join(map(str, (key for key, each in row.items() if each is not None))) or "none"
            raise RowError(Reason.COLUMNS, f"no text for the {name} (columns: {there}); name its column in `columns`")
    reasoning, answer = _cut_thought(reasoning, answer)
    for name, value in (("reasoning", reasoning), ("answer", answer or "")):
        if tag := next((tag for tag in MULTIVERSE.tokens if tag in value), None):
            raise RowError(Reason.MALFORMED, f"the {name} contains the control tag {tag}")
        if marker := _MARKER.search(value):
            raise RowError(
                Reason.MALFORMED, f"the {name} holds {marker[0]}, which separates turns or thinking; clean the trace"
            )
    row_id = row.get(
        columns.get("id") or next((name for name in TRACE_COLUMNS["id"] if row.get(name) is not None), "id")
    )
    name = str(row_id) if isinstance(row_id, str | int) and str(row_id).strip() else str(number)
    if not all(map(is_encodable, (name, prompt, reasoning, answer or ""))):
        raise RowError(Reason.UNREADABLE, "half a character (a lone surrogate) in the text or the id")
    return Trace(number, name, prompt.strip(), reasoning, answer.strip() or None if answer else None)


def _cut_thought(reasoning: str, answer: str | None) -> tuple[str, str | None]:
    """Return the reasoning without tags, and the answer: by default the text after ``</think>``."""
    if opened := _OPENS_THOUGHT.match(reasoning):
        reasoning = reasoning[opened.end() :]
    if ended := _ENDS_THOUGHT.search(reasoning):
        rest = reasoning[ended.end() :].strip()
        reasoning, answer = reasoning[: ended.start()], answer if answer is not None or not rest else rest
    return reasoning.strip(), answer


def _text(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> str | None:
    """Return the text of a column, by its given name or the first usual one that the row has."""
    names = (columns[name],) if name in columns else TRACE_COLUMNS[name]
    value = next((row[each] for each in names if row.get(each) is not None), None)
    if name == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    if value is not None and not isinstance(value, str):
        raise RowError(Reason.COLUMNS, f"the {name} must be text, got {type(value).__name__}")
    return value


def _last_exchange(messages: Any) -> tuple[str, str]:
    """Return the user's last message and the assistant's answer to it."""
    try:
        chat = read_messages(messages, "messages")
    except (TypeError, ValueError) as err:
        raise RowError(Reason.COLUMNS, str(err)) from err
    if len(chat) < 2 or (chat[-2]["role"], chat[-1]["role"]) != ("user", "assistant"):
        raise RowError(Reason.COLUMNS, "messages must end with one of the user and the assistant's answer to it")
    return chat[-2]["content"], chat[-1]["content"]
