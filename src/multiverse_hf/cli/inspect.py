"""``multiverse inspect``: show how the trainer reads a row."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from multiverse_hf.checkpoints import EMBEDDED, EMBEDDED_NAMES, gguf_reason, quiet
from multiverse_hf.cli.display import CONTROLS
from multiverse_hf.cli.options import JsonOption, TracebackOption, print_json
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.data.records import Form, Record, RowError, number_rows, read_record
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.modeling.gguf_files import split_path

if TYPE_CHECKING:  # it imports torch
    from multiverse_hf.data.inspection import ReadRow, RowSegment

STYLES = {"prompt": "dim", "forced": "yellow", "label": "green"}
_INDENT = 20  # columns before the text of a run


def inspect(
    row: Annotated[
        str,
        typer.Argument(
            metavar="ROW|FILE", help="A row as JSON, a file of rows or a dataset; - reads a row from standard input."
        ),
    ],
    line: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Line of a JSONL file, or row of a table; by default the first."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="PATH", help="Model with the tokenizer; by default multiverse-tiny."),
    ] = None,
    form: Annotated[Form, typer.Option(metavar="FORM", help="parallel, sequential or plain.")] = Form.PARALLEL,
    max_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most tokens, like max_length of the recipe.")
    ] = None,
    suffix: Annotated[bool, typer.Option(help="End the prompt with the sentence of record of the form.")] = True,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show how training reads a row: segments, positions, what each segment sees, and which tokens have a label.

    \b
    Examples:
      multiverse inspect recipes/own-documents/documents.jsonl --line 2
      multiverse inspect my-documents.jsonl --model Qwen/Qwen2.5-7B
      multiverse inspect '{"prompt": "Why?", "document": "Because."}' --json
    """
    place, given = find_row(row, line)
    with waiting("loading the tokenizer"):
        quiet()
        from multiverse_hf.data.inspection import read_row
        from multiverse_hf.data.rows import RowEncoder

        tokens = load_tokenizer(model)
        try:
            if isinstance(given, RowError):
                raise given
            record = read_record(given, tokens.tags.names)
            read = read_row(record, RowEncoder(tokens.tokenizer, tokens.tags, max_length, suffix=suffix), form)
        except RowError as err:
            raise CommandError(f"{place}: {one_line(err)}") from err
    name = model or EMBEDDED_NAMES[0]
    if as_json:
        print_json(to_dict(place, name, record, read))
    else:
        draw_row(Console(highlight=False), place, name, record, read)


def find_row(source: str, line: int | None) -> tuple[str, Any]:
    """Return a row that is given as JSON, or that is in a file or dataset.

    Returns:
        The row's name for people, and the row; a :class:`RowError` for a line that is no JSON.

    Raises:
        CommandError: if there is no such row.
    """
    if source == "-" or source.lstrip().startswith(("{", "[")):
        text = sys.stdin.read() if source == "-" else source
        if line is not None:
            raise CommandError(f"--line {line} is of a file, and a row was given; leave it out")
        try:
            return "the row", json.loads(text)
        except (ValueError, RecursionError) as err:
            raise CommandError(
                f"the row is no JSON ({err}): {one_line(text, 60)}; give one object, or a file"
            ) from err
    unit, last = "line" if source.endswith(".jsonl") else "row", 0
    try:
        for number, row in number_rows(source):
            if line is None or number == line:
                return f"{source}, {unit} {number}", row
            if number > line:
                raise CommandError(f"{source}, {unit} {line} is blank; the next row is {unit} {number}")
            last = number
    except ValueError as err:
        raise CommandError(f"{one_line(err)}; give a file of rows, or a row as JSON in quotes") from err
    if last:
        raise CommandError(f"{source} has no {unit} {line}; the last row is {unit} {last}")
    raise CommandError(f"{source} holds no rows; write one JSON object a line")


def load_tokenizer(model: str | None) -> Any:
    """Return a base's tokenizer, with tags added if it lacks them.

    Raises:
        CommandError: if there is no tokenizer that can read rows.
    """
    from multiverse_hf.training.models import load_tokens

    path = EMBEDDED if model is None else Path(model).expanduser()
    if model in EMBEDDED_NAMES and not path.exists():
        path = EMBEDDED.parent / model
    if not path.exists() and (str(split_path(model)[0]).count("/") != 1 or model.startswith((".", "/", "~"))):
        raise CommandError(f"no model folder {model}; give an existing one, or a repository as owner/name")
    try:
        return load_tokens(str(path) if path.exists() else model)
    except Exception as err:  # a checkpoint is input: transformers and the Hub raise errors of their own
        raise CommandError(f"cannot load the tokenizer of {model}: {gguf_reason(err) or one_line(err)}") from err


