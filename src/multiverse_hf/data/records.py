"""A user's rows, read and checked, so that one bad row costs that row and not the run.

A row has ``messages`` that end with the assistant's, or a ``prompt`` (text or messages) and a ``document`` (or
``completion``). The ``answer`` may have a column of its own. A document without it is then the reasoning: it is
wrapped in ``<Think>`` if it is not yet, and ``Answer: ...`` follows it, as in Multiverse-1K.
"""

import csv
import glob
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

from multiverse_hf.documents import Document, DocumentError, Text, Think, check, parse_document
from multiverse_hf.modeling.families import MULTIVERSE, Family
from multiverse_hf.modeling.tags import read_messages


class Form(StrEnum):
    """How a record is read. Each form has its sentence of record at the end of the prompt."""

    PARALLEL = "parallel"  # the document, its paths beside each other
    SEQUENTIAL = "sequential"  # the text of its paths, one after the other
    PLAIN = "plain"  # the document as ordinary causal text, every tag chosen by the model


class Reason(StrEnum):
    """Why a row was dropped."""

    UNREADABLE = "unreadable"
    COLUMNS = "wrong columns"
    MALFORMED = "malformed document"
    TEMPLATE = "chat template"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate"


class RowError(ValueError):
    """A row that cannot be trained on, with the kind of reason and the details."""

    def __init__(self, reason: Reason, detail: str) -> None:
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate cannot be printed
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Record:
    """A prompt and the document that answers it, checked.

    Attributes:
        messages: the chat before the answer.
        document: the answer, as a tree.
        form: the only form to read it in; None leaves the form to the epoch.
        doubt: why the row may be wrong, None if there is no doubt.
    """

    messages: tuple[Mapping[str, str], ...]
    document: Document
    form: Form | None = None
    doubt: str | None = None


def read_record(row: Any, names: Family = MULTIVERSE, system_prompt: str | None = None) -> Record:
    """Read a row of a dataset.

    Args:
        row: a mapping with the columns that this module's docstring names; others are ignored.
        names: spelling of the control tags.
        system_prompt: system message for chats that have none.

    Raises:
        RowError: if a column is missing or has the wrong type, or the document is unfit for training.
    """
    if not isinstance(row, Mapping):
        raise RowError(Reason.UNREADABLE, f"a row is an object with columns, got {json.dumps(row, default=str):.60}")
    given = {name: value for name, value in row.items() if value is not None}
    if "messages" in given:
        chat = _messages(given["messages"], "messages")
        if len(chat) < 2 or chat[-1]["role"] != "assistant":
            raise RowError(Reason.COLUMNS, "messages must end with the assistant's answer to another message")
        messages, text = chat[:-1], chat[-1]["content"]
    elif "prompt" in given and ("document" in given or "completion" in given):
        messages = _messages(given["prompt"], "prompt")
        text = _document(given.get("document", given.get("completion")))
    else:
        found = ", ".join(map(str, given)) or "none"
        raise RowError(Reason.COLUMNS, f"needs messages, or prompt and document; found {found}")
    if not text.strip():
        raise RowError(Reason.COLUMNS, "the document is empty")
    if messages[-1]["role"] == "assistant":
        raise RowError(Reason.COLUMNS, "two answers in a row; join them, or put the user's message between them")
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    # models write "\n", and the engine's tokens around paths are found by it
    text = text.replace("\r\n", "\n")
    answer = _answer(given.get("answer"))
    for value in (text, answer or "", *(message["content"] for message in messages)):
        if not is_encodable(value):
            raise RowError(Reason.UNREADABLE, "half a character (a lone surrogate) in the text")
    try:
        for message in messages:
            if message["role"] == "assistant":  # whose tags are control tags as well
                parse_document(message["content"], names)
        document = parse_document(_with_answer(text, answer, names), names)
        check(document)
    except DocumentError as err:
        raise RowError(Reason.MALFORMED, f"at its {err}") from err
    return Record(tuple(messages), document, doubt=_contradiction(parse_document(text, names), answer))


def is_encodable(text: str) -> bool:
    """Return whether a text can be encoded. JSON can hold a lone surrogate, which cannot."""
    return text.encode("utf-8", "replace").decode("utf-8") == text


def _messages(value: Any, column: str) -> list[Mapping[str, str]]:
    try:
        return read_messages(value, column)
    except (TypeError, ValueError) as err:
        raise RowError(Reason.COLUMNS, str(err)) from err


def _document(value: Any) -> str:
    """Return the text of a document column; TRL's conversational format has a list of one message there."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise RowError(Reason.COLUMNS, f"document must be text, got {type(value).__name__}")
    return value


def _answer(value: Any) -> str | None:
    """Return an answer column as text. A table with missing answers holds whole numbers as floats."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(Reason.COLUMNS, f"answer must be text or a number, got {value!r:.40}")
    return str(value)


def _with_answer(text: str, answer: str | None, names: Family) -> str:
    """Return the document with its answer appended, unless it has one."""
    if answer is None or not answer.strip():
        return text
    document = parse_document(text, names)
    has_think = any(isinstance(child, Think) for child in document.children)
    last = document.children[-1]
    says_it = isinstance(last, Text) and last.text.strip() if has_think else read_answer(text) is not None
    if says_it or names.think is None:
        return text
    reasoning = text if has_think else f"{names.open('think')}\n{text.strip()}\n{names.close('think')}"
    return f"{reasoning.rstrip()}\n\nAnswer: {answer.strip()}"


