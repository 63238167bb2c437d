"""Checks a document's answer against the original's, by the rules that judge an evaluation."""

import asyncio
import re
from fractions import Fraction

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.curator.sentences import split_sentences
from multiverse_hf.data.records import read_answer
from multiverse_hf.documents import Document, Text
from multiverse_hf.judging.boxes import boxed
from multiverse_hf.judging.equality import compare_answers
from multiverse_hf.judging.exact import exact_value
from multiverse_hf.judging.verifier import Verifier, VerifierError

# "the answer is 42", "**Answer:** 42"; up to the end of the sentence or line
_STATED = re.compile(
    r"\banswer(?:\s+is(?:,?\s+(?:therefore|thus|then|hence|indeed|also|simply|just|clearly|exactly)\b,?)?|\**\s*[:=])"
    r"[\s*]*(?!\$?\\boxed)(\S[^\n]*?)(?=[.;,]?\**(?:\s*$|\s*\n|[.;,]\s))",
    re.IGNORECASE | re.MULTILINE,
)
_VALUE = re.compile(r"[-+(]*\s*(?:[\d.\\]|\w\s*=)")  # how a value begins; "at least 40" states none
# "Total: 42", "the sum is 42", "a + b = 42", "**42**": ends of a sentence that concludes with an integer
_PLAIN = re.compile(
    r"(?:(?<![<>!])=|\b(?:total|sum|result|value|count)\**(?:\s+is|\s*[:=]))[\s*$]*(-?\d[\d,]{0,30})[\s*$.!]*$"
    r"|\*\*\$?(-?\d[\d,]{0,30})\$?[.!]?\*\*[.!]?\s*$",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d[\d,]{0,30}(?:\.\d{1,30})?")
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def stated_answers(text: str) -> list[str]:
    """Return the stated answers: of a last line ``Answer: ...``, else of the last line with a box."""
    if (answer := read_answer(text)) is not None:
        return boxed(answer) or [answer]
    if (begin := text.rfind("\\boxed")) >= 0:
        line = text.rfind("\n", 0, begin) + 1
        return boxed(text[line:].partition("\n")[0]) or [text[line:].strip()]
    return []


def final_answers(text: str) -> list[str]:
    """Return the answers that a text states, else its last sentence."""
    return stated_answers(text) or [sentence.strip() for sentence in split_sentences(text.rstrip())[-1:]]


def concluded_answers(text: str, gold: str, original: str) -> list[str]:
    """Return every answer that a conclusion states.

    These are boxes, texts after ``Answer:`` and "the answer is ...". If the right answer is an integer, an integer at
    the end of the last sentence counts too: ``Total: 42``, ``... = 42.``, ``**42**``. Conclusions also state
    intermediate results, so such an integer counts only if the reasoning does not contain it.

    Args:
        text: the conclusion.
        gold: the right answer.
        original: the reasoning.
    """
    stated = [match[1].rstrip(".,;:!$* ").lstrip("$ ") for match in _STATED.finditer(text)]
    value = exact_value(gold.strip("$ ."))
    if value is not None:
        stated = [said for said in stated if _VALUE.match(said)]
    sentences = split_sentences(text.rstrip())
    if value is not None and value.denominator == 1 and sentences and (match := _PLAIN.search(sentences[-1])):
        said = (match[1] or match[2]).rstrip(",")
        known = {round(Fraction(number.replace(",", ""))) for number in _NUMBER.findall(original)} | {abs(value)}
        known |= {number for number, word in enumerate(_WORDS) if re.search(rf"\b{word}\b", original, re.IGNORECASE)}
        if abs(int(said.replace(",", ""))) not in known:
            stated.append(said)
    return boxed(text) + stated


class AnswerChecker:
    """Compares answers. A comparison longer than ``timeout_s`` counts as different. Close it after use."""

    def __init__(self, timeout_s: float = 15.0) -> None:
        self.timeout_s = timeout_s
        self._verifier = Verifier()

    async def check(self, original: str, sequential: str, document: Document, answer: str | None = None) -> None:
        """Check that a document's sequential text has the original's answer, and that no conclusion states another.

        Args:
            original: the original reasoning.
            sequential: the document's sequential text.
            document: the document with its conclusions.
            answer: the answer after the reasoning, if there is one.

        Raises:
            Refusal: if they differ, with both answers.
        """
        are_stated = bool(stated_answers(original) and stated_answers(sequential))
        await self._compare(final_answers(original), final_answers(sequential), is_prose=not are_stated)
        stated = stated_answers(original) or (answer and stated_answers(answer))
        gold = stated or (answer and [answer.strip()])
        if not gold:
            return
        texts = (piece.text for piece in document.walk() if isinstance(piece.node, Text))
        if found := stated_answers("".join(texts)):
            await self._compare(gold, found, is_prose=not stated)
        for block, _ in document.blocks():  # conclusions are a model's own words
            for said in concluded_answers(block.conclusion.text, gold[-1], original):
                is_boxed = said in boxed(block.conclusion.text)
                if said not in gold:  # it may state one of several
                    await self._compare(gold, [said], is_prose=not (stated and is_boxed))

    async def _compare(self, gold: list[str], found: list[str], *, is_prose: bool) -> None:
        if gold == found:
            return
        if len(gold) == len(found):
            pairs = list(zip(gold, found, strict=True))
            if await asyncio.to_thread(lambda: all(self._equal(*pair, is_prose) for pair in pairs)):
                return
        raise Refusal("answer", f"the answer is {', '.join(found)!r:.120}, in the original {', '.join(gold)!r:.120}")

    def _equal(self, ours: str, theirs: str, is_prose: bool) -> bool:
        """Return whether two answers are equal. In prose, compare the expressions that math-verify finds."""
        self._verifier.timeout_s = self.timeout_s
        if ours == theirs or compare_answers(ours, theirs, self._verifier)[0]:
            return True
        try:
            return is_prose and self._verifier.is_same(ours, theirs, search=True)
        except VerifierError:
            return False

    def close(self) -> None:
        """End the process that compares, even during a comparison."""
        self._verifier.close()
