"""The options that an answer names. A word of one letter is no option."""

import re

_FONT = re.compile(r"\\(?:text\w*|mbox|math\w+|boldsymbol|bm)\s*\{([^{}]*)\}")
_OPTIONS = "A-D"
_BEFORE_LETTER = re.compile(
    r"^(?:(?:the|my|final|correct|best|right)\s+)*(?:answer|option|choice|letter|both|either)\s*(?:is|:|-)?\s*", re.I
)
_ONE = rf"[(\[{{<`]?\s*(?P<letter>[{_OPTIONS}])(?:\s*[)\]}}>`])?"
_SEPARATOR = r"(?:\s*(?:[,;/&+]|\bor\b|\band\b|\beither\b|\boption\b|\bchoice\b))+\s*"
_LIST = re.compile(
    rf"(?:{_SEPARATOR}{_ONE.replace('?P<letter>', '')}(?![\w']))+(?=\s*(?:[:;!?,()\n]|\.(?!\s*[a-z])|$))", re.I
)
_OR = re.compile(rf"\s+(?:or|and)\s+(?:option\s+|choice\s+)?[(\[]?(?P<letter>(?-i:[{_OPTIONS}]))(?![\w'])", re.I)
_LATER = re.compile(rf"\b(?:or|and)\s+(?:option\s+|choice\s+)?[(\[]\s*(?P<letter>[{_OPTIONS}])\s*[)\]]", re.I)


def read_letters(answer: str) -> set[str]:
    """Return the options that an answer names at its beginning. The option's text may follow a letter.

    A letter may be a word: in "(B), A reagent" and in "B, a reagent" the second letter is an article. It is an option
    only if it is in brackets, or if no further text follows it.
    """
    text = _FONT.sub(r"\1", _FONT.sub(r"\1", answer))
    text = re.sub(r"\*\*|[$`\\]", "", re.sub(r"~|\\[,;: ]|\\q?quad\b", " ", text)).strip(" .*!?#\"'“”‘’")
    text = _BEFORE_LETTER.sub("", text, count=1)
    first = re.match(_ONE, text, re.I)
    if first is None:
        return set()
    rest = text[first.end() :]
    bare = first[0].strip() == first["letter"]
    is_set_off = not bare or re.match(r"\s*(?:$|[.:,;/&+\-–—−(=])|\s+(?:or|and|is|because)\b", rest, re.I)
    # "B polygenic score" names B; "A reagent", "a reagent" and "Both" name nothing
    if not is_set_off and not (re.match(r"\s", rest) and first["letter"] in "BCD"):
        return set()
    letters = {first["letter"].upper()}
    if joined := _LIST.match(rest):
        letters |= {
            letter.upper() for letter in re.findall(rf"(?<![a-zA-Z'])[{_OPTIONS}](?![a-zA-Z'])", joined[0], re.I)
        }
    elif joined := _OR.match(rest):
        letters.add(joined["letter"])
    return letters | {match["letter"].upper() for match in _LATER.finditer(rest)}
