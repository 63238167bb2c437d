"""What an answer says in the end, and whether that is right. Every verdict names the rule that gave it.

Where the answer is read: after the thinking (``</Think>``); all of it where there is no thinking; nowhere where the
thinking is not closed, so that an answer that was cut off is wrong in every mode. There: the last ``\\boxed{...}``,
else what follows the last ``Answer:`` that begins a line.

Mathematical answers are right if one of these rules accepts them, and the first that does is recorded:

=============== ====================================================================================================
``text``        the same text as the right answer, apart from spaces, ``\\left``, ``\\text{}``, a unit after a number,
                and the like (:func:`normalize`)
``integer``     both are integers and equal, whatever their leading zeros and thousands separators
``math-verify`` math-verify holds them to be the same, in a process with a clock
=============== ====================================================================================================

and wrong by one of these:

=================== ================================================================================================
``no answer``       there is no box and no ``Answer:`` where the answer is read
``several answers`` it hedges, "3 or 4", "3 (or 5)", where the right answer has no "or"
``timeout``         math-verify took too long
``unreadable``      math-verify cannot read it
``different``       it says something else
=================== ================================================================================================

Several boxes: the last one counts; boxes joined by nothing but "or" are alternatives, a hedge; boxes joined by
nothing but "and" or a comma are one list. Letters are right as the one letter that is boxed or follows
``Answer:`` (rule ``letter``), chains if the last line is ``Answer:`` and exactly the number (rule ``last line``).
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from multiverse_hf.data.chains import read_answer
from multiverse_hf.evaluation.verifier import Verifier, VerifierError, VerifierTimeout

MAX_CHARACTERS = 2000  # of an answer that is compared: longer ones are no answers, and slow to search


class AnswerKind(StrEnum):
    """What kind of answer a task asks for."""

    MATH = "math"
    LETTER = "letter"
    CHAINS = "chains"


class Rule(StrEnum):
    """What a verdict was given by."""

    TEXT = "text"
    INTEGER = "integer"
    MATH_VERIFY = "math-verify"
    LETTER = "letter"
    LAST_LINE = "last line"
    NO_ANSWER = "no answer"
    SEVERAL = "several answers"
    TIMEOUT = "timeout"
    UNREADABLE = "unreadable"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        correct: it is.
        rule: that said so.
        answer: what it said, as it was read; None if nothing.
    """

    correct: bool
    rule: Rule
    answer: str | None


def judge(kind: AnswerKind, gold: str, document: str, verifier: Verifier) -> Verdict:
    """Judge an answer.

    Args:
        kind: of the task.
        gold: the right answer.
        document: the answer as it was generated, tags included.
        verifier: for mathematical answers.
    """
    if kind is AnswerKind.CHAINS:
        said = read_answer(document)
        if said is None:
            return Verdict(False, Rule.NO_ANSWER, None)
        return Verdict(str(said) == gold, Rule.LAST_LINE if str(said) == gold else Rule.DIFFERENT, str(said))
    answer = final_answer(document)
    if answer is None:
        return Verdict(False, Rule.NO_ANSWER, None)
    correct, rule = _compare_letters(gold, answer) if kind is AnswerKind.LETTER else _compare(gold, answer, verifier)
    return Verdict(correct, rule, answer)


# What an answer says

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are characters
_ANSWER_LINE = re.compile(
    r"^[ \t]*\**(?:the )?(?:final )?answer(?: is)?\**[ \t]*:[ \t]*\**[ \t]*", re.I | re.MULTILINE
)
_BETWEEN_BOXES = re.compile(r"[\s$,;.]*(or|and|,)?[\s$,;.]*", re.I)


def final_answer(document: str) -> str | None:
    """Give what an answer says in the end, None if nothing; see this module's description."""
    _, thought, text = document.rpartition("</Think>")
    if not thought and "<Think>" in document:
        return None
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    if not (lines := list(_ANSWER_LINE.finditer(text))):
        return None
    rest = text[lines[-1].end() :].strip()
    return rest.splitlines()[0].strip().strip("*").strip() or None if rest else None


def last_boxed(text: str) -> str | None:
    """Give what the last box holds, with the boxes that are joined to it; None if there is no box that closes."""
    closes = _closing_braces(text)
    boxes = [(match.start(), match.end(), closes.get(match.end() - 1)) for match in _BOX.finditer(text)]
    boxes = [(begin, close + 1, text[inside:close].strip()) for begin, inside, close in boxes if close is not None]
    if not boxes:
        return None
    begin, _, answer = boxes.pop()
    while boxes and (joined := _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], begin)) and joined[1]:
        begin, _, before = boxes.pop()
        answer = f"{before} or {answer}" if joined[1].lower() == "or" else f"{before}, {answer}"
    return answer


def _closing_braces(text: str) -> dict[int, int]:
    """Give, for the place of every brace that is closed, where it is; in one pass, as a model may write many."""
    closes: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "}" and open_braces:
            closes[open_braces.pop()] = match.start()
    return closes


# Whether it is right

