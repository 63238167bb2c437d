"""Text <-> tree for Multiverse documents: parse, render, validate, and strip to sequential text.

A document is a whole answer as text. Its tree mirrors the text piece by piece, so rendering returns the same text.
Only the names in the ``Family`` are control tags; any other ``<`` is text. Parsing refuses text whose tags form no
tree. ``validate`` then finds what makes a well-formed document unfit as a training row.

    document: text, <Think> regions and blocks      block: <Parallel> goal path+ conclusion </Parallel>
    <Think>, <Path>: text and blocks                goal:  outline+

A family may lack some of these. Its conclusion may follow the block instead of ending it.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

from multiverse_hf.modeling.families import MULTIVERSE, Family
from multiverse_hf.modeling.tags import LABEL


def _grammar(family: Family) -> dict[str, tuple[str, ...]]:
    """Return what may come next inside an element: "+" opens a role, "-" closes it.

    The key is the element's role, followed by the role it last closed where that matters. The tags after the paths
    come in the order of the family's ending.
    """
    grammar = {
        "document": ("+think", "+parallel"),
        "think": ("+parallel", "-think"),
        "parallel": ("+path",) if family.goal is None else ("+goal",),
        "parallel goal": ("+path",),
        "goal": ("+outline",),
        "goal outline": ("+outline", "-goal"),
        "outline": ("-outline",),
        "path": ("+parallel", "-path"),
        "conclusion": ("-conclusion",),
    }
    ending = [("-" if tag[1] == "/" else "+") + tag.strip("</>") for tag in family.ending]
    grammar["parallel path"] = ("+path", ending[0])
    for before, move in itertools.pairwise(ending):
        if before == "-parallel":  # the conclusion follows the block, wherever that stands
            grammar |= {f"{around} parallel": (move,) for around in ("document", "think", "path")}
        elif before == "-conclusion":
            grammar["parallel conclusion"] = (move,)
    return grammar


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text between two control tags, exactly as written."""

    text: str


@dataclass(frozen=True, slots=True)
class Element:
    """The content between an open and a close tag: text and other elements, in order."""

    role: ClassVar[str]
    children: tuple["Text | Element", ...]

    @property
    def text(self) -> str:
        """The element's own text, without the text of the elements in it."""
        return "".join(child.text for child in self.children if isinstance(child, Text))

    @property
    def label(self) -> str | None:
        """The leading label without its colon (``2.1``), or None."""
        first = self.children[0] if self.children else None
        return _split_label(first.text)[0] if isinstance(first, Text) else None

    @property
    def is_empty(self) -> bool:
        """Whether it holds only whitespace and a label."""
        has_elements = any(isinstance(child, Element) for child in self.children)
        return not has_elements and not _split_label(self.text)[1].strip()


def _split_label(text: str) -> tuple[str | None, str]:
    """Return a text's leading label without its colon, None if it has none, and the rest."""
    match = LABEL.match(text)
    return (match[1], text[match.end() :]) if match else (None, text)


class Think(Element):
    """The ``<Think>`` region: an ordinary wrapper around text and blocks."""

    __slots__ = ()
    role = "think"


class Outline(Element):
    """One subtask of a goal, as text."""

    __slots__ = ()
    role = "outline"


class Goal(Element):
    """The Map of a block: its outlines, with the text between them."""

    __slots__ = ()
    role = "goal"


class Path(Element):
    """The answer to one outline: text and nested blocks."""

    __slots__ = ()
    role = "path"


class Conclusion(Element):
    """The Reduce of a block, as text."""

    __slots__ = ()
    role = "conclusion"


class Parallel(Element):
    """A MapReduce block: one goal, its paths and one conclusion, with the text between them.

    Some families have no goal, and no conclusion or one that follows the block.
    """

    __slots__ = ()
    role = "parallel"

    @property
    def goal(self) -> Goal | None:
        """The block's goal, if it has one."""
        return next((child for child in self.children if isinstance(child, Goal)), None)

    @property
    def outlines(self) -> tuple[Outline, ...]:
        """The outlines of the goal, in order."""
        children = () if self.goal is None else self.goal.children
        return tuple(child for child in children if isinstance(child, Outline))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths, in order."""
        return tuple(child for child in self.children if isinstance(child, Path))

    @property
    def conclusion(self) -> Conclusion | None:
        """The block's conclusion, if it is in the block."""
        return next((child for child in self.children if isinstance(child, Conclusion)), None)


