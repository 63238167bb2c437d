"""Sentences of a trace, numbered so that a model can quote them instead of copying them."""

import re

# Starts at the first of a run of marks only: a page of dots is then read once and not once for each dot.
_BOUNDARY = re.compile(r"\n(?:[ \t]*\n)*|(?<![.?!…])[.?!…]++[\"'”’)\]}*_]*+[ \t]++(?=\S)|[。！？]++")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:e\.g|i\.e|cf|vs|resp|approx|Fig|Eq|Eqs|Sec|Thm|Dr|Mr|Mrs|Ms|Prof|St|No)\.$"
)
_LIST_NUMBER = re.compile(r"\s*[(*]*(?:\d{1,3}|[A-Za-z])[.)]+\s*")


def split_sentences(text: str) -> list[str]:
    """Split a text after sentences and at line ends. Joined, the sentences are the text, byte for byte.

    Whitespace after a sentence belongs to it, indentation to the line it indents. Abbreviations, and the numbers of a
    list, do not end one.
    """
    sentences, begin = [], 0
    for match in _BOUNDARY.finditer(text):
        if not match[0].startswith("\n"):
            said = text[max(begin, match.start() - 10) : match.start() + 1]
            if _ABBREVIATION.search(said) or _LIST_NUMBER.fullmatch(text, begin, match.end()):
                continue
        sentences.append(text[begin : match.end()])
        begin = match.end()
    if begin < len(text):
        sentences.append(text[begin:])
    return sentences


def number_sentences(sentences: list[str]) -> str:
    """Write sentences with their numbers from 1, one a line, as prompts show them."""
    return "\n".join(f"[{number}] {sentence.strip()}" for number, sentence in enumerate(sentences, start=1))
