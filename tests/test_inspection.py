"""What ``multiverse inspect`` shows of a row is what the trainer is given of it."""

import io
import json
import re

import pytest
from rich.console import Console
from test_recipe import ROOT, block, documents
from test_records import encoder, tokenizer

from multiverse_hf.cli import run
from multiverse_hf.cli.inspect import draw_row, ranges
from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.inspection import read_row
from multiverse_hf.data.records import Form, read_record
from multiverse_hf.data.rows import IGNORE

pytestmark = pytest.mark.usefixtures("unquiet")
OWN = ROOT / "recipes/own-documents/documents.jsonl"
NESTED = documents(1)[0]  # two paths, the first with two of its own, "1.1" and "1.2"


def drawn(row: dict, width: int, form: Form = Form.PARALLEL, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    record = read_record(row)
    draw_row(Console(file=file, width=width), "rows.jsonl, line 1", "tiny", record, read_row(record, encoder(), form))
    file.seek(0)
    return file.read().splitlines()


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("row", [NESTED, {"prompt": "Why?", "document": "Because."}], ids=["nested", "no block"])
def test_segments_labels_and_positions_are_those_of_the_collator(row: dict, form: Form) -> None:
    record = read_record(row)
    read = read_row(record, encoder(), form)
    encoded = encoder().encode(record, form)
    batch = DocumentCollator(encoder().tags, 0)([encoded])
    assert read.input_ids == batch["input_ids"][0].tolist()
    assert read.labels == batch["labels"][0].tolist()
    assert read.position_ids == batch["position_ids"][0].tolist()
    assert read.length == max(read.position_ids) + 1
    runs = [run for segment in read.segments for run in segment.runs]
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(read.input_ids)
    for run_ in runs:
        learnt = {label != IGNORE for label in read.labels[run_.start : run_.stop]}
        assert learnt == {run_.part == "label"}
        assert read.position_ids[run_.start] == run_.position
    assert "".join(run_.text for run_ in runs) == tokenizer().decode(read.input_ids)
    if form is Form.PARALLEL and row is NESTED:
        visible = batch["visible"][0]
        assert [segment.sees for segment in read.segments] == [line.nonzero().flatten().tolist() for line in visible]
        assert read.segment_ids == batch["segment_ids"][0].tolist()
    else:
        assert [(segment.name, segment.sees) for segment in read.segments] == [("all of it", [0])]


def test_each_segment_is_called_by_the_label_of_its_path() -> None:
    read = read_row(read_record(NESTED), encoder(), Form.PARALLEL)
    names = ["prompt, goal", "path 1", "path 1.1", "path 1.2", "after 1.1 to 1.2", "path 2", "after 1 to 2"]
    assert [segment.name for segment in read.segments] == names
    forced = [run.text for segment in read.segments for run in segment.runs if run.part == "forced"]
    starts = [f"\n<Path>\n{label}:" for label in ("1", "1.1", "1.2")]
    assert forced == [*starts, "\n<Conclusion>\n", "\n<Path>\n2:", "\n<Conclusion>\n"]


def test_a_label_without_colon_is_called_by_its_number() -> None:
    text = block(["left", "right"]).replace("<Outline>1: part 1", "<Outline>first").replace("1: left", "1: first")
    assert [
        s.name for s in read_row(read_record({"prompt": "x", "document": text}), encoder(), Form.PARALLEL).segments
    ][1:3] == ["path 1", "path 2"]


@pytest.mark.parametrize("width", [80, 160])
def test_the_picture_fits_the_terminal_and_shows_who_sees_whom(width: int) -> None:
    lines = drawn(NESTED | {"prompt": "Why " * 60 + "?"}, width)
    assert max(map(len, lines)) <= width
    at = next(number for number, line in enumerate(lines) if line.startswith("sees "))
    marks = [line[-13:] for line in lines[at : at + 8]]
    assert marks == [
        "0 1 2 3 4 5 6",
        "■ · · · · · ·",
        "■ ■ · · · · ·",
        "■ ■ ■ · · · ·",
        "■ ■ · ■ · · ·",
        "■ ■ ■ ■ ■ · ·",
        "■ · · · · ■ ·",
        "■ ■ ■ ■ ■ ■ ■",
    ]
    assert next(line for line in lines if line.startswith("5 path 2:")).endswith("sees 0 5")
    assert any(re.match(r"  forced +\d+-\d+ +⏎$", line) for line in lines)


def test_a_terminal_without_the_characters_gets_others_and_no_control_reaches_it() -> None:
    lines = drawn({"prompt": "Why?\x1b[31m", "document": NESTED["document"]}, 80, encoding="ascii")
    text = "\n".join(lines)
    assert text.isascii()
    assert "\x1b" not in text
    assert "x x . x . . ." in text
    assert "needs a wider terminal" in " ".join(line.strip() for line in drawn(NESTED, 30)[-3:])


def test_numbers_in_a_row_are_joined() -> None:
    assert ranges([0, 2, 3, 4, 7, 8]) == "0 2-4 7-8"


def test_a_row_of_a_file_by_its_line_and_a_row_as_text(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [NESTED, NESTED | {"prompt": "And 2?"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    asked = (
        [str(tmp_path / "rows.jsonl"), "--line", "3"],
        [json.dumps(rows[1])],
    )
    said = []
    for arguments in asked:
        assert run(["inspect", *arguments, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert [each.pop("row") for each in said] == [f"{tmp_path}/rows.jsonl, line 3", "the row"]
    assert said[0] == said[1]
    assert said[0]["num_labels"] == sum(label != IGNORE for label in said[0]["labels"])
    assert said[0]["segments"][1]["sees"] == [0, 1]
    assert "And 2?" in said[0]["segments"][0]["runs"][0]["text"]
    assert run(["inspect", str(tmp_path / "rows.jsonl")]) == 0
    assert "rows.jsonl,line1,parallelform" in "".join(capsys.readouterr().out.split())  # a long path is wrapped


BAD = {
    "no JSON": ('{"prompt": ', [], ["the row is no JSON", '{"prompt":', "give one object"]),
    "a line of a row": ('{"prompt": "x"}', ["--line", "2"], ["--line 2", "leave it out"]),
    "no document": ('{"prompt": "x"}', [], ["the row: ", "needs messages, or prompt and document; found prompt"]),
    "an unfinished document": ('{"prompt": "x", "document": "<Think>"}', [], ["malformed", "line 1, column 8"]),
    "too long": ('{"prompt": "x", "document": "y"}', ["--max-length", "5"], ["max_length is 5", "raise max_length"]),
    "no file": ("none.jsonl", [], ["no file none.jsonl", "give a file of rows"]),
    "no such line": ("rows.jsonl", ["--line", "9"], ["rows.jsonl has no line 9", "the last row is line 4"]),
    "a blank line": ("rows.jsonl", ["--line", "3"], ["rows.jsonl, line 3 is blank", "the next row is line 4"]),
    "a bad line": ("rows.jsonl", ["--line", "2"], ["rows.jsonl, line 2: unreadable: line 2 is no JSON"]),
    "no name": ("", [], ["the name of the file or dataset is empty", "give a file of rows"]),
    "a list": ("[1]", [], ["the row: "]),
    "an empty file": ("empty.jsonl", [], ["empty.jsonl holds no rows"]),
    "no model": (str(OWN), ["--model", "./none"], ["no model folder ./none", "give an existing one"]),
    "no such form": (str(OWN), ["--form", "serial"], ["serial", "parallel"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_line_that_names_it_and_the_way_out(
    case: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, options, words = BAD[case]
    good = json.dumps({"prompt": "x", "document": "y"})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{{\n\n{good}\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", source, *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_a_doubtful_row_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "x", "document": "Answer: 3", "answer": 2}
    assert run(["inspect", json.dumps(row)]) == 0
    assert "doubtful: answer is '2', and the document ends in '3'" in capsys.readouterr().out
