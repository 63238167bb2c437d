"""The answer of a document against its original's: equal text, or equal to math-verify in a process of its own."""

import asyncio
import contextlib
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.data.records import read_answer
from multiverse_hf.documents import Document, Text

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
    """Give the answer that a text states, else its last line."""
    return stated_answers(text) or [text.rstrip().rpartition("\n")[2].strip()]


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


def _equal(ours: str, theirs: str) -> bool:
    """Compare two answers. Runs in a process of the pool, whose main thread math-verify's own timeouts need."""
    from math_verify import parse, verify

    gold, found = (parse(text if "\\boxed" in text or "$" in text else f"${text}$") for text in (ours, theirs))
    return bool(gold and found and verify(gold, found))


def _end_with(parent: int) -> None:
    from multiverse_hf.jobs.processes import end_with

    end_with(parent)


class AnswerChecker:
    """Compares answers; what takes longer than ``timeout_s`` is not equal. To be closed."""

    def __init__(self, timeout_s: float = 15.0) -> None:
        self.timeout_s = timeout_s
        self._pool: ProcessPoolExecutor | None = None
        self._turn = asyncio.Lock()

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
        await self._compare(final_answers(original), final_answers(sequential))
        gold = stated_answers(original) or (answer and (stated_answers(answer) or [answer.strip()]))
        if not gold:
            return
        texts = (piece.text for piece in document.walk() if isinstance(piece.node, Text))
        if found := stated_answers("".join(texts)):
            await self._compare(gold, found)
        for block, _ in document.blocks():  # conclusions are a model's own words
            for said in concluded_answers(block.conclusion.text):
                await self._compare(gold, [said])

    async def _compare(self, gold: list[str], found: list[str]) -> None:
        if gold == found:
            return
        if len(gold) == len(found):
            async with self._turn:
                if all([await self._equal(one, other) for one, other in zip(gold, found, strict=True)]):
                    return
        raise Refusal("answer", f"the answer is {', '.join(found)!r:.120}, in the original {', '.join(gold)!r:.120}")

    async def _equal(self, ours: str, theirs: str) -> bool:
        if ours == theirs:
            return True
        if self._pool is None:
            # spawned: a fork of a process with threads and open connections may hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                1, context, initializer=_end_with, initargs=(multiprocessing.current_process().pid,)
            )
        future = asyncio.get_running_loop().run_in_executor(self._pool, _equal, ours, theirs)
        try:
            return await asyncio.wait_for(future, self.timeout_s)
        except (TimeoutError, BrokenProcessPool):
            self.close()
            return False

    def close(self) -> None:
        """End the pool, whatever it is at."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                with contextlib.suppress(OSError):
                    process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
