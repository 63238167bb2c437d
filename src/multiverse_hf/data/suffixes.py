"""Sentences of record at the end of a prompt: they tell a model which form of answer is wanted (Multiverse-1K)."""

from enum import StrEnum

PARALLEL_SUFFIX = "Think step by step and in parallel before answering."
SEQUENTIAL_SUFFIX = "Think step by step before answering."


class Suffix(StrEnum):
    """Sentence of record at the end of a prompt."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    NONE = "none"

    def end(self, text: str) -> str:
        """End a prompt with the sentence; one that has either is left as it is."""
        if self is Suffix.NONE or text.endswith((PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX)):
            return text
        return f"{text} {PARALLEL_SUFFIX if self is Suffix.PARALLEL else SEQUENTIAL_SUFFIX}"

    def exchange(self, text: str) -> str:
        """End a prompt with the sentence, in place of the one it may have."""
        if self is Suffix.NONE:
            return text
        return self.end(text.removesuffix(PARALLEL_SUFFIX).removesuffix(SEQUENTIAL_SUFFIX).rstrip())
