"""The files that ``multiverse view`` reads: any result of this package, a dataset's row, or a bare document."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from multiverse_hf.batch.rows import Folder
from multiverse_hf.data.records import RowError, is_encodable, number_rows
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.evaluation.samples import read_samples

TABLES = (".jsonl", ".json", ".parquet", ".csv")
# Engine's counts of an answer, in the order in which people read them.
ENGINE_COUNTS = (
    "num_tokens",
    "length",
    "parallelism",
    "num_steps",
    "num_forks",
    "max_width",
    "depth",
    "finish_reason",
)
_JSON = re.compile(r'\s*(?:\{\s*["}]|\[\s*[\[{"\]])')
_FORMS = "a result of multiverse generate or eval, a row with prompt and document, or a document as text"


@dataclass(frozen=True, slots=True)
class ViewedResult:
    """One document and what is known about it.

    Attributes:
        source: the file or folder it came from.
        title: its name in the file.
        document: the text with its tags; empty for a row that could not be answered.
        prompt: the prompt as text; None for a bare document.
        messages: the prompt as chat messages, where the row has it so.
        key: results of one problem have one key; None for a bare document.
        facts: model, answer and verdict, as far as the row has them.
        counts: what the engine counted, by the names of ``GenerationStats``.
        error: why there is no document.
    """

    source: str
    title: str
    document: str
    prompt: str | None = None
    messages: Sequence[Mapping[str, str]] = ()
    key: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def find_results(
    sources: Sequence[str], line: int | None = None, row_id: str | None = None, limit: int = 20
) -> tuple[list[ViewedResult], bool]:
    """Read results from files and folders. From several sources, those of the first one's problems.

    Args:
        sources: files or folders; ``-`` is standard input.
        line: only this line of a JSONL file, or row of a table.
        row_id: only rows with this id.
        limit: most results of each source.

    Returns:
        The results, those of one problem next to each other; and whether a source has more.

    Raises:
        CommandError: if a source cannot be read, or has no such row.
    """
    first, *others = sources
    found, has_more = _read_source(first, line, row_id, limit)
    keys = {result.key for result in found} - {None}
    for source in others:
        results, more = _read_source(source, line, row_id, limit, keys)
        found, has_more = found + results, has_more or more
    order: dict[str | None, int] = {}
    for result in found:
        order.setdefault(result.key, len(order))
    return sorted(found, key=lambda result: order[result.key]), has_more


def _read_source(
    source: str, line: int | None, row_id: str | None, limit: int, keys: set[str | None] = frozenset()
) -> tuple[list[ViewedResult], bool]:
    rows = _wanted(source, line, row_id)
    if keys:
        every = list(rows)
        shared = [result for result in every if result.key in keys]
        found = (shared or every)[: limit + 1]
    else:
        found = list(islice(rows, limit + 1))
    name = "standard input" if source == "-" else source
    if not found and (line is not None or row_id is not None):
        wanted = f"line or row {line}" if row_id is None else f"row with id {row_id!r}"
        raise CommandError(f"{name} has no {wanted}; leave the option out to see the first rows")
    if not found:
        raise CommandError(f"{name} holds no rows; give {_FORMS}")
    return found[:limit], len(found) > limit


def _wanted(source: str, line: int | None, row_id: str | None) -> Iterator[ViewedResult]:
    for number, row in _number_rows(source):
        if line is not None and number != line:
            continue
        if row_id is not None and not (isinstance(row, Mapping) and str(row.get("id")) == row_id):
            continue
        yield result_of_row(row, source, number)


def _number_rows(source: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a source with their numbers from 1. A bare document is its text.

    Raises:
        CommandError: if the source cannot be read.
    """
    if source == "-":
        yield from _read_text("standard input", sys.stdin.buffer.read())
        return
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            if (path / "comparison.json").is_file():
                raise CommandError(f"{path} is a comparison; name the folders of its two runs instead")
            for folder in (path / "samples", path):
                if (folder / "unfinished.jsonl").is_file() or any(folder.glob("[0-9]*.parquet")):
                    yield from enumerate(map(asdict, read_samples(folder)), start=1)
                    return
            if (path / Folder.result_name).is_file():
                path = path / Folder.result_name
        elif path.is_file() and path.suffix not in TABLES:
            yield from _read_text(source, path.read_bytes())
            return
        elif not path.exists():
            raise CommandError(f"no file or folder {one_line(source, 80)}; give {_FORMS}")
        yield from number_rows(str(path))
    except OSError as err:
        raise CommandError(f"cannot read {one_line(source, 80)}: {err.strerror or err}; check the path") from err
    except ValueError as err:
        raise CommandError(f"{one_line(err)}; give {_FORMS}") from err


