"""Documents of one family become documents of another, and nothing is lost without a word."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_hf.cli import run
from multiverse_hf.data.conversion import ConversionError, convert_document
from multiverse_hf.data.families import (
    Fork,
    Subtask,
    _write_steps,  # the only writer of documents that is not under test
)
from multiverse_hf.documents import parse_document, validate
from multiverse_hf.modeling.families import MULTIVERSE, NPR, PARALLEL_R1, Family

WIDE = Family(None, "split", "plan", "part", "work", "sum", max_paths=64, max_depth=9, name="wide")
_words = st.text(st.sampled_from("ab <&é\n1:."), min_size=1).map(str.strip).filter(lambda text: text.strip("1:. \n"))


@st.composite
def _forks(draw: st.DrawFn, depth: int) -> Fork:
    inner = [_words, _forks(depth - 1)] if depth > 1 else [_words]
    steps = st.lists(st.one_of(inner), min_size=1, max_size=3).map(tuple)
    parts = draw(st.lists(st.builds(Subtask, _words, steps), min_size=2, max_size=4))
    return Fork(lambda part: part, tuple(parts), draw(_words))


_texts = st.lists(_words | _forks(2), min_size=1, max_size=4).map(lambda steps: _write_steps(steps, "", MULTIVERSE))


@given(_texts)
def test_back_and_forth_is_the_same_text(text: str) -> None:
    document = parse_document(text)
    there = convert_document(document, WIDE)
    assert there.losses == []
    assert validate(parse_document(there.text, WIDE)) == []
    assert convert_document(parse_document(there.text, WIDE), MULTIVERSE).text == text
    assert convert_document(document, MULTIVERSE).text == text


@given(_texts)
def test_the_sequential_text_stays(text: str) -> None:
    document = parse_document(text)
    try:
        there = convert_document(document, NPR)
    except ConversionError:
        assert document.depth > 1  # the only reason: four paths fit
        return
    assert parse_document(there.text, NPR).sequential() == document.sequential()


BLOCK = """<Think>
Two sums.
<Parallel>
<Goal>
<Outline>1: left</Outline>
<Outline>2: right</Outline>
</Goal>
<Path>
1: 3
</Path>
<Path>
2: 4
</Path>
<Conclusion>
Both are done.
</Conclusion>
</Parallel>
7
</Think>

Answer: 7"""


def test_what_the_other_family_lacks_is_named() -> None:
    npr = convert_document(parse_document(BLOCK), NPR)
    assert npr.losses == ["the tags around thinking, which npr lacks"]
    assert "<guideline>\n<plan>1: left</plan>\n<plan>2: right</plan>\n</guideline>\n<step>\n1: 3\n</step>" in npr.text
    bare = convert_document(parse_document(BLOCK), PARALLEL_R1)
    assert bare.losses == [
        "outlines, which parallel-r1 lacks",
        "the tags around thinking, which parallel-r1 lacks",
    ]
    block = "<Parallel><Path>3</Path><Path>4</Path></Parallel>\n<Summary>Both are done.</Summary>"
    assert block in bare.text.replace("</Path>\n<Path>", "</Path><Path>")
    assert validate(parse_document(bare.text, PARALLEL_R1)) == []


@pytest.mark.parametrize(
    ("family", "end", "losses"),
    [
        (Family(None, "P", "g", "o", "p", "c", reduce_start="\n"), "</p>\n\n<c>\nBoth are done.\n</c>\n</P>", []),
        (
            Family(None, "P", "g", "o", "p", None, reduce_start="\n</parallel>"),
            "</p>\n</P>",
            ["conclusions, which custom lacks"],
        ),
    ],
)
def test_the_conclusion_stands_where_the_family_has_it(family: Family, end: str, losses: list[str]) -> None:
    there = convert_document(parse_document(BLOCK.replace("<Think>", "").replace("</Think>", "")), family)
    assert end in there.text
    assert there.losses == losses


@pytest.mark.parametrize(
    ("text", "source", "target", "reason"),
    [
        (BLOCK.replace("3\n", "<step>\n"), MULTIVERSE, NPR, "the text spells <step>, which is a tag of npr"),
        ("<Parallel><Path>a</Path><Path>b</Path></Parallel><Summary>c</Summary>", PARALLEL_R1, NPR, "has no outlines"),
        (
            "<Parallel><Path>a</Path><Path>b</Path></Parallel>and<Summary>c</Summary>",
            PARALLEL_R1,
            PARALLEL_R1,
            "text stands between a block and its conclusion",
        ),
        (
            "<Parallel><Goal><Outline>a</Outline></Goal><Path>b</Path><Conclusion>c</Conclusion></Parallel>",
            MULTIVERSE,
            PARALLEL_R1,
            "a block of 1 paths, and parallel-r1 writes 2 in each",
        ),
    ],
)
def test_a_document_without_a_place_there_is_refused(text: str, source: Family, target: Family, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        convert_document(parse_document(text, source), target)


def test_the_command_keeps_other_columns_and_names_what_it_leaves_out(tmp_path: Path, capsys) -> None:
    whole = BLOCK.replace("<Think>\n", "").replace("</Think>\n", "")
    rows = [
        {"id": 1, "document": whole},
        {"id": 2, "document": BLOCK},
        {"id": 3, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": whole}]},
        {"id": 4, "document": "<Parallel>"},
        {"id": "\ud800", "document": whole},
        {"messages": [{"role": "assistant", "content": whole}, {"role": "assistant", "content": whole}]},
    ]
    source, output, back = (tmp_path / name for name in ("rows.jsonl", "npr.jsonl", "back.jsonl"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    assert run(["convert", str(source), "--to", "npr", "--output", str(output)]) == 0
    told = capsys.readouterr()
    assert f"{output}: 2 rows in npr, 5 left out" in told.out
    assert "row 2 is left out: it would lose the tags around thinking" in told.err
    assert "row 4 is left out: line 1" in told.err
    assert "row 5 is left out: it cannot be written as JSON" in told.err
    assert "row 6 is left out: an earlier answer of the chat holds </Conclusion>" in told.err
    assert "row 7 is left out: line 7 is no JSON" in told.err
    assert run(["convert", str(output), "--from", "npr", "--to", "multiverse", "--output", str(back)]) == 0
    assert [json.loads(line) for line in back.read_text().splitlines()] == [rows[0], rows[2]]
    capsys.readouterr()
    assert run(["convert", str(source), "--to", "npr", "--lossy", "--output", str(output)]) == 0
    assert "1 rows lost the tags around thinking" in capsys.readouterr().err
    assert run(["convert", str(source), "--to", "none", "--output", str(output)]) == 2
    assert "choose one of multiverse, npr, parallel-r1" in capsys.readouterr().err
