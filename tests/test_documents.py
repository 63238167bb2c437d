"""Documents: text to tree and back, the errors of both levels, and the sequential version."""

import pickle
import re
from pathlib import Path as FilePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_hf.documents import (
    Conclusion,
    Document,
    DocumentError,
    Element,
    Goal,
    Outline,
    Parallel,
    Path,
    Text,
    Think,
    check,
    parse_document,
    validate,
)
from multiverse_hf.modeling.tags import MULTIVERSE, NPR, TagNames

SAMPLES = FilePath(__file__).parents[1] / ".." / "shared" / "data" / "multiverse-1k-samples"

SIMPLE = """<Think>
first
<Parallel>
<Goal>
<Outline>1: A</Outline>
<Outline>2: B</Outline>
</Goal>
<Path>
1: A=8
x
</Path>
<Path>
2: B=9
y
</Path>
<Conclusion>
done
</Conclusion>
</Parallel>
last
</Think>

Answer: 5"""


def a_block(*paths: str, outlines: tuple[str, ...] | None = None, conclusion: str = "c") -> str:
    """Write a block on one line; its outlines are labelled by ordinal unless given."""
    outlines = outlines or tuple(f"{i}: o" for i in range(1, len(paths) + 1))
    return (
        f"<Parallel><Goal>{''.join(f'<Outline>{o}</Outline>' for o in outlines)}</Goal>"
        f"{''.join(f'<Path>{p}</Path>' for p in paths)}<Conclusion>{conclusion}</Conclusion></Parallel>"
    )


def at_marker(text: str) -> tuple[str, int, int]:
    """Take the ^ out of a text and give the line and column where it stood."""
    before, after = text.split("^")
    return before + after, before.count("\n") + 1, len(before.split("\n")[-1]) + 1


def messages(text: str, max_depth: int | None = None) -> list[str]:
    return [str(problem) for problem in validate(parse_document(text), max_depth)]


# Parsing


def test_a_document_becomes_the_tree_its_tags_spell() -> None:
    newline = Text("\n")
    goal = Goal((newline, Outline((Text("1: A"),)), newline, Outline((Text("2: B"),)), newline))
    paths = Path((Text("\n1: A=8\nx\n"),)), Path((Text("\n2: B=9\ny\n"),))
    conclusion = Conclusion((Text("\ndone\n"),))
    block = Parallel((newline, goal, newline, paths[0], newline, paths[1], newline, conclusion, newline))
    document = parse_document(SIMPLE)
    assert document == Document((Think((Text("\nfirst\n"), block, Text("\nlast\n"))), Text("\n\nAnswer: 5")))
    assert (block.goal, block.paths, block.conclusion) == (goal, paths, conclusion)
    assert [outline.label for outline in block.outlines] == ["1", "2"]
    assert [path.label for path in block.paths] == ["1", "2"]
    assert conclusion.text == "\ndone\n"


def test_blocks_chain_and_nest_and_are_walked_with_their_depth() -> None:
    inner = a_block("1.1: x", "1.2: y", "1.3: z", outlines=("1.1: a", "1.2: b", "1.3: c"))
    text = a_block(f"1: {inner} and {inner}", "2: b") + " then " + a_block("only one")
    document = parse_document(text)
    assert [(len(block.paths), depth) for block, depth in document.blocks()] == [(2, 1), (3, 2), (3, 2), (1, 1)]
    assert document.num_paths == 9
    assert document.depth == 2


def test_a_text_without_control_tags_is_one_text() -> None:
    text = "a < b & c <sub>2</sub> <parallel> < Goal> <Goal/> </Pathway> <Outline\n> <<>"
    document = parse_document(text)
    assert document == Document((Text(text),))
    assert (document.num_paths, document.depth, validate(document), document.sequential()) == (0, 0, [], text)
    assert parse_document("") == Document(())


def test_unusual_whitespace_is_kept_byte_for_byte() -> None:
    text = "\r\n\t" + SIMPLE.replace("\n", " \r\n\u2028\n ") + "\n\n \x0b"
    assert parse_document(text).render() == text


def test_every_piece_of_a_walk_tells_where_it_stands_in_the_text() -> None:
    for piece in parse_document(SIMPLE).walk():
        assert SIMPLE[piece.start :].startswith(piece.text)