_UNIT_WORDS = (
    "mm|cm|dm|m|km|in|inch|inches|ft|foot|feet|yd|yards?|miles?|meters?|metres?|centimeters?|centimetres?|kilometers?|"
    "millimeters?|units?|degrees?|deg|radians?|rad|percent|dollars?|cents?|euros?|pounds?|ounces?|oz|lbs?|kg|g|grams?|"
    "s|sec|seconds?|min|minutes?|h|hrs?|hours?|days?|weeks?|months?|years?|mph|km/h|m/s|liters?|litres?|l|ml|gallons?|"
    "people|ways|points?|sides?|times"
)
_UNIT_TEXT = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:{_UNIT_WORDS})(?:\s+(?:squared|cubed))?\.?"
# after a number: a word for a unit, in \text{} or not, with its power; or degrees
_UNIT = re.compile(
    rf"(?<=[\d}})])\s*(?:\\[,;!: ]\s*)?"
    rf"(?:\\(?:text|mbox|mathrm)\{{\s*(?P<text>{_UNIT_TEXT})\s*\}}|(?P<word>(?<=[\d\s]){_UNIT_TEXT}))"
    rf"(?:\^\{{?\d\}}?)?$|(?<=[\d}})])\s*(?:\^\{{?\\circ\}}?|°)$",
    re.I,
)
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,! ]|\{,\}|~| )(?=\d{3}(?!\d))")
_SPACES = r"\\(?:left|right|displaystyle|,|;|!|:|quad|qquad)(?![a-zA-Z])|\\ |~|\s"
_APART = re.compile(rf"(?<=\d)(?:{_SPACES})+(?=\d)")  # digits that something parts are no number
_SPACING = re.compile(_SPACES)
_BASE = re.compile(r"\d_\{?\d+\}?$")
_RELATION = re.compile(r"\\(?:neq?|geq?|leq?|gt|lt|approx|sim)(?![a-zA-Z])|[<>≠≤≥≈]")
_NAME = re.compile(r"^[a-zA-Z]\w{0,2}=(?=.)")
_INTEGER = re.compile(r"[+-]?(?:\d{1,1000}|\d{1,3}(?:,\d{3})+)", re.ASCII)
_HEDGE = re.compile(r"(?<![a-z\\])or(?![a-z])|\\lor\b|\\vee\b|\beither\b", re.I)


def normalize(answer: str) -> str:
    """Take from an answer what does not change its meaning: spaces, ``\\left``, ``\\text{}``, a unit after a number,
    ``x=`` before a value, ``\\dfrac`` for ``\\frac``, braces of single digits, a percent or dollar sign, a full stop.
    """
    text = answer.strip().removesuffix(".").strip("$ \n").removesuffix(".").strip()
    text = _UNIT.sub("", text)
    text = _TEXT.sub(r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "$").strip("$ \n")
    text = re.sub(r"\s*\\?%$", "", text)
    text = _SPACING.sub("", _APART.sub(";", _THOUSANDS.sub("", text)))
    text = re.sub(r"\\(frac|sqrt)(\d)(?=[\d{]|$)", r"\\\1{\2}", text)  # \frac12 is \frac{1}2
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"_\{(\w+)\}$", r"_\1", text)
    return _NAME.sub("", text)


def unit_of(answer: str) -> str | None:
    """Give the unit that an answer ends in, without its number; None if it has none."""
    match = _UNIT.search(answer.strip().strip("$ .\n"))
    unit = match and (match["text"] or match["word"])
    return unit.lower().rstrip("s.") if unit else None


def _compare(gold: str, answer: str, verifier: Verifier) -> tuple[bool, Rule]:
    """Go through the rules for mathematical answers."""
    if len(answer) > MAX_CHARACTERS:
        return False, Rule.UNREADABLE
    ours, theirs = normalize(gold), normalize(answer)
    units = {unit_of(gold), unit_of(answer)} - {None}
    if len(units) > 1:
        return False, Rule.DIFFERENT
    if ours == theirs:
        return True, Rule.TEXT
    if _INTEGER.fullmatch(ours) and _INTEGER.fullmatch(theirs):
        same = int(ours.replace(",", "")) == int(theirs.replace(",", ""))
        return same, Rule.INTEGER if same else Rule.DIFFERENT
    if _HEDGE.search(answer) and not _HEDGE.search(gold):
        return False, Rule.SEVERAL
    if _says_otherwise(ours, theirs):
        return False, Rule.DIFFERENT
    try:
        same = verifier.is_same(gold, answer)
    except VerifierTimeout:
        return False, Rule.TIMEOUT
    except VerifierError:
        return False, Rule.UNREADABLE
    return same, Rule.MATH_VERIFY if same else Rule.DIFFERENT


def _says_otherwise(gold: str, answer: str) -> bool:
    """Say whether an answer differs in what math-verify passes over: a relation, a base, one side of an equation."""
    if _BASE.search(gold) or _BASE.search(answer):
        return True  # and the texts differ
    if _RELATION.search(answer) and not _RELATION.search(gold) and "(" not in gold and "[" not in gold:
        return True
    if "=" in gold or not _INTEGER.fullmatch(gold):
        return False
    sides = [side for side in answer.split("=") if _INTEGER.fullmatch(side)]
    return any(int(side.replace(",", "")) != int(gold.replace(",", "")) for side in sides)


_LETTER = re.compile(r"\(?([A-Z])(?:[).:,].*)?", re.DOTALL)


def _compare_letters(gold: str, answer: str) -> tuple[bool, Rule]:
    """Accept the one letter that is named, alone or before the option's text."""
    text = _TEXT.sub(r"\1", answer).strip().strip("$*").strip()
    letter = _LETTER.fullmatch(text)
    if letter is None:
        return False, Rule.UNREADABLE
    if re.match(r"\(?[A-Z]\)?[\s,/]*(?:(?:or|and)\b|[,/&])[\s(]*[A-Z]\b", text):
        return False, Rule.SEVERAL
    return letter[1] == gold, Rule.LETTER if letter[1] == gold else Rule.DIFFERENT
