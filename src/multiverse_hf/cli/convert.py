"""``multiverse convert``: documents of one family in the tags and rules of another."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.cli.options import TracebackOption
from multiverse_hf.data.conversion import ConversionError, convert_document
from multiverse_hf.data.records import RowError, number_rows
from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.errors import FAILURE, CommandError, one_line
from multiverse_hf.modeling.families import Family, read_family
from multiverse_hf.outputs import check_output, write_output

_SHOWN = 5  # rows of each kind that are printed


def convert(
    rows: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows with a document or messages: a file or a dataset.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="JSONL", help="File for the converted rows.")],
    to: Annotated[str, typer.Option(metavar="FAMILY", help="Family to write: see multiverse families.")],
    source: Annotated[str, typer.Option("--from", metavar="FAMILY", help="Family of the rows.")] = "multiverse",
    lossy: Annotated[bool, typer.Option("--lossy", help="Also write rows that lose something.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Write documents of one family in another. A row that would lose something is left out and named.

    Nothing is lost if converting back gives the same document. Other columns of a row are kept.

    \b
    Examples:
      multiverse convert my-documents.jsonl --to npr --output npr.jsonl
      multiverse convert npr.jsonl --from npr --to multiverse --output back.jsonl
      multiverse convert my-documents.jsonl --to parallel-r1 --lossy --output parallel-r1.jsonl
    """
    check_output(output)
    try:
        families = read_family(source), read_family(to)
    except ValueError as err:
        raise CommandError(one_line(err)) from err
    kept: list[str] = []
    left: list[tuple[int, str]] = []
    lost: Counter[str] = Counter()
    try:
        for number, row in number_rows(rows):
            line, reasons = convert_row(row, *families, lossy)
            if line is None:
                left.append((number, "; ".join(reasons)))
            else:
                kept.append(line)
                lost.update(reasons)
    except ValueError as err:
        raise CommandError(one_line(err)) from err
    for number, reason in left[:_SHOWN]:
        print(f"row {number} is left out: {reason}", file=sys.stderr)
    if len(left) > _SHOWN:
        counts = Counter(reason for _, reason in left)
        for reason, count in counts.most_common(_SHOWN):
            print(f"{count} rows are left out: {reason}", file=sys.stderr)
    for reason, count in lost.most_common():
        print(f"{count} rows lost {reason}", file=sys.stderr)
    if not kept:
        what = f"none of its {len(left)} rows can be written in {to}; see above" if left else "it holds no row"
        raise CommandError(f"{rows}: {what}", FAILURE)
    write_output(output, "".join(kept))
    print(f"{output}: {len(kept)} rows in {to}, {len(left)} left out")


def convert_row(row: Any, source: Family, target: Family, lossy: bool) -> tuple[str | None, list[str]]:
    """Return the line of a converted row, None if it is left out, and what is lost or why it is left out."""
    if isinstance(row, RowError):
        return None, [row.detail]
    try:
        text = _find_document(row, {*source.tokens, *target.tokens})
        conversion = convert_document(parse_document(text, source), target)
    except (DocumentError, ConversionError) as err:
        return None, [one_line(err)]
    if conversion.losses and not lossy:
        return None, [f"it would lose {loss}" for loss in conversion.losses]
    try:
        line = json.dumps(_put_document(row, conversion.text), ensure_ascii=False) + "\n"
        line.encode()
    except (TypeError, ValueError) as err:  # a time or bytes of a table, half a character
        return None, [f"it cannot be written as JSON: {one_line(err)}"]
    return line, conversion.losses


def _find_document(row: Any, tags: set[str]) -> str:
    """Return the text of a row's document: the last of its messages, or its column, as the recipes read it."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if messages is None and isinstance(row, dict) and isinstance(row.get("document"), str):
        return row["document"]
    *earlier, last = messages if isinstance(messages, list) and messages else [None]
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise ConversionError("it has no document, and no messages that end with the assistant's")
    for message in earlier:
        if isinstance(message, dict) and message.get("role") == "assistant":
            tag = next((each for each in sorted(tags) if each in str(message.get("content"))), None)
            if tag is not None:
                raise ConversionError(f"an earlier answer of the chat holds {tag}; only the last one is converted")
    return last["content"]


def _put_document(row: dict[str, Any], text: str) -> dict[str, Any]:
    if row.get("messages") is None:
        return {**row, "document": text}
    return {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": text}]}
