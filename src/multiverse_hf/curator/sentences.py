"""Sentences of a trace, numbered so that a model can quote them by number."""

import re

# Matches only at the first of a run of marks, so that a page of dots is not read once per dot.
_LINE_END = r"(?:\r\n|[\n\r\x0b\x0c\x85\u2028\u2029])"
_BLANK = r"[^\S\n\r\x0b\x0c\x85\u2028\u2029]"  # white space within a line
_END = rf"{_LINE_END}(?:{_BLANK}*{_LINE_END})*"  # end of a line, with the blank lines after it
_BOUNDARY = re.compile(
    rf"{_END}|(?<![.?!…])[.?!…]++[\"'”’)\]}}*_]*+{_BLANK}++(?=\S)|[。！？]++[”’」』）]*+{_BLANK}*+(?:{_END})?"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[])(?:e\.g|i\.e|cf|vs|resp|approx|Fig|Eq|Eqs|Sec|Thm|Dr|Mr|Mrs|Ms|Prof|St|No)\.$"
)
_LIST_NUMBER = re.compile(r"\s*[(*]*(?:\d{1,3}|[A-Za-z])[.)]+\s*")


def split_sentences(text: str) -> list[str]:
    """Return a text split after sentences and at line ends. Joined, the sentences are the text, byte for byte.

    Whitespace after a sentence belongs to it; indentation belongs to its line. Abbreviations and list numbers do not
    end a sentence.
    """
    sentences, begin = [], 0
    for match in _BOUNDARY.finditer(text):
        if not match[0][0].isspace():
            said = text[max(begin, match.start() - 10) : match.start() + 1]
            if _ABBREVIATION.search(said) or _LIST_NUMBER.fullmatch(text, begin, match.end()):
                continue
        sentences.append(text[begin : match.end()])
        begin = match.end()
    if begin < len(text):
        sentences.append(text[begin:])
    return _without_blanks(sentences)


def _without_blanks(sentences: list[str]) -> list[str]:
    """Return sentences with blank ones joined to the sentence before, or to the first one."""
    said: list[str] = []
    for sentence in sentences:
        if said and (not sentence.strip() or not said[-1].strip()):
            said[-1] += sentence
        else:
            said.append(sentence)
    return said


def number_sentences(sentences: list[str]) -> str:
    """Return sentences with their numbers from 1, one per line, as prompts show them."""
    return "\n".join(f"[{number}] {sentence.strip()}" for number, sentence in enumerate(sentences, start=1))
