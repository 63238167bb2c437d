"""Documents of one family written in the tags and rules of another."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from multiverse_hf.documents import (
    Conclusion,
    Document,
    Element,
    Parallel,
    Text,
    Think,
    check,
    parse_document,
)
from multiverse_hf.modeling.families import Family, pieces_of
from multiverse_hf.modeling.tags import LABEL


@dataclass(slots=True)
class Conversion:
    """A converted document.

    Attributes:
        text: the document in the other family.
        losses: what the other family cannot hold and the text therefore lacks, each kind once.
    """

    text: str
    losses: list[str] = field(default_factory=list)


class ConversionError(ValueError):
    """A document that the other family cannot hold at all."""


def convert_document(document: Document, target: Family) -> Conversion:
    """Write a document in another family: its tags, the order of its block, and the text that the engine writes.

    Text outside structural tags is kept to the letter, but for whitespace at the ends of paths and conclusions.
    Whitespace between structural tags becomes that of the target, and paths get the labels that its engine writes.

    Args:
        document: as parsed in its own family.
        target: the family to write.

    Returns:
        The text, and what it lacks. Without losses, converting back gives the same document, but for such whitespace
        and labels.

    Raises:
        DocumentError: if the document is not fit as a training row.
        ConversionError: if the target has no place for its blocks: too many paths, too deep, no outlines to write,
            a text that spells one of the target's tags, or a conclusion apart from its block.
    """
    check(document)
    _check_limits(document, target)
    writer = _Writer(document.tags, target)
    text = writer.write(document.children)
    check(parse_document(text, target))
    return Conversion(text, list(dict.fromkeys(writer.losses)))


def _check_limits(document: Document, target: Family) -> None:
    """Raise :class:`ConversionError` for what the target does not allow."""
    source, name = document.tags, target.name
    blocks = [block for block, _ in document.blocks()]
    if document.depth > target.max_depth:
        raise ConversionError(f"blocks nest {document.depth} deep, and {name} allows {target.max_depth}")
    outermost = sum(depth == 1 for _, depth in document.blocks())
    if target.max_blocks is not None and outermost > target.max_blocks:
        raise ConversionError(f"{outermost} blocks, and {name} allows {target.max_blocks}")
    if blocks and target.outline is not None and source.outline is None:
        raise ConversionError(f"{source.name} has no outlines, and {name} needs one for each path")
    for block in blocks:
        count = len(block.paths)
        if target.num_paths is not None and count != target.num_paths:
            raise ConversionError(f"a block of {count} paths, and {name} writes {target.num_paths} in each")
        if count > target.max_paths:
            raise ConversionError(f"a block of {count} paths, and {name} allows {target.max_paths}")
    foreign = set(target.tokens) - set(source.tokens)
    for piece in document.walk():
        if isinstance(piece.node, Text):
            spelled = min((tag for tag in foreign if tag in piece.text), default=None)
            if spelled is not None:
                raise ConversionError(f"the text spells {spelled}, which is a tag of {name}")


class _Writer:
    """Writes the pieces of a document in another family, and keeps what is lost."""

    def __init__(self, source: Family, target: Family) -> None:
        self.source, self.target = source, target
        self.losses: list[str] = []

    def write(self, children: Sequence[Text | Element]) -> str:
        """Return text and blocks, in order."""
        written, waiting = [], list(reversed(children))
        while waiting:
            child = waiting.pop()
            if isinstance(child, Text):
                written.append(child.text)
            elif isinstance(child, Think):
                written.append(self._think(self.write(child.children)))
            elif isinstance(child, Parallel):
                written.append(self._block(child, child.conclusion or _pop_conclusion(waiting)))
            else:
                raise ConversionError("text stands between a block and its conclusion")
        return "".join(written)

    def _think(self, text: str) -> str:
        if self.target.think is None:
            self.losses.append(f"the tags around thinking, which {self.target.name} lacks")
            return text.strip("\n")
        return self.target.open("think") + text + self.target.close("think")

    def _block(self, block: Parallel, conclusion: Conclusion | None) -> str:
        target, pieces = self.target, []
        labels = [outline.label or str(number) for number, outline in enumerate(block.outlines, start=1)]
        if target.goal is None:
            pieces.append(target.open("parallel"))
            if block.outlines:
                self.losses.append(f"outlines, which {target.name} lacks")
        else:
            pieces += [] if target.parallel is None else [target.open("parallel"), "\n"]
            outlines = [target.open("outline") + self.write(each.children) + target.close("outline")
                        for each in block.outlines]  # fmt: skip
            pieces += [target.open("goal"), "\n", "\n".join(outlines), "\n", target.close("goal")]
        has_label = "{label}" in target.path_start
        for place, path in enumerate(block.paths):
            label = labels[place] + ":" if has_label else ""
            pieces.append(self._spell(target.path_start, label))
            text = self.write(path.children)
            mark = LABEL.match(text) if self.source.outline is not None else None
            text = text[mark.end() :] if mark else text
            pieces += [text if has_label else text.strip(), target.close("path")]
        text = "" if conclusion is None else self.write(conclusion.children).strip()
        if text and target.conclusion is None:
            self.losses.append(f"conclusions, which {target.name} lacks")
        line = "\n" if target.reduce_start.endswith("\n") else ""
        pieces.append(self._spell(target.reduce_start))
        is_open = target.num_started > 0 and target.ending[target.num_started - 1] == "<conclusion>"
        pieces.append(text if is_open else "")
        for tag in target.ending[target.num_started :]:
            pieces += [line, target.tag(tag)]
            pieces += [line, text] if tag == "<conclusion>" else []
        return "".join(pieces)

    def _spell(self, text: str, label: str = "") -> str:
        own = {"\n": "\n", "{label}": label}
        return "".join(own[piece] if piece in own else self.target.tag(piece) for piece in pieces_of(text))


def _pop_conclusion(waiting: list[Text | Element]) -> Conclusion | None:
    """Take the conclusion that follows a block off a reversed list of siblings, with the whitespace before it."""
    ahead = len(waiting) - 1
    while ahead >= 0 and isinstance(waiting[ahead], Text) and not waiting[ahead].text.strip():
        ahead -= 1
    if ahead < 0 or not isinstance(waiting[ahead], Conclusion):
        return None
    found = waiting[ahead]
    del waiting[ahead:]
    return found
