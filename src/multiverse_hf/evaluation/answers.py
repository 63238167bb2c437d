"""What an answer says in the end, and whether that is right. Every verdict names the rule that gave it.

Where the answer is read: after the thinking (``</Think>``, and the tags of other models: ``<think>``, ``<thinking>``,
``<thought>``, ``<reasoning>``, ``[THINK]``, in any case); all of it where there is no thinking; nowhere where the
thinking is not closed, so that an answer that was cut off is wrong in every mode. There: the last ``\\boxed{...}``,
else what follows the last ``Answer:`` that begins a line.

Mathematical answers are right if one of these rules accepts them, and the first that does is recorded:

=============== ====================================================================================================
``text``        the same text as the right answer, apart from spaces, fonts, ``\\left``, a name (``x =``), and a unit
                that is spelled differently or left out
``integer``     both are integers and equal, whatever their leading zeros and thousands separators
``number``      both are rational numbers, times or ratios, and exactly equal; ``0.333333`` is one third: a decimal of
                six digits or more may be the rounded value of a number that has no last digit
``parts``       both are lists, tuples, intervals, sets or matrices whose parts are right, each by a rule above
``math-verify`` math-verify holds them, or parts of them, to be the same, in a process with a clock
=============== ====================================================================================================

and wrong by one of these:

=================== ================================================================================================
``no answer``       there is no box and no ``Answer:`` where the answer is read
``several answers`` it hedges, "3 or 4", "3 (or 5)", where the right answer is one
``timeout``         math-verify took too long
``unreadable``      math-verify cannot read it
``different``       it says something else
=================== ================================================================================================

Lists may come in any order, tuples and vectors may not. A unit that differs is wrong (10 cm, 10 m, 10 cm^2), one that
one side leaves out is not. A percentage is the number before the sign, or a hundredth of it.
Several boxes: the last one counts; boxes joined by nothing but "or" are alternatives, a hedge; boxes joined by
nothing but "and" or a comma are one list. Letters are right as the one letter that is boxed or follows ``Answer:``,
alone or before the option's text (rule ``letter``), chains if the last line is ``Answer:`` and exactly the number
(rule ``last line``). Exact answers are right as the same text, spaces apart (rule ``text``).
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from multiverse_hf.data.chains import read_chains_answer
from multiverse_hf.judging.boxes import last_boxed
from multiverse_hf.judging.equality import Rule, compare_answers
from multiverse_hf.judging.letters import read_letters
from multiverse_hf.judging.verifier import Verifier

# Raised with each change of a verdict: recorded with every run. 1 was math-verify 0.5.2 on whole answers.
RULES_VERSION = 2


class AnswerKind(StrEnum):
    """What kind of answer a task asks for."""

    MATH = "math"
    LETTER = "letter"
    CHAINS = "chains"
    EXACT = "exact"


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
        said = None if after_thinking(document) is None else read_chains_answer(document)
        if said is None:
            return Verdict(False, Rule.NO_ANSWER, None)
        return Verdict(str(said) == gold, Rule.LAST_LINE if str(said) == gold else Rule.DIFFERENT, str(said))
    answer = final_answer(document)
    if answer is None:
        return Verdict(False, Rule.NO_ANSWER, None)
    if kind is AnswerKind.EXACT:
        same = gold.split() == answer.split()
        return Verdict(same, Rule.TEXT if same else Rule.DIFFERENT, answer)
    if kind is AnswerKind.LETTER:
        return Verdict(*_compare_letters(gold, answer), answer)
    return Verdict(*compare_answers(gold, answer, verifier), answer)


# What an answer says

_ANSWER_LINE = re.compile(
    r"^[ \t]*#*[ \t]*\**(?:the )?(?:final |correct )?answer(?: is)?\**[ \t]*[:：][ \t]*\**[ \t]*", re.I | re.MULTILINE
)
# The tags of thinking, as Multiverse and other models write them
_THINKING = re.compile(
    r"<\s*(?P<close>/?)\s*(?:think|thinking|thoughts?|reasoning)(?:\s+\w+=[^<>\n]{0,40})?\s*>"
    r"|\[(?P<end>/?)(?-i:THINK)\]|◁(?P<last>/?)think▷|<\|(?:begin|(?P<ended>end))_of_thought\|>",
    re.I,
)


def final_answer(document: str) -> str | None:
    """Return what an answer says in the end, None if nothing; see this module's description."""
    text = after_thinking(document)
    if text is None:
        return None
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    if not (lines := list(_ANSWER_LINE.finditer(text))):
        return None
    rest = text[lines[-1].end() :].strip()
    return rest.splitlines()[0].strip().strip("*").strip() or None if rest else None


def after_thinking(document: str) -> str | None:
    """Return what follows the thinking, all of it where there is none; None if the thinking is not closed."""
    marks = list(_THINKING.finditer(document))
    if not marks:
        return document
    return document[marks[-1].end() :] if any(marks[-1].groups()) else None


def opened_thinking(prompt: str) -> str:
    """Return the tag of thinking that a prompt ends with, as chat templates of some models write it; "" if none."""
    marks = list(_THINKING.finditer(prompt))
    if not marks or any(marks[-1].groups()) or prompt[marks[-1].end() :].strip():
        return ""
    return prompt[marks[-1].start() :]


def _compare_letters(gold: str, answer: str) -> tuple[bool, Rule]:
    """Accept the one letter that is named, alone or before the option's text."""
    letters = read_letters(answer)
    if len(letters) > 1:
        return False, Rule.SEVERAL
    if not letters:
        return False, Rule.UNREADABLE
    return (True, Rule.LETTER) if letters == {gold.upper()} else (False, Rule.DIFFERENT)