def to_dict(place: str, model: str, record: Record, read: "ReadRow") -> dict[str, Any]:
    """Return a read row for programs: segments with their runs, and lists for all tokens."""
    segments = [
        {
            "segment": number,
            "name": segment.name,
            "positions": list(segment.positions),
            "tokens": segment.num_tokens,
            "sees": segment.sees,
            "runs": [
                {"part": run.part, "start": run.start, "stop": run.stop, "position": run.position, "text": run.text}
                for run in segment.runs
            ],
        }
        for number, segment in enumerate(read.segments)
    ]
    lists = {name: getattr(read, name) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    counts = {"num_tokens": len(read.input_ids), "num_labels": read.num_labels, "length": read.length}
    return {
        "row": place, "model": model, "form": str(read.form), "doubt": record.doubt, **counts,
        "segments": segments, **lists,
    }  # fmt: skip


def draw_row(console: Console, place: str, model: str, record: Record, read: "ReadRow") -> None:
    """Print a read row for people: each segment with its text, then the visibility of segments."""
    runs = [run for segment in read.segments for run in segment.runs]
    counts = {part: sum(run.stop - run.start for run in runs if run.part == part) for part in STYLES}
    console.print(f"{place}, {read.form} form, tokens of {model}", style="bold")
    console.print(
        f"{len(read.input_ids)} tokens on {read.length} positions: {counts['label']} with a label, {counts['prompt']} "
        f"of the prompt, {counts['forced']} forced (the engine writes them){', cut' if read.was_cut else ''}"
    )
    if record.doubt:
        console.print(f"doubtful: {record.doubt}", style="red")
    for number, segment in enumerate(read.segments):
        console.print()
        for text in segment_lines(console, number, segment):
            console.print(text)
    console.print()
    for text in sight_lines(console, read.segments):
        console.print(text)


def segment_lines(console: Console, number: int, segment: "RowSegment") -> list[Text]:
    """Return the lines of a segment: its heading, and its runs with their text in a column."""
    first, last = segment.positions
    lines = [Text(f"{number} {segment.name}: positions {first}-{last}, sees {ranges(segment.sees)}", "bold")]
    newline = "\\n" if console.options.ascii_only else "⏎"
    for run in segment.runs:
        last = run.position + run.stop - run.start - 1
        head = f"  {run.part:<7}{run.position}-{last}"
        text = CONTROLS.sub("", run.text.replace("\n", f"{newline}\n").expandtabs(4)).removesuffix("\n")
        pieces = [
            piece
            for line in text.split("\n")
            for piece in Text(line, STYLES[run.part]).wrap(console, max(console.width - _INDENT, 20)) or [Text("")]
        ]
        for at, piece in enumerate(pieces):
            lines.append(Text(f"{head if at == 0 else '':<{_INDENT - 1}} ") + piece)
    return lines


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers in short form: ``0 2-5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return " ".join("-".join(map(str, part)) for part in parts)


def sight_lines(console: Console, segments: Sequence["RowSegment"]) -> list[Text]:
    """Return a picture of the segments' visibility, or one line if the terminal is too narrow."""
    names = [f"{number} {segment.name}" for number, segment in enumerate(segments)]
    width, cell = max(map(len, names)) + 2, len(str(len(segments) - 1)) + 1
    if width + cell * len(segments) > console.width:
        return [Text(f"{len(segments)} segments: the picture of who sees whom needs a wider terminal")]
    seen, hidden = ("x", ".") if console.options.ascii_only else ("■", "·")
    lines = [Text(f"{'sees':<{width}}" + "".join(f"{number:>{cell}}" for number in range(len(segments))), "bold")]
    for name, segment in zip(names, segments, strict=True):
        marks = (seen if number in segment.sees else hidden for number in range(len(segments)))
        lines.append(Text(f"{name:<{width}}" + "".join(f"{mark:>{cell}}" for mark in marks)))
    return lines