_ELEMENTS = {element.role: element for element in (Think, Parallel, Goal, Outline, Path, Conclusion)}


class DocumentPiece(NamedTuple):
    """One piece of a rendered document: a text, or the open or close tag of an element."""

    text: str
    node: Text | Element
    parent: "Element | Document"
    start: int  # offset of the piece in the rendered document, in characters
    depth: int  # blocks around the piece, the block itself included where the piece is its tag
    closes: bool  # whether the piece is a close tag


@dataclass(frozen=True, slots=True)
class Document:
    """A whole answer: text, ``<Think>`` regions and blocks, in order, with the tag names they are written in."""

    children: tuple[Text | Element, ...]
    tags: Family = field(default=MULTIVERSE)

    def walk(self) -> Iterator[DocumentPiece]:
        """Yield every piece of the document in text order. Tags that the family lacks are empty pieces."""
        offset, tags = 0, _open_close(self.tags)
        # A stack instead of recursion: deep nesting cannot exhaust Python's own stack.
        stack: list[tuple[Text | Element, Element | Document, int, bool]]
        stack = [(child, self, 0, False) for child in reversed(self.children)]
        while stack:
            node, parent, depth, closes = stack.pop()
            if isinstance(node, Text):
                text = node.text
            else:
                text = tags[node.role][closes]
            if not closes and isinstance(node, Element):
                depth += isinstance(node, Parallel)
                stack.append((node, parent, depth, True))
                stack.extend((child, node, depth, False) for child in reversed(node.children))
            yield DocumentPiece(text, node, parent, offset, depth, closes)
            offset += len(text)

    def render(self) -> str:
        """Return the text; for a parsed document, the text that was parsed."""
        return "".join(piece.text for piece in self.walk())

    def blocks(self) -> Iterator[tuple[Parallel, int]]:
        """Yield every block with its depth (1 for an outermost block), in the order in which they open."""
        stack = [(child, 0) for child in reversed(self.children)]
        while stack:
            node, depth = stack.pop()
            if isinstance(node, Element):
                if isinstance(node, Parallel):
                    depth += 1
                    yield node, depth
                stack.extend((child, depth) for child in reversed(node.children) if isinstance(child, Element))

    @property
    def num_paths(self) -> int:
        """Number of paths in all blocks."""
        return sum(len(block.paths) for block, _ in self.blocks())

    @property
    def depth(self) -> int:
        """How deep blocks nest: 0 without a block, 1 if no block is inside a path."""
        return max((depth for _, depth in self.blocks()), default=0)

    def sequential(self) -> str:
        """Return the autoregressive version: each block is replaced by the text of its paths, one after the other.

        Tags, goals, outlines, conclusions and stray text between structural tags are dropped, and so is the label at
        the start of a path. ``<Think>`` is not parallel structure and stays. One newline replaces each boundary of a
        block or a path, except at the ends of the document. All other text is unchanged.
        """
        kept: list[str] = []
        cut = at_path_start = False
        for piece in self.walk():
            if isinstance(piece.node, Text):
                if not isinstance(piece.parent, Document | Think | Path):
                    continue
                text = _split_label(piece.text)[1] if at_path_start else piece.text
            elif isinstance(piece.node, Think):
                text = piece.text
            else:  # a tag of a block: drop the whitespace before it; ``cut`` drops the whitespace after it
                cut, at_path_start = True, isinstance(piece.node, Path) and not piece.closes
                while kept and not kept[-1].strip():
                    kept.pop()
                if kept:
                    kept[-1] = kept[-1].rstrip()
                continue
            at_path_start = False
            if cut and (text := _without_blank_start(text)):
                kept.extend(("\n", text) if kept else (text,))
                cut = False
            elif not cut:
                kept.append(text)
        return "".join(kept)