_ANSWER = re.compile(r"^Answer:[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)


def read_answer(text: str) -> str | None:
    """Return the text of a last line ``Answer: ...``, None if there is no such line."""
    match = _ANSWER.search(text)
    return match[1] if match else None


_NUMBER = re.compile(r"(?<![\w.,/])-?\d+(?:\.\d+)?(?![\w/]|[.,]\d)")


def _contradiction(document: Document, answer: str | None) -> str | None:
    """Return how a document contradicts the answer of its row, None if it does not or the two are not comparable.

    The text after ``Answer:``, or outside ``<Think>``, must contain the answer or be a part of it. A document without
    either is compared with whole numbers only, and contradicts them if it ends in others. LaTeX and sentences are not
    compared.
    """
    last = document.children[-1]
    end = last.text.strip() if isinstance(last, Text) else ""
    if not (answer or "").strip() or not end or "\\" in end + answer or len(answer.split()) > 4:
        return None
    said = read_answer(end)
    has_think = any(isinstance(child, Think) for child in document.children)
    ours, theirs = (_plain(text) for text in (answer, said or end))
    if said or has_think:
        agree = _holds(theirs, ours) or _holds(ours, theirs) or _value(ours) == _value(theirs) is not None
    else:
        numbers = _NUMBER.findall(theirs.splitlines()[-1])
        agree = not re.fullmatch(r"-?\d+", ours) or not numbers or ours in numbers
    return None if agree else f"answer is {answer.strip()!r:.60}, and the document ends in {(said or end)[-60:]!r}"


def _plain(text: str) -> str:
    """Return a text without case, dollar signs, stars, backquotes, thousands' commas and a full stop."""
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"[$*`]", "", text)).strip().removesuffix(".").casefold()


def _holds(text: str, part: str) -> bool:
    """Return whether a text contains another as whole words and numbers."""
    return re.search(rf"(?<![\w.,/-]){re.escape(part)}(?![\w/]|[.,]\d)", text) is not None


def _value(text: str) -> Fraction | None:
    """Return the value of a number or a fraction, None for other texts."""
    try:
        return Fraction(text.replace(" ", "").removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None


def number_rows(
    source: str, config: str | None = None, split: str = "train", rank: int = 0, world_size: int = 1
) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a file or dataset with their numbers from 1. The numbers of a JSONL file are its lines.

    A line of a JSONL file that is no JSON is yielded as a :class:`RowError`.

    Args:
        source: a ``.jsonl``, ``.json``, ``.parquet`` or ``.csv`` file, a folder with a dataset, or a dataset's name on
            the Hub.
        config: config of a dataset that has several.
        split: split of a dataset.
        rank, world_size: yield only every ``world_size``-th number, from ``rank + 1`` on.

    Raises:
        ValueError: if there is no such file, dataset, config or split.
    """
    path = Path(source).expanduser()
    readers = {".json": _read_json, ".csv": _read_csv}
    try:
        if path.suffix == ".jsonl" and path.is_file():
            yield from _read_lines(path, rank, world_size)
            return
        if path.suffix in readers and path.is_file():
            for number, row in readers[path.suffix](path):
                if (number - 1) % world_size == rank:
                    yield number, row
            return
    except (OSError, ValueError, RecursionError, csv.Error) as err:
        raise ValueError(f"cannot read {source}: {err}") from err
    table = open_table(source, config, split)
    share = table if world_size == 1 else table.select(range(rank, len(table), world_size))
    try:
        yield from zip(range(rank + 1, len(table) + 1, world_size), share, strict=True)
    except Exception as err:  # as below; a damaged file fails only when it is read
        raise _unreadable(source, err) from err


def open_table(source: str, config: str | None = None, split: str = "train") -> Any:
    """Open a ``.parquet`` file or a dataset, without reading it into memory.

    Raises:
        ValueError: as :func:`number_rows`.
    """
    import datasets

    if not source.strip():
        raise ValueError("the name of the file or dataset is empty")
    path = Path(source).expanduser()
    try:
        is_file = path.is_file()
        if path.suffix == ".parquet" and is_file:
            # datasets reads [, * and ? in a name as a pattern
            return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        if is_file or path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
            known = "a .jsonl, .json, .parquet or .csv file, a folder, or a dataset on the Hub"
            raise ValueError(f"it is none of these: {known}" if is_file else f"no file {source}")
        if path.is_dir() and glob.has_magic(str(path.resolve())):
            raise ValueError("the folder's path holds [, * or ?, which datasets takes for a pattern; rename it")
        return datasets.load_dataset(str(path.resolve()) if path.exists() else source, config, split=split)
    except Exception as err:  # datasets, pyarrow and the Hub's client raise errors of their own
        raise _unreadable(source, err) from err


def _unreadable(source: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return ValueError(f"cannot read the dataset {source}: {reason}")


def _read_lines(path: Path, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield JSON lines. datasets would refuse the whole file for one bad line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (number - 1) % world_size != rank or not line.strip():
                continue
            try:
                yield number, json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as err:
                what = (
                    f"{err.msg.removesuffix(' at')} at column {err.colno}"
                    if isinstance(err, json.JSONDecodeError)
                    else err
                )
                yield number, RowError(Reason.UNREADABLE, f"line {number} is no JSON: {what}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a JSON list, or of JSON lines. datasets would guess types, and read some texts as dates."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = json.loads(text)
    except ValueError:
        yield from _read_lines(path)
        return
    yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield the rows of a table as text: a library that guesses types turns 007 into 7, and 1 into 1.0."""
    csv.field_size_limit(1 << 30)  # a document is a field; the default is 128 kB
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            yield number, {name: value or None for name, value in row.items() if name is not None}
