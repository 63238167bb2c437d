"""The boxes of an answer, ``\\boxed{...}``, read in one pass, as a model may write many."""

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters
_BETWEEN_BOXES = re.compile(r"[\s$;.]*(?:,[\s$]*)?(or|and|(?<=,)[\s$]*)[\s$,;.]*", re.I)


def find_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield begin, end and content of each closed box."""
    closes: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            closes[open_braces.pop()] = match.start()
    for match in _BOX.finditer(text):
        if (close := closes.get(match.end() - 1)) is not None:
            yield match.start(), close + 1, text[match.end() : close].strip()


def boxed(text: str) -> list[str]:
    """Return the content of every box."""
    return [inside for _, _, inside in find_boxes(text)]


def last_boxed(text: str) -> str | None:
    """Return the content of the last box and of boxes joined to it; None if no box is closed."""
    boxes = list(find_boxes(text))
    if not boxes:
        return None
    begin, _, answer = boxes.pop()
    while boxes and (joined := _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], begin)):
        begin, _, before = boxes.pop()
        answer = f"{before} or {answer}" if joined[1].lower() == "or" else f"{before}, {answer}"
    return answer