def _without_blank_start(text: str) -> str:
    """Drop leading blank lines, but keep the indentation of the first line that is not blank."""
    body = text.lstrip()
    _, newline, indentation = text[: len(text) - len(body)].rpartition("\n")
    return indentation + body if newline and body else body


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at one place of a document, and what to do about it."""

    line: int  # 1-based, as is ``column``, which counts characters
    column: int
    found: str
    expected: str
    advice: str

    @property
    def message(self) -> str:
        """What was found, what was expected and what to do, on one line."""
        return f"found {self.found}, expected {self.expected}; {self.advice}"

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.message}"


class DocumentError(ValueError):
    """A text is not a Multiverse document, or (from ``check``) not fit as a training row.

    Attributes:
        problem: the ``Problem``, whose ``line``, ``column``, ``found`` and ``expected`` the error has too.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line, self.column = problem.line, problem.column
        self.found, self.expected = problem.found, problem.expected


def _line_column(text: str, offset: int) -> tuple[int, int]:
    """Return the 1-based line and column of an offset."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


@dataclass(slots=True)
class _Open:
    """An element whose close tag was not read yet."""

    role: str
    state: str  # key into the grammar
    start: int
    children: list[Text | Element] = field(default_factory=list)


@lru_cache(maxsize=32)
def _open_close(tags: Family) -> dict[str, tuple[str, str]]:
    """Return the open and the close tag of each role; both are empty if the family lacks the role."""
    return {
        role: ("", "") if getattr(tags, role) is None else (tags.open(role), tags.close(role)) for role in _ELEMENTS
    }


@lru_cache(maxsize=32)
def _moves(tags: Family) -> tuple[re.Pattern[str], dict[str, dict[str, str]]]:
    """Return a family's grammar in its tags: a pattern of all tags, and by state each allowed tag with its move."""
    moves: dict[str, dict[str, str]] = {}
    for state, allowed in _grammar(tags).items():
        moves[state] = {}
        for move in allowed:
            role = "goal" if move == "+parallel" and tags.parallel is None else move[1:]
            if getattr(tags, role) is not None:
                moves[state][tags.open(role) if move[0] == "+" else tags.close(role)] = move
    return re.compile("|".join(map(re.escape, tags.tokens))), moves


def parse_document(text: str, tags: Family = MULTIVERSE) -> Document:
    """Read a text into its tree.

    Args:
        text: a whole document. Everything except control tags is free text, including ``<``, ``&`` and unknown tags.
        tags: the family. Without ``parallel``, a block runs from its goal to its conclusion.

    Returns:
        The tree, whose ``render()`` is ``text``.

    Raises:
        DocumentError: if the tags form no tree of the grammar above; it names the first tag that does not fit.
    """
    pattern, moves = _moves(tags)
    open_elements = [_Open("document", "document", 0)]

    def close_innermost() -> None:
        done, parent = open_elements.pop(), open_elements[-1]
        parent.children.append(_ELEMENTS[done.role](tuple(done.children)))
        state = f"{parent.role} {done.role}"
        parent.state = state if state in moves else parent.role

    end = 0
    for match in pattern.finditer(text):
        current, start, tag = open_elements[-1], match.start(), match[0]
        if start > end:
            current.children.append(Text(text[end:start]))
        end = match.end()
        move = moves[current.state].get(tag)
        if move is None:
            raise _unexpected(text, start, tag, current, tags)
        role = move[1:]
        if move[0] == "+":
            open_elements.append(_Open(role, role, start))
            if role == "parallel" and tags.parallel is None:
                open_elements.append(_Open("goal", "goal", start))
        else:
            close_innermost()
            if role == "conclusion" and tags.parallel is None:
                close_innermost()
    root = open_elements[-1]
    if len(open_elements) > 1 or root.state != root.role:
        raise _unexpected(text, len(text), "the end of the text", root, tags)
    if end < len(text):
        root.children.append(Text(text[end:]))
    return Document(tuple(root.children), tags)


def is_well_formed(text: str, tags: Family = MULTIVERSE) -> bool:
    """Return whether a text parses: its tags fit the grammar and are closed (paper, MapReduce structure)."""
    try:
        parse_document(text, tags)
    except DocumentError:
        return False
    return True