def test_nesting_has_no_limit_of_its_own() -> None:
    depth = 3000  # three times the default recursion limit of Python
    head, tail = a_block("{}", outlines=("no label",)).split("{}")
    text = head * depth + "1: x" + tail * depth
    document = parse_document(text)
    assert document.depth == depth
    assert document.render() == text
    assert document.sequential() == "x"
    assert len(validate(document, max_depth=depth - 1)) == 1


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("a\nb^</Path>", "</Path>", "<Think> or <Parallel> or the end of the text"),
        ("^<Path>x</Path>", "<Path>", "<Think> or <Parallel> or the end of the text"),
        ("<Parallel>\n^<Path>", "<Path>", "<Goal>"),
        ("<Parallel>\n <Goal>\r\n^</Goal>", "</Goal>", "<Outline>"),
        ("<Parallel><Goal><Outline>a^<Outline>", "<Outline>", "</Outline>"),
        ("<Parallel><Goal><Outline>a</Outline>^<Path>", "<Path>", "<Outline> or </Goal>"),
        ("<Parallel><Goal><Outline>a</Outline></Goal>\n^<Conclusion>", "<Conclusion>", "<Path>"),
        (a_block("a").replace("</Path>", "^"), "<Conclusion>", "<Parallel> or </Path>"),
        (a_block("a").replace("<Conclusion>c</Conclusion>", "\n^"), "</Parallel>", "<Path> or <Conclusion>"),
        (a_block("a").replace("</Parallel>", "é^<Path>"), "<Path>", "</Parallel>"),
        ("<Think>a\nbc^", "the end of the text", "<Parallel> or </Think>"),
        ("<Think>^<Think>", "<Think>", "<Parallel> or </Think>"),
        ("<Parallel>^<Think>", "<Think>", "<Goal>"),
    ],
)
def test_tags_that_form_no_tree_are_refused_where_they_stand(text: str, found: str, expected: str) -> None:
    text, line, column = at_marker(text)
    with pytest.raises(DocumentError) as caught:
        parse_document(text)
    error = caught.value
    assert (error.line, error.column, error.found, error.expected) == (line, column, found, expected)


def test_an_error_is_one_line_that_says_where_what_and_what_to_do() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_document("ab\n <Parallel>\n<Goal>\n<Outline>1: a</Outline>\n")
    assert str(caught.value) == (
        "line 5, column 1: found the end of the text, expected <Outline> or </Goal>; "
        "complete the <Goal> opened at line 3, column 1 before it"
    )
    assert isinstance(caught.value, ValueError)


def test_an_error_survives_the_way_back_from_a_worker_process() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_document("</Goal>")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.line, copy.found) == (str(caught.value), 1, "</Goal>")


# Validating


@pytest.mark.parametrize(
    "text",
    [
        SIMPLE,
        "no block at all",
        a_block("2.1: a", "2.2: b", outlines=("2.1: x", "\n 2.2:y")),
        a_block("a", "2: b", outlines=("x", "y")),  # outlines without labels stand for 1 and 2
        a_block(a_block("1: a", "2: b"), outlines=("x",)),
    ],
)
def test_a_sound_document_has_no_problem(text: str) -> None:
    assert messages(text) == []
    check(parse_document(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n^" + a_block("1: a", outlines=("1: x", "2: y")), "found 2 outlines and 1 paths"),
        ("^" + a_block("1: a", "2: b", outlines=("1: x",)), "found 1 outlines and 2 paths"),
        (a_block("1: a", "3: b").replace("<Path>3", "\n ^<Path>3"), "found label 3: in a path, expected 2:"),
        (a_block("1: a", "b").replace("<Path>b", "^<Path>b"), "found no label in a path, expected 2:"),
        (a_block("2: a", outlines=("x",)).replace("<Path>", "^<Path>"), "found label 2: in a path, expected 1:"),
        ("^" + a_block("1: a", "1: b", outlines=("1: x", "1: y")), "found several outlines labelled 1:"),
        (a_block("1: a", outlines=("1: \n",)).replace("<Outline>", "^<Outline>"), "found an empty <Outline>"),
        (a_block("\n 1: \n").replace("<Path>", "^<Path>"), "found an empty <Path>"),
        (a_block("1: a", conclusion=" ").replace("<Conclusion>", "^<Conclusion>"), "found an empty <Conclusion>"),
        (a_block("1: a").replace("</Goal>", "</Goal>\n ^so\n"), "found text 'so'"),
        (a_block("1: a").replace("<Goal>", "<Goal>^We\ngo"), "found text 'We\\ngo'"),
        ("<Think>a</Think>\n^<Think>b</Think>", "found a second <Think>"),
    ],
)
def test_what_makes_a_row_unfit_is_reported_where_it_stands(text: str, message: str) -> None:
    text, line, column = at_marker(text)
    document = parse_document(text)
    [problem] = validate(document)
    assert (problem.line, problem.column) == (line, column)
    assert problem.message.startswith(message)
    assert "\n" not in str(problem)
    with pytest.raises(DocumentError, match=re.escape(str(problem))):
        check(document)


