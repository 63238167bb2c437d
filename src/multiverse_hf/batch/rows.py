"""Files of a batch: input rows, parts with the tasks' answers, and the parts merged in the input's order."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import FAILURE, CommandError, one_line
from multiverse_hf.jobs.folders import JobFolder, appending, whole_lines, writing
from multiverse_hf.modeling.tags import read_messages

OWN_FIELDS = ("document", "text", "answer", "stats", "seconds", "model", "error")  # fields of an answer
_QUESTION = ("id", "prompt", "messages")  # null in them means no value
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of the input.

    Attributes:
        number: number of the row from 0, without blank lines.
        line: line of the file, from 1.
        id: the given id, else the line.
        has_id: whether an id was given.
        fields: all other fields, with ``prompt`` or ``messages``.
    """

    number: int
    line: int
    id: str | int
    has_id: bool
    fields: dict[str, Any]

    def question(self, suffix: Suffix) -> str | list[dict[str, str]]:
        """Return the prompt, or the messages with the suffix at the end of the user's last one."""
        if "prompt" in self.fields:
            return suffix.end(self.fields["prompt"].strip())
        messages = [dict(message) for message in self.fields["messages"]]
        for message in reversed(messages):
            if message["role"] == "user":
                message["content"] = suffix.end(message["content"])
                break
        return messages


# The input


def read_prompt_rows(path: Path, digest: Any = None) -> Iterator[PromptRow]:
    """Yield the rows of a file, one JSON object per line. Blank lines are skipped.

    Args:
        path: a UTF-8 file.
        digest: a hashlib object, updated with the file's bytes.

    Raises:
        CommandError: if the file cannot be read, or a row is invalid, with its line.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for line, data in enumerate(file, 1):
                if digest is not None:
                    digest.update(data)
                text = data.removeprefix(BYTE_ORDER_MARK).strip() if line == 1 else data.strip()
                if text:
                    try:
                        yield _read_row(number, line, text)
                    except (ValueError, TypeError, RecursionError) as err:
                        raise CommandError(f"{path}, line {line}: {one_line(err)}") from err
                    number += 1
    except OSError as err:
        raise CommandError(f"cannot read {path}: {err.strerror or err}; check the path") from err


def _read_row(number: int, line: int, data: bytes) -> PromptRow:
    """Return the row of one line.

    Raises:
        ValueError, TypeError: if the row is invalid.
        RecursionError: if it nests too deeply.
    """
    try:
        fields = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_read_float)
    except UnicodeDecodeError as err:
        raise ValueError(f"not UTF-8 text ({err.reason} at byte {err.start}); convert the file") from err
    except json.JSONDecodeError as err:
        raise ValueError(f"not JSON: {err.msg} at column {err.colno}; write one object a line") from err
    if not isinstance(fields, dict):
        raise TypeError(f"holds {json.dumps(fields):.40}, not an object with a prompt")
    if b"\\u" in data:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as err:
            raise ValueError("holds half of a character (a lone surrogate); write it whole") from err
    for name in OWN_FIELDS:
        if name in fields:
            raise ValueError(f"the field {name!r} is a field of the answer; give it another name")
    # Arrow and datasets write null for a field that a row has not
    fields = {name: value for name, value in fields.items() if value is not None or name not in _QUESTION}
    has_id = "id" in fields
    row_id = fields.pop("id", line)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int) or row_id == "":
        raise TypeError(f"the id must be text or an integer, got {json.dumps(row_id):.40}")
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("give it a prompt or messages, and not both")
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        raise TypeError(f"the prompt must be text, got {json.dumps(fields['prompt']):.40}; chats go into messages")
    if "messages" in fields and not isinstance(fields["messages"], list):
        raise TypeError(f"messages must be a list, got {json.dumps(fields['messages']):.40}")
    read_messages(*(fields.get(name) for name in ("prompt", "messages") if name in fields), f"the {_kind(fields)}")
    return PromptRow(number, line, row_id, has_id, fields)


def _kind(fields: dict[str, Any]) -> str:
    return "prompt" if "prompt" in fields else "chat"


def _read_float(text: str) -> float:
    """Return a number; one too large for a float would be written back as Infinity, which is no JSON."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"not JSON that can be written back: {text} is too large for a number; write it as text")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"not JSON: {name} is no JSON value; write null")