def _read_text(name: str, data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a text: JSON, JSON lines, or one document."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise CommandError(f"{name} is not UTF-8 text ({err.reason} at byte {err.start}); convert it") from err
    if not text.strip():
        raise CommandError(f"{name} is empty; give {_FORMS}")
    if not _JSON.match(text):
        yield 1, text
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        if len(lines) < 2 or not isinstance(err, json.JSONDecodeError) or err.msg != "Extra data":
            raise CommandError(f"{name} is no JSON: {one_line(err)}; write it again, it may be cut off") from err
        for number, line in lines:
            try:
                yield number, json.loads(line)
            except ValueError as wrong:
                raise CommandError(f"{name}, line {number} is no JSON: {one_line(wrong)}; mend the line") from wrong
        return
    yield from enumerate(value if isinstance(value, list) else [value], start=1)


def result_of_row(row: Any, source: str, number: int = 1) -> ViewedResult:
    """Read one row: a result of a model, a row of a dataset, or the text of a document.

    Raises:
        CommandError: if it holds no document.
    """
    name = "standard input" if source == "-" else source
    place = f"{name}, row {number}"
    if isinstance(row, RowError):
        raise CommandError(f"{name}: {one_line(row)}; mend the line")
    if isinstance(row, str):
        return _checked(ViewedResult(name, Path(name).name, row.replace("\r\n", "\n")), name)
    if not isinstance(row, Mapping):
        raise CommandError(f"{place} is {json.dumps(row, default=str):.40}, not an object; give {_FORMS}")
    given = {name: value for name, value in row.items() if value is not None}
    prompt, messages, document = _prompt_and_document(given)
    error = given.get("error")
    if error is None and (not isinstance(document, str) or not document.strip()):
        columns = ", ".join(map(str, given)) or "none"
        raise CommandError(f"{place} has no document; found the columns {one_line(columns, 80)}; give {_FORMS}")
    stats = given.get("stats") if isinstance(given.get("stats"), Mapping) else given
    facts = {"gold": given.get("gold"), "model": given.get("model"), "seconds": given.get("seconds")}
    facts |= {"answer": given.get("answer"), "correct": given.get("correct"), "score": given.get("score")}
    row_id = given.get("id")
    titles = [str(given[name]) for name in ("task", "id") if name in given] or [f"{Path(name).name}, row {number}"]
    if "sample" in given:
        titles.append(f"answer {int(given['sample']) + 1}")
    if row_id is not None:
        key = json.dumps([str(given.get("task", "")), str(row_id)])
    else:
        key = None if prompt is None else Suffix.PARALLEL.exchange(prompt)
    return _checked(
        ViewedResult(
            name,
            " ".join(titles),
            document.replace("\r\n", "\n") if isinstance(document, str) else "",
            prompt,
            messages,
            key,
            {name: value for name, value in facts.items() if isinstance(value, str | int | float)},
            {name: stats[name] for name in ENGINE_COUNTS if isinstance(stats.get(name), str | int | float)},
            None if error is None else one_line(str(error)),
        ),
        place,
    )


def _prompt_and_document(row: Mapping[str, Any]) -> tuple[str | None, Sequence[Any], Any]:
    """Return the prompt as text and as messages, and the document, of a row of any of our forms."""
    document = row.get("document", row.get("completion"))
    messages = row.get("prompt", row.get("messages", row.get("problem")))
    if document is None and _is_chat(row.get("messages")) and row["messages"][-1].get("role") == "assistant":
        *messages, last = row["messages"]
        document = last.get("content")
    if _is_chat(document):
        document = document[-1].get("content")
    if not _is_chat(messages):
        return messages if isinstance(messages, str) else None, (), document
    texts = [str(message.get("content", "")) for message in messages]
    roles = [str(message.get("role", "")) for message in messages]
    alone = roles == ["user"]
    prompt = "\n\n".join(text if alone else f"{role}: {text}" for role, text in zip(roles, texts, strict=True))
    return prompt, messages, document


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def _checked(result: ViewedResult, place: str) -> ViewedResult:
    if not all(is_encodable(text) for text in (result.document, result.prompt or "")):
        raise CommandError(f"{place} holds half of a character (a lone surrogate); write it whole")
    return result