def test_a_path_that_holds_only_a_block_is_not_empty() -> None:
    inner = a_block("1.1: a", outlines=("1.1: x",))
    assert messages(a_block(f"1: {inner}")) == []


def test_blocks_deeper_than_allowed_are_reported() -> None:
    text = a_block("1: " + a_block("1: a") + "\n" + a_block("1: a"), "2: b")
    assert messages(text, max_depth=2) == []
    assert [message.split(",")[0] for message in messages(text, max_depth=1)] == ["line 1", "line 2"]
    assert "found a block at depth 2, expected at most 1" in messages(text, max_depth=1)[0]


def test_all_problems_are_reported_in_the_order_of_the_text() -> None:
    text = "\n".join([a_block("1: a", conclusion=""), a_block("1: ", "2: b"), a_block("2: a") + "<Think></Think>"])
    assert [message.split(",")[0] for message in messages(text)] == ["line 1", "line 2", "line 3"]


# The sequential version


def test_sequential_keeps_the_paths_without_labels_one_after_the_other() -> None:
    assert parse_document(SIMPLE).sequential() == ("<Think>\nfirst\nA=8\nx\nB=9\ny\nlast\n</Think>\n\nAnswer: 5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (a_block("1: a", "2: b"), "a\nb"),
        ("x" + a_block("1: a") + "y", "x\na\ny"),
        ("x \n\n" + a_block("1: a\n\nstill a\n\n") + "\n\n\n  y\n", "x\na\n\nstill a\n  y\n"),
        (a_block("1: a") + "\n\n" + a_block("1: b"), "a\nb"),
        (a_block(f"1: a\n{a_block('1.1: b', '1.2: c')}\nd", f"2.1:{a_block('e')}"), "a\nb\nc\nd\ne"),
        (f"<Think>{a_block('1: a')}</Think>", "<Think>\na\n</Think>"),
        ("<Think>\n\n" + a_block("1: a") + "\n</Think>\n", "<Think>\na\n</Think>\n"),
        (a_block("1: ", "2: b"), "b"),
        (a_block("1: 2: ratio 3:1"), "2: ratio 3:1"),
        (a_block("1:\n    indented"), "    indented"),
        ("1: not a path " + a_block("a").replace("</Goal>", "</Goal> stray "), "1: not a path\na"),
        ("1: no\n\nblock \n", "1: no\n\nblock \n"),
    ],
)
def test_sequential_leaves_one_newline_where_tags_were(text: str, expected: str) -> None:
    assert parse_document(text).sequential() == expected


# Other families


def test_a_family_without_an_enclosing_tag_parses_to_the_same_tree() -> None:
    text = (
        "q\n<guideline>\n<plan>1: a</plan>\n<plan>2: b</plan>\n</guideline>\n<step>1: x <Path> "
        "<guideline><plan>c</plan></guideline><step>y</step><takeaway>t</takeaway></step>\n"
        "<step>2: z</step>\n<takeaway>u</takeaway>\nend"
    )
    document = parse_document(text, NPR)
    assert document.render() == text
    assert [(len(block.paths), depth) for block, depth in document.blocks()] == [(2, 1), (1, 2)]
    assert validate(document) == []
    assert document.sequential() == "q\nx <Path>\ny\nz\nend"
    spelled_out = TagNames(None, "par", "guideline", "plan", "step", "takeaway")
    with_tag = text.replace("<guideline>", "<par><guideline>").replace("</takeaway>", "</takeaway></par>")
    assert parse_document(with_tag, spelled_out).children == document.children


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<step>", "line 1, column 1: found <step>, expected <guideline> or the end of the text"),
        ("<guideline><plan>a</plan></guideline>\n", "line 2, column 1: found the end of the text, expected <step>"),
        ("<guideline></guideline>", "line 1, column 12: found </guideline>, expected <plan>"),
    ],
)
def test_errors_speak_the_tags_of_the_family(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(message)):
        parse_document(text, NPR)


# Properties

# Text that comes near a tag without being one.
_free_text = st.text(alphabet=st.sampled_from("a1:.<>/&\n\r\t é"), min_size=1, max_size=12) | st.sampled_from(
    ["<Goal", "</Path", "Parallel>", "<goal>", " <sub>2</sub> ", "1: ", "2.1:\n"]
)
_texts = st.builds(Text, _free_text)