def check_input(path: Path) -> tuple[int, str, str | None]:
    """Check a whole input before any work begins.

    Returns:
        How many rows it has; the SHA-256 of its bytes; what ids count where a row has none, None if all have one.

    Raises:
        CommandError: as :func:`read_prompt_rows`, and if there is no row, or two have the same id.
    """
    if path.exists() and not path.is_file():
        raise CommandError(f"{path} is not a file; give --input one: each task reads it, and again later")
    digest = hashlib.sha256()
    lines: dict[str, int] = {}
    counted = None
    for row in read_prompt_rows(path, digest):
        counted = counted if row.has_id else "line"
        # as text: 7 and "7" are one id to most who read the answers
        first = lines.setdefault(str(row.id), row.line)
        if first != row.line:
            raise CommandError(f"{path}, line {row.line}: id {row.id!r} is that of line {first} too; ids are unique")
    if not lines:
        raise CommandError(f"{path} holds no rows; write one JSON object with a prompt a line")
    return len(lines), digest.hexdigest(), counted


def read_unchanged(path: Path, digest: str) -> Iterator[PromptRow]:
    """Yield the rows of an input that was checked before.

    Raises:
        CommandError: as :func:`read_prompt_rows`, and at the end if the file has changed.
    """
    now = hashlib.sha256()
    yield from read_prompt_rows(path, now)
    if now.hexdigest() != digest:
        raise CommandError(f"{path} changed after the run began; restore the old file, or begin in another folder")


# The output


class Folder(JobFolder):
    """Paths in the folder of a batch."""

    __slots__ = ()
    result_name = "answers.jsonl"


def finished_rows(part: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Return the rows that a part holds.

    Returns:
        By id as text, the offset and the length of each row's line; and the length of all whole lines. A torn line of
        a killed task comes after them.

    Raises:
        CommandError: if a line is damaged, or a row occurs twice.
    """
    found: dict[str, tuple[int, int]] = {}
    end = 0
    for number, (begin, data) in enumerate(whole_lines(part), 1):
        try:
            row_id = str(json.loads(data)["id"])
        except (ValueError, TypeError, KeyError) as err:
            raise CommandError(f"{part}, line {number} is damaged; delete the line and run again", FAILURE) from err
        if row_id in found:
            raise CommandError(f"{part}, line {number} repeats id {row_id}; delete the line", FAILURE)
        found[row_id] = (begin, len(data))
        end = begin + len(data)
    return found, end


@contextlib.contextmanager
def append_rows(part: Path) -> Iterator[tuple[IO[bytes], set[str]]]:
    """Yield a part opened to append, without a torn line of a killed task, and the ids of its rows."""
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    found, end = finished_rows(part)
    with appending(part, end) as file:
        yield file, set(found)


def merge_answers(folder: Folder, source: Path, digest: str) -> None:
    """Write all rows to one file in the input's order, whole or not at all. A second process waits.

    Args:
        folder: folder in which all parts are complete.
        source, digest: the input.

    Raises:
        CommandError: if a part lacks a row, or the input has changed.
    """
    with folder.lock("merge"):
        if folder.result.exists():
            return
        parts = [folder.part(task) for task in range(folder.tasks)]
        found = [finished_rows(part)[0] for part in parts]
        order = [str(row.id) for row in read_unchanged(source, digest)]
        with writing(folder.result) as file:
            for number, row_id in enumerate(order):
                task = number % folder.tasks
                if row_id not in found[task]:
                    raise CommandError(f"{parts[task]} lacks row {row_id}; delete it and run again", FAILURE)
                begin, length = found[task][row_id]
                with parts[task].open(
                    "rb"
                ) as part:  # opened each time: there may be more parts than open files allowed
                    part.seek(begin)
                    file.write(part.read(length))


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Totals of a finished batch.

    Attributes:
        rows: rows of the input.
        errors: rows that could not be answered.
        first_error: the first error.
        tokens: tokens of all answers.
        parallelism: mean # parallel of the answers; None if there are none.
    """

    rows: int
    errors: int
    first_error: str | None
    tokens: int
    parallelism: float | None


def summarize_answers(answers: Path) -> BatchSummary:
    """Return the totals of a batch."""
    rows = errors = tokens = 0
    parallelism, first_error = 0.0, None
    with answers.open("rb") as file:
        for data in file:
            row = json.loads(data)
            rows += 1
            if row["error"] is not None:
                errors += 1
                first_error = first_error or f"row {row['id']}: {row['error']}"
            else:
                tokens += row["stats"]["num_tokens"]
                parallelism += row["stats"]["parallelism"]
    return BatchSummary(rows, errors, first_error, tokens, parallelism / (rows - errors) if rows > errors else None)