def _unexpected(text: str, offset: int, found: str, current: _Open, tags: Family) -> DocumentError:
    """Return the error for a tag, or an end of the text, that does not fit into the innermost open element."""
    expected = " or ".join(_moves(tags)[1][current.state])
    if current.state == "document":
        advice = f"remove {found}, or put it inside the element it belongs to"
        expected += " or the end of the text"
    elif current.role == "document":
        advice = f"write {expected} before it"
    else:
        role = "goal" if current.role == "parallel" and tags.parallel is None else current.role
        line, column = _line_column(text, current.start)
        advice = f"complete the {tags.open(role)} opened at line {line}, column {column} before it"
    return DocumentError(Problem(*_line_column(text, offset), found, expected, advice))


def validate(document: Document, max_depth: int | None = None) -> list[Problem]:
    """Return every problem that makes a well-formed document unfit as a training row.

    The problems are: more or fewer paths than outlines; a path whose label is not its outline's; siblings with one
    label; an outline, path or conclusion that is empty but for a label; text between structural tags; a second
    ``<Think>``; a block that nests too deep. The label of an outline without one is its ordinal, and its path may
    leave the label out.

    Args:
        document: as parsed. Positions refer to its rendered text.
        max_depth: the deepest block allowed, 1 for blocks that do not nest; None for any depth.

    Returns:
        The problems, in text order.
    """
    problems: list[Problem] = []
    text = document.render()

    def report(start: int, found: str, expected: str, advice: str) -> None:
        problems.append(Problem(*_line_column(text, start), found, expected, advice))

    labels_due: dict[int, Iterator[tuple[str, bool]]] = {}  # by depth: each path's label, and whether it must have one
    num_thinks = 0
    for piece in document.walk():
        node, start = piece.node, piece.start
        if piece.closes:
            continue
        if isinstance(node, Text):
            if isinstance(piece.parent, Parallel | Goal) and (stray := node.text.strip()):
                start += node.text.index(stray)
                report(start, f"text {stray[:40]!r}", "whitespace between structural tags", "move it out of the block")
            continue
        if isinstance(node, Outline | Path | Conclusion) and node.is_empty:
            report(start, f"an empty {piece.text}", "text in it", "fill it, or drop it with what belongs to it")
        if isinstance(node, Think):
            num_thinks += 1
            if num_thinks > 1:
                report(start, f"a second {piece.text}", "one such region", "merge them")
        elif isinstance(node, Parallel):
            if max_depth is not None and piece.depth > max_depth:
                report(start, f"a block at depth {piece.depth}", f"at most {max_depth}", "write it as plain text")
            labels_due[piece.depth] = _check_goal(node, document.tags.num_paths, start, report)
        elif isinstance(node, Path):
            label, required = next(labels_due[piece.depth], (node.label, False))
            if node.label != label and (required or node.label is not None):
                found = "no label" if node.label is None else f"label {node.label}:"
                report(start, f"{found} in a path", f"{label}: as its outline has it", "make the two agree")
    return problems


def _check_goal(
    block: Parallel, fixed: int | None, start: int, report: Callable[[int, str, str, str], None]
) -> Iterator[tuple[str, bool]]:
    """Check a block's outlines against its paths. Return each path's label, and whether the path must have it.

    Args:
        block: the block.
        fixed: number of paths, in a family without outlines.
        start: where the block begins.
        report: takes a problem.
    """
    outlines, num_paths = block.outlines, len(block.paths)
    if fixed is not None:
        if num_paths != fixed:
            report(start, f"{num_paths} paths", f"{fixed} paths, as in every block", "add or remove paths")
        return iter(())
    labels = [outline.label or str(ordinal) for ordinal, outline in enumerate(outlines, start=1)]
    if len(outlines) != num_paths:
        found = f"{len(outlines)} outlines and {num_paths} paths"
        report(start, found, "one path per outline", "add or remove outlines or paths")
        return iter(())
    if repeated := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        report(start, f"several outlines labelled {repeated[0]}:", "a label of its own for each", "number them anew")
    return iter([(label, outline.label is not None) for label, outline in zip(labels, outlines, strict=True)])


def check(document: Document, max_depth: int | None = None) -> None:
    """Raise the first problem that ``validate`` finds.

    Raises:
        DocumentError: if there is one.
    """
    for problem in validate(document, max_depth):
        raise DocumentError(problem)
