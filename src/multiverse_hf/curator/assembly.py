"""Builds a document from its structure and the text of its steps."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from multiverse_hf.curator.forms import BlockText, PlacedStep, RefillReply, StructureReply
from multiverse_hf.documents import Document, Element, Path, Text
from multiverse_hf.modeling.families import MULTIVERSE, Family
from multiverse_hf.modeling.tags import LABEL

_SURROUNDING = re.compile(
    r"\A(?:[ \t]*\n)+|\s+\Z"
)  # whitespace that a block boundary replaces, except the first line's indentation


class PlannedBlock(NamedTuple):
    """A block: its name, and the steps and blocks of each path."""

    name: str
    paths: "list[list[str | PlannedBlock]]"


def plan(structure: StructureReply) -> "list[str | PlannedBlock]":
    """Return the document as steps and blocks in order. Blocks are named B1, B2, ... as they open."""
    count = 0

    def name() -> str:
        nonlocal count
        count += 1
        return f"B{count}"

    def inner(step: PlacedStep) -> "list[str | PlannedBlock]":
        found: list[str | PlannedBlock] = [] if step.parts else [step.step]
        for part in step.parts:
            if len(part.steps) == 1:
                found.append(part.steps[0])
            else:
                found.append(PlannedBlock(name(), [[each] for each in part.steps]))
        return found

    items: list[str | PlannedBlock] = []
    for part in structure.parts:
        if len(part.steps) == 1:
            items += inner(part.steps[0])
        else:
            block = name()
            items.append(PlannedBlock(block, [inner(step) for step in part.steps]))
    return items


def block_names(structure: StructureReply) -> dict[str, int]:
    """Return the name and the number of paths of every block, in the order in which they open."""
    return {block.name: len(block.paths) for block in _blocks(plan(structure))}


def _blocks(items: "Sequence[str | PlannedBlock]") -> Iterator[PlannedBlock]:
    for item in items:
        if isinstance(item, PlannedBlock):
            yield item
            for path in item.paths:
                yield from _blocks(path)


def path_sentences(structure: StructureReply, refill: RefillReply) -> set[int]:
    """Return the numbers of all sentences in paths."""
    leaves = {
        item
        for block in _blocks(plan(structure))
        for path in block.paths
        for item in path
        if not isinstance(item, PlannedBlock)
    }
    return {number for leaf in leaves for number in refill.numbers(leaf)}


def original_text(refill: RefillReply, sentences: Sequence[str]) -> dict[str, str]:
    """Return the text of each step: its sentences from the original."""
    texts: dict[str, str] = {}
    for quote in refill.quotes:
        texts[quote.step] = _join(texts.get(quote.step, ""), "".join(sentences[quote.first - 1 : quote.last]))
    return texts


def _join(before: str, text: str) -> str:
    """Concatenate texts, with a newline if no whitespace separates them."""
    return f"{before}\n{text}" if before and text and not before[-1].isspace() else before + text


def assemble(
    structure: StructureReply, texts: Mapping[str, str], blocks: Mapping[str, BlockText] | None = None
) -> str:
    """Return the document in ``<Think>``: one newline between tags, labels in outlines and paths.

    Args:
        structure: the arrangement of steps.
        texts: text of each step that has its own.
        blocks: outlines and conclusion of each block by its name; None writes the names in their place.
    """

    def write(items: "Sequence[str | PlannedBlock]", prefix: str) -> str:
        pieces, run = [], ""
        for item in items:
            if isinstance(item, PlannedBlock):
                pieces += [_SURROUNDING.sub("", run), write_block(item, prefix)]
                run = ""
            else:
                run = _join(run, texts[item])
        return "\n".join(filter(str.strip, [*pieces, _SURROUNDING.sub("", run)]))

    def write_block(block: PlannedBlock, prefix: str) -> str:
        labels = [f"{prefix}{number}" for number in range(1, len(block.paths) + 1)]
        if blocks is None:
            outlines, conclusion = [f"({block.name}, outline)" for _ in labels], f"({block.name}, conclusion)"
        else:
            outlines, conclusion = blocks[block.name].outlines, blocks[block.name].conclusion
        goal = [_element("outline", f"{label}: {_bare(text)}") for label, text in zip(labels, outlines, strict=True)]
        paths = [
            _element("path", _labelled(label, write(path, f"{label}.")))
            for label, path in zip(labels, block.paths, strict=True)
        ]
        inside = [_element("goal", "\n".join(goal)), *paths, _element("conclusion", conclusion.strip())]
        return _element("parallel", "\n".join(inside))

    return _element("think", write(plan(structure), ""))


def _element(role: str, text: str) -> str:
    return f"{MULTIVERSE.open(role)}\n{text}\n{MULTIVERSE.close(role)}"


def _labelled(label: str, text: str) -> str:
    """Return a path that begins with its label, on a separate line if a block follows directly."""
    return f"{label}:\n{text}" if text.startswith(MULTIVERSE.open("parallel")) else f"{label}: {text.lstrip()}"


def _bare(outline: str) -> str:
    """Return an outline without a label that a model wrote before it."""
    return outline[match.end() :].strip() if (match := LABEL.match(outline)) else outline.strip()


def reasoning_of(document: Document) -> str:
    """Return the sequential text of an assembled document, without its ``<Think>`` tags."""
    text = document.sequential()
    return text.removeprefix(f"{MULTIVERSE.open('think')}\n").removesuffix(f"\n{MULTIVERSE.close('think')}")


def character_parallelism(document: Document) -> float:
    """Return # parallel of a document in characters: all of its text over its critical path."""
    sizes = [_sizes(child, document.tags) for child in document.children]
    longest = sum(way for _, way in sizes)
    return sum(size for size, _ in sizes) / longest if longest else 1.0


def _sizes(node: Text | Element, tags: Family) -> tuple[int, int]:
    """Return the length of a part of a document, and of its critical path."""
    if isinstance(node, Text):
        return len(node.text), len(node.text)
    own = len(tags.open(node.role)) + len(tags.close(node.role))
    inside = [(isinstance(child, Path), *_sizes(child, tags)) for child in node.children]
    longest = sum(way for is_path, _, way in inside if not is_path)
    longest += max((way for is_path, _, way in inside if is_path), default=0)
    return own + sum(size for _, size, _ in inside), own + longest
