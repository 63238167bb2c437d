"""Sentences of record at the end of a prompt, which ask for a form of answer (Multiverse-1K)."""

from enum import StrEnum

PARALLEL_SUFFIX = "Think step by step and in parallel before answering."
SEQUENTIAL_SUFFIX = "Think step by step before answering."


class Suffix(StrEnum):
    """Sentence of record at the end of a prompt."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    NONE = "none"

    def end(self, text: str) -> str:
        """Return a prompt that ends with the sentence. A prompt that ends with either sentence is unchanged."""
        if self is Suffix.NONE or text.endswith((PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX)):
            return text
        return f"{text} {PARALLEL_SUFFIX if self is Suffix.PARALLEL else SEQUENTIAL_SUFFIX}"

    def exchange(self, text: str) -> str:
        """Return a prompt that ends with the sentence, in place of the one it may have."""
        if self is Suffix.NONE:
            return text
        return self.end(text.removesuffix(PARALLEL_SUFFIX).removesuffix(SEQUENTIAL_SUFFIX).rstrip())
