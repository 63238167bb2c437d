"""The answer of a document against its original's, by the rules that judge an evaluation."""

import asyncio
import re

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.curator.sentences import split_sentences
from multiverse_hf.data.records import read_answer
from multiverse_hf.documents import Document, Text
from multiverse_hf.judging.equality import compare
from multiverse_hf.judging.verifier import Verifier, VerifierError

# "the answer is 42", "Answer: 42"; up to the end of the sentence or line
_STATED = re.compile(
    r"\banswer(?:\s+is|\s*[:=])\s*(?!\$?\\boxed)(\S[^\n]*?)(?=[.;,]?(?:\s*$|\s*\n|[.;,]\s))",
    re.IGNORECASE | re.MULTILINE,
)
_BOXED = re.compile(r"\\boxed\s*\{")


def stated_answers(text: str) -> list[str]:
    """Give the answer that a text states: on a last line ``Answer: ...``, else all in its last line with a box."""
    if (answer := read_answer(text)) is not None:
        return boxed(answer) or [answer]
    if begins := [match.start() for match in _BOXED.finditer(text)]:
        line = text.rfind("\n", 0, begins[-1]) + 1
        return boxed(text[line:].partition("\n")[0]) or [text[line:].strip()]
    return []


def final_answers(text: str) -> list[str]:
    """Return the answer that a text states, else its last sentence."""
    return stated_answers(text) or [sentence.strip() for sentence in split_sentences(text.rstrip())[-1:]]


def concluded_answers(text: str) -> list[str]:
    """Give every answer that a conclusion states: in a box, after ``Answer:``, or as "the answer is ..."."""
    return boxed(text) + [match[1].rstrip(".,;:!$ ").lstrip("$ ") for match in _STATED.finditer(text)]


def boxed(text: str) -> list[str]:
    """Give the contents of every ``\\boxed{...}``, with braces that match."""
    found = []
    for match in _BOXED.finditer(text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append(text[match.end() : end - 1].strip())
    return found


class AnswerChecker:
    """Compares answers; what takes longer than ``timeout_s`` is not equal. To be closed."""

    def __init__(self, timeout_s: float = 15.0) -> None:
        self.timeout_s = timeout_s
        self._verifier = Verifier()

    async def check(self, original: str, sequential: str, document: Document, answer: str | None = None) -> None:
        """Check that a document's sequential text has the original's answer, and that no conclusion states another.

        Args:
            original: the reasoning.
            sequential: that of the document.
            document: with the conclusions.
            answer: what follows the reasoning, if anything does.

        Raises:
            Refusal: if not, with both answers.
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
            for said in concluded_answers(block.conclusion.text):
                is_boxed = said in boxed(block.conclusion.text)
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
        """Compare two answers; of sentences, which say more than an answer, what math-verify finds in them."""
        self._verifier.timeout_s = self.timeout_s
        if ours == theirs or compare(ours, theirs, self._verifier)[0]:
            return True
        try:
            return is_prose and self._verifier.is_same(ours, theirs, search=True)
        except VerifierError:
            return False

    def close(self) -> None:
        """End the process that compares, whatever it is at."""
        self._verifier.close()