@st.composite
def _mixed(draw: st.DrawFn, elements: st.SearchStrategy[Element], max_size: int) -> tuple[Text | Element, ...]:
    """Draw elements with or without text around them, no two texts side by side."""
    children: list[Text | Element] = draw(st.lists(_texts, max_size=1))
    for element in draw(st.lists(elements, max_size=max_size)):
        children += [element, *draw(st.lists(_texts, max_size=1))]
    return tuple(children)


@st.composite
def _blocks(draw: st.DrawFn, levels: int, tags: TagNames) -> Parallel:
    """Draw a block that nests up to ``levels`` deep, with text anywhere that text may stand."""
    gap = st.lists(_texts, max_size=1)
    outlines = draw(st.lists(st.builds(Outline, st.tuples(_texts)), min_size=1, max_size=3))
    inside = _mixed(_blocks(levels - 1, tags), 1) if levels > 1 else st.tuples(_texts)
    paths = draw(st.lists(st.builds(Path, inside), min_size=1, max_size=2))
    conclusion = Conclusion(draw(st.tuples(_texts)))
    # Without an enclosing tag, text before the goal or after the conclusion is outside the block.
    children: list[Text | Element] = draw(gap) if tags.parallel else []
    children += [Goal(tuple(outlines)), *draw(gap)]
    for path in paths:
        children += [path, *draw(gap)]
    return Parallel((*children, conclusion, *(draw(gap) if tags.parallel else [])))


def _documents_in(tags: TagNames) -> st.SearchStrategy[Document]:
    thinks = st.builds(Think, _mixed(_blocks(2, tags), 2))
    return st.builds(Document, _mixed(_blocks(2, tags) | thinks, 2), st.just(tags))


_documents = _documents_in(MULTIVERSE) | _documents_in(TagNames(parallel=None))


@given(_documents)
def test_a_rendered_tree_parses_to_the_same_tree(document: Document) -> None:
    text = document.render()
    parsed = parse_document(text, document.tags)
    assert parsed == document
    assert parsed.render() == text


@given(_documents)
def test_any_tree_can_be_validated_and_made_sequential(document: Document) -> None:
    for problem in validate(document, max_depth=1):
        assert 1 <= problem.line <= document.render().count("\n") + 1
        assert "\n" not in str(problem)
    sequential = parse_document(document.sequential(), document.tags)
    assert (sequential.num_paths, sequential.depth) == (0, 0)


def _splice(document: Document, cut: int, length: int, tag: str) -> str:
    """Damage a document: replace some characters by a tag."""
    text = document.render()
    cut %= len(text) + 1
    return text[:cut] + tag + text[cut + length :]


_tags = st.sampled_from([*MULTIVERSE.tokens, *NPR.tokens, ""])
_soup = st.lists(_tags | _free_text, max_size=40).map("".join)
_damaged = st.builds(_splice, _documents, st.integers(0, 500), st.integers(0, 30), _tags)


@given(_soup | _damaged)
def test_tag_soup_parses_or_raises_a_document_error(text: str) -> None:
    for tags in (MULTIVERSE, NPR):
        try:
            document = parse_document(text, tags)
        except DocumentError as err:
            error = err
        else:
            assert document.render() == text
            validate(document)
            document.sequential()
            continue
        rest = text.split("\n")[error.line - 1][error.column - 1 :]
        assert rest.startswith(error.found) or (error.found, rest) == ("the end of the text", "")


# Real documents


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the published Multiverse-1K samples are not at {SAMPLES}")
def test_published_documents_parse_validate_and_become_sequential() -> None:
    files = sorted(SAMPLES.glob("*.xml"))
    assert files
    for file in files:
        text = file.read_bytes().decode()
        document = parse_document(text)
        assert document.render() == text, file.name
        assert validate(document, max_depth=2) == [], file.name
        assert [type(child) for child in document.children] == [Think], file.name
        sequential = document.sequential()
        assert not [tag for tag in MULTIVERSE.tokens if tag in sequential and "Think" not in tag], file.name
        # These have no blank lines, so none may appear; and every line is a line of the original, its label aside.
        assert "\n\n" not in sequential, file.name
        lines = {re.sub(r"^[\d.]+: ", "", line) for line in text.split("\n")}
        assert {re.sub(r"^[\d.]+: ", "", line) for line in sequential.split("\n")} <= lines, file.name
