"""Checks of a document: content, grammar and independence. Each raises a refusal if it fails."""

import re

from rapidfuzz.distance import Levenshtein

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.documents import Document, DocumentError, Outline, Path, check, parse_document

# Quoted texts are nearly equal, and this hint finds a small distance in a tenth of the time.
_EXPECTED_EDITS = 256
_SHOWN = 160  # characters shown of each text at the worst place


def distance(original: str, text: str) -> float:
    """Return the edit distance of two texts over the length of the longer one, from 0 to 1."""
    longer = max(len(original), len(text))
    return Levenshtein.distance(original, text, score_hint=_EXPECTED_EDITS) / longer if longer else 0.0


def check_content(original: str, text: str, max_distance: float) -> float:
    """Check that a document's sequential reasoning is still the original.

    Returns:
        The distance.

    Raises:
        Refusal: if it is above ``max_distance``, with the worst place.
    """
    ratio = distance(original, text)
    if ratio > max_distance:
        raise Refusal(
            "content", f"distance {ratio:.2f} to the original, {max_distance} at most; {worst(original, text)}"
        )
    return ratio


def worst(original: str, text: str) -> str:
    """Return the place where a text differs most: the longest stretch without 20 equal characters."""
    stretches: list[list[int]] = []  # begin and end in the original, begin and end in the text
    for op in Levenshtein.opcodes(original, text):
        if op.tag == "equal":
            continue
        if stretches and op.src_start - stretches[-1][1] < 20:
            stretches[-1][1], stretches[-1][3] = op.src_end, op.dest_end
        else:
            stretches.append([op.src_start, op.src_end, op.dest_start, op.dest_end])
    begin, end, there, until = max(stretches, key=lambda each: max(each[1] - each[0], each[3] - each[2]))
    line = original.count("\n", 0, begin) + 1
    return f"worst in line {line}: {_shorten(original[begin:end])} became {_shorten(text[there:until])}"


def _shorten(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return repr(shown) if text else "nothing"


def check_grammar(text: str, max_depth: int) -> Document:
    """Return a parsed document, checked as in training.

    Raises:
        Refusal: at the first problem.
    """
    try:
        document = parse_document(text)
        check(document, max_depth)
    except DocumentError as err:
        raise Refusal("grammar", str(err)) from err
    return document


def paths_of(document: Document) -> list[Path]:
    """Return all paths in the order in which they open."""
    return [piece.node for piece in document.walk() if isinstance(piece.node, Path) and not piece.closes]


def check_paths(plain: Document, document: Document, max_distance: float) -> list[float]:
    """Check every path against its quoted text, before sentences were rewritten.

    Args:
        plain: the document with quoted text.
        document: the document with rewritten sentences.

    Returns:
        The distance of each path, in the order in which they open.

    Raises:
        Refusal: if one is above ``max_distance``, with the worst place.
    """
    distances = []
    for before, after in zip(paths_of(plain), paths_of(document), strict=True):
        if before == after:
            distances.append(0.0)
            continue
        original, text = (Document(path.children).sequential() for path in (before, after))
        distances.append(distance(original, text))
        if distances[-1] > max_distance:
            detail = f"path {after.label} has distance {distances[-1]:.2f} to its original, {max_distance} at most"
            raise Refusal("path content", f"{detail}; {worst(original, text)}")
    return distances


# Independence. Words that refer back are wrong in the first sentence of a path other than the first: only a sibling's
# text stands before it. In later sentences they may refer to the path itself.
_LEANING = re.compile(
    r"\b(?:similarly|likewise|analogously|as (?:above|before)|(?:in|by) the same (?:way|manner|argument|reasoning)"
    r"|same as (?:above|before)|the (?:previous|preceding|other|above) (?:approach|method|attempt|case|path|part)"
    r"|as (?:we|i) (?:just )?(?:saw|found|showed|did|computed|derived)(?: (?:above|before|earlier))?)\b",
    re.IGNORECASE,
)
_SIBLING = re.compile(
    r"\b(?P<noun>path|branch|outline|subtask)(?:e?s)?\s*[#(]?\s*(?P<label>\d+(?:\.\d+)*|one|two|three|four|five|six)\b"
    r"|\b(?:previous|preceding|next|other|first|second|third|fourth|fifth|last|\d+(?:st|nd|rd|th))\s+"
    r"(?P<kind>path|branch|outline|subtask)"
    r"|\bsiblings?(?P<sibling>)\b",
    re.IGNORECASE,
)
_FIRST_SENTENCE = re.compile(r".*?(?:[.?!](?=\s)|\n|\Z)", re.DOTALL)


def check_independence(document: Document, problem: str = "") -> None:
    """Check by its words that no path mentions a sibling.

    Args:
        document: the document with the paths.
        problem: the problem. If it is about paths or branches, "the second path" may stand in its solution.

    Raises:
        Refusal: with the path and the words.
    """
    for block, _ in document.blocks():
        for outline in block.outlines:
            if found := _mention(outline, True, problem.lower()):
                raise Refusal("independence", f"outline {outline.label} refers to a path: {found!r}; say what to find")
        for place, path in enumerate(block.paths):
            if found := _mention(path, place == 0, problem.lower()):
                raise Refusal(
                    "independence", f"path {path.label} refers to another path: {found!r}; rewrite the sentence"
                )


def _mention(path: Path | Outline, is_first: bool, problem: str) -> str | None:
    """Return the words with which a path refers to a sibling, with some context; None if there are none."""
    own = path.label or ""
    text = path.text.partition(":")[2].strip()
    for match in _SIBLING.finditer(text):
        label, noun = match["label"], match["noun"] or match["kind"] or "sibling"
        # the labels of the path itself, its parents and its inner paths are no siblings'
        is_family = label is not None and (f"{own}.".startswith(f"{label}.") or label.startswith(f"{own}."))
        if not is_family and not re.search(rf"\b{noun.lower()}(?:e?s)?\b", problem):
            return _around(text, match)
    if not is_first and (match := _LEANING.search(text, 0, _FIRST_SENTENCE.match(text).end())):
        return _around(text, match)
    return None


def _around(text: str, match: re.Match[str]) -> str:
    """Return the words of a match with some context from the same sentence."""
    before = re.split(r"[.?!]\s|\n", text[max(0, match.start() - 20) : match.start()])[-1]
    after = re.split(r"[.?!]\s|\n", text[match.end() : match.end() + 20])[0]
    return " ".join(f"{before}{match[0]}{after}".split())
