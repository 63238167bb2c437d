"""The final answer of a document, and whether it is right. Every verdict names the rule that decided.

The answer is read after the thinking (``</Think>``, and the tags of other models: ``<think>``, ``<thinking>``,
``<thought>``, ``<reasoning>``, ``[THINK]``, in any case). Without thinking, the whole text is read. If the thinking is
not closed, there is no answer, so a cut-off answer is wrong in every mode. The answer is the last ``\\boxed{...}``,
else the text after the last ``Answer:`` at the start of a line.

A mathematical answer is right if one of these rules accepts it. The first such rule is recorded:

=============== ====================================================================================================
``text``        the text of the right answer, apart from spaces, fonts, ``\\left``, a name (``x =``), and a unit that
is
                spelled differently or omitted
``integer``     both are equal integers, apart from leading zeros and thousands separators
``number``      both are exactly equal rational numbers, times or ratios; ``0.333333`` is one third: a decimal of six
                digits or more may be the rounded value of a non-terminating number
``parts``       both are lists, tuples, intervals, sets or matrices, and each part is right by a rule above
``math-verify`` math-verify finds them, or parts of them, equal, in a process with a time limit
=============== ====================================================================================================

It is wrong by one of these rules:

=================== ================================================================================================
``no answer``       there is no box and no ``Answer:`` in the text that is read
``several answers`` it hedges, "3 or 4", "3 (or 5)", and there is one right answer
``timeout``         math-verify took too long
``unreadable``      math-verify cannot read it
``different``       it differs
=================== ================================================================================================

Lists may have any order; tuples and vectors may not. A different unit is wrong (10 cm, 10 m, 10 cm^2), a missing one
is not. A percentage is the number before the sign, or a hundredth of it. Of several boxes the last one counts. Boxes
joined only by "or" are a hedge; boxes joined only by "and" or a comma are one list.

A letter is right if it is the only letter that is boxed or follows ``Answer:``, alone or before the option's text
(rule ``letter``). Chains are right if the last line is ``Answer:`` and exactly the number (rule ``last line``). Exact
answers are right as the same text, apart from spaces (rule ``text``).

An answer to a problem of reasoning-gym is scored by the generator's ``score_answer``. It is right if the score is 1
(rule ``reasoning-gym``). If the right answer has several lines, all lines after ``Answer:`` are read. ``\\text{}``
around the whole answer is removed. The score is 0 by the rules ``no answer``, ``timeout``, and ``unreadable``, which
means that ``score_answer`` fails.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from multiverse_hf.data.chains import read_chains_answer
from multiverse_hf.judging.boxes import last_boxed
from multiverse_hf.judging.equality import Rule, compare_answers
from multiverse_hf.judging.letters import read_letters
from multiverse_hf.judging.verifier import Verifier, VerifierError, VerifierTimeout

# Raised when verdicts change, and recorded with every run. Version 1 was math-verify 0.5.2 on whole answers.
RULES_VERSION = 2


class AnswerKind(StrEnum):
    """The kind of answer that a task asks for."""

    MATH = "math"
    LETTER = "letter"
    CHAINS = "chains"
    EXACT = "exact"
    REASONING_GYM = "reasoning-gym"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        correct: whether the answer is right.
        rule: the rule that decided.
        answer: the answer as it was read; None if there is none.
        score: score from 0 to 1; None by rules that give none.
    """

    correct: bool
    rule: Rule
    answer: str | None
    score: float | None = None


def judge(
    kind: AnswerKind, gold: str, document: str, verifier: Verifier, score: Callable[[str], float] | None = None
) -> Verdict:
    """Judge an answer.

    Args:
        kind: kind of the task's answers.
        gold: the right answer.
        document: the answer as generated, with tags.
        verifier: compares mathematical answers.
        score: scores answers of the kind ``reasoning-gym``.
    """
    if kind is AnswerKind.REASONING_GYM:
        return _score(final_answer(document, all_lines="\n" in gold.strip()), score)
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


# Reading the answer

_ANSWER_LINE = re.compile(
    r"^[ \t]*#*[ \t]*\**(?:the )?(?:final |correct )?answer(?: is)?\**[ \t]*[:：][ \t]*\**[ \t]*", re.I | re.MULTILINE
)
# Tags of thinking of Multiverse and other models
_THINKING = re.compile(
    r"<\s*(?P<close>/?)\s*(?:think|thinking|thoughts?|reasoning)(?:\s+\w+=[^<>\n]{0,40})?\s*>"
    r"|\[(?P<end>/?)(?-i:THINK)\]|◁(?P<last>/?)think▷|<\|(?:begin|(?P<ended>end))_of_thought\|>",
    re.I,
)


def final_answer(document: str, all_lines: bool = False) -> str | None:
    """Return a document's final answer, None if it has none; see this module's docstring.

    Args:
        document: the document.
        all_lines: all lines after ``Answer:`` are the answer, not only the first.
    """
    text = after_thinking(document)
    if text is None:
        return None
    if (boxed := last_boxed(text)) is not None:
        return boxed or None
    if not (lines := list(_ANSWER_LINE.finditer(text))):
        return None
    if all_lines:
        return text[lines[-1].end() :].strip("\n").rstrip() or None
    rest = text[lines[-1].end() :].strip()
    return rest.splitlines()[0].strip().strip("*").strip() or None if rest else None


def after_thinking(document: str) -> str | None:
    """Return the text after the thinking, or the whole text without any; None if the thinking is not closed."""
    marks = list(_THINKING.finditer(document))
    if not marks:
        return document
    return document[marks[-1].end() :] if any(marks[-1].groups()) else None


def opened_thinking(prompt: str) -> str:
    """Return the tag of thinking at a prompt's end, as some chat templates write it; "" if there is none."""
    marks = list(_THINKING.finditer(prompt))
    if not marks or any(marks[-1].groups()) or prompt[marks[-1].end() :].strip():
        return ""
    return prompt[marks[-1].start() :]


def _compare_letters(gold: str, answer: str) -> tuple[bool, Rule]:
    """Return whether an answer names only the right letter, and the rule that decided."""
    letters = read_letters(answer)
    if len(letters) > 1:
        return False, Rule.SEVERAL
    if not letters:
        return False, Rule.UNREADABLE
    return (True, Rule.LETTER) if letters == {gold.upper()} else (False, Rule.DIFFERENT)


def _score(answer: str | None, score: Callable[[str], float]) -> Verdict:
    """Return the verdict of reasoning-gym on an answer."""
    if answer is None:
        return Verdict(False, Rule.NO_ANSWER, None, 0.0)
    if wrapped := re.fullmatch(r"\\text\s*\{([^{}]*)\}", answer):
        answer = wrapped[1]
    try:
        value = score(answer)
    except VerifierError as err:
        return Verdict(False, Rule.TIMEOUT if isinstance(err, VerifierTimeout) else Rule.UNREADABLE, answer, 0.0)
    return Verdict(value == 1, Rule.REASONING_GYM, answer, value)
