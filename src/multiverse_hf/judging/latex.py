"""Normalization of LaTeX and Unicode spellings in answers, and splitting at brackets."""

import re

_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "∠": r"\angle ", "′": "'", "’": "'",
    }
)  # fmt: skip
_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|lg|exp|det|gcd|max|min|deg|dim|ker|arg|inf|sup"
)
_FONT = r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|operatorname\*?|rm)"
_SUBSTITUTIONS = [
    (re.compile(pattern), with_)
    for pattern, with_ in (
        (r"√\s*\{", r"\\sqrt{"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\w+)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(?:pi|Pi)(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty "),
        (r"(?<=\d),\s*\\!\s*(?=\d{3})", ""),  # thousands
        (r"(?<=\d)\s*\^\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?o\}?\}?$", r"^\\circ"),  # degrees
        (r"²", "^2"),
        (r"³", "^3"),
        (r"\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|Bigl|Bigr)(?![a-zA-Z])\s*\.?(?=[(\[\])|\\{}.]|\s|$)", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])|\\!", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mbox|hbox|textbf|textit|textrm|textsf|texttt|textnormal)(?![a-zA-Z])", r"\\text"),
        (rf"(?<=\d)([\s~]*){_FONT}\s*\{{[\s~]*(sec|min|deg)[\s~]*\}}", r"\1\\text{\2}"),  # units here
        (rf"{_FONT}\s*\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
        (rf"{_FONT}\s*\{{([^{{}}\\^_]*[a-zA-Z.][\s~.][^{{}}\\^_]*)\}}", r"\\text{\1}"),
        (r"(?<=\d)\s*(?:\\[,;: ]|~)*(?:\\text\s*\{\s*to\s*\}|to)\s*(?=\d)", ":"),
        (rf"{_FONT}\s*\{{\s*(\\?[a-zA-Z]+|\d+)\s*\}}", None),
        (r"\{\s*\\rm\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge "),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le "),
        (r"\\ne(?![a-zA-Z])", r"\\neq "),
        (r"\\(?:varnothing)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"(?<=\d)(?<![_^]\d)(?:\\[, ]|\{,\}|~| )(?=\d{3}(?!\d))", ""),  # thousands
        # separated digits are no number; a mixed number has a fraction there
        (r"(?<=\d)(?<![_^]\d)(?:\s|\\(?:quad|qquad)(?![a-zA-Z])|\\[,;: ]|~)+(?=\d)(?!\d+\s*/)", " @ "),
        (r"\\(?:quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,;: ]|~", " "),
        (r"(\d)\s*\^\s*\{?\s*\\text\s*\{(?:st|nd|rd|th)\}\s*\}?", r"\1"),
        (r"\\text\s*\{([^{}]*?\w)\s+and\s+(\w[^{}]*)\}", r"\\text{\1}, \\text{\2}"),
        (r"\\text\s*\{([^{}]*?\w)\s+and\s*\}", r"\\text{\1}, "),
        (r"\\text\s*\{\s*and\s+(\w[^{}]*)\}", r", \\text{\1}"),
        (r"\\text\s*\{\s*,?\s*and\s*\}|(?<![a-zA-Z\\])and(?![a-zA-Z])(?=[^{}]*(?:\{|$))", ","),
        (r",\s*(?:,\s*)+", ", "),
        (r"\s+", " "),
    )
]
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_WORDS |= {"eleven": 11, "twelve": 12, "sixteen": 16}
_DIGIT_PARTS = (
    # \frac12 is \frac{1}{2}, \sqrt2 is \sqrt{2}
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*(?=\{)"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*([\da-zA-Z])"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
)


def clean(answer: str) -> str:
    """Return an answer without fonts, spacing, delimiters and a full stop, in one spelling."""
    text = answer.strip()
    for begin, end in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(begin) and text.rstrip(" .").endswith(end) and len(text) > len(begin + end):
            inner = text.rstrip(" .")
            if not (end == "$" and inner.endswith(r"\$")):
                text = inner[len(begin) : -len(end)].strip()
    if text.count("$") - text.count(r"\$") > 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = text.strip().rstrip(".").strip() if not text.endswith("...") else text
    text = text.translate(_UNICODE)
    for pattern, with_ in _SUBSTITUTIONS:
        text = pattern.sub(_unfont if with_ is None else with_, text)
    for pattern, with_ in _DIGIT_PARTS:
        text = pattern.sub(with_, text)
    text = re.sub(r"_\{?\s*\\text\s*\{\s*(?:base\s*)?(\w+)\s*\}\s*\}?$", _base_word, text)
    text = re.sub(r"^\s*\\text\s*\{\s*([-+\d.$][^{}]*)\}\s*$", r"\1", text)  # \text{5 cm}
    if re.fullmatch(r"\{[^{}]*(?<!\\)\}", text.strip()):
        text = text.strip()[1:-1]
    text = re.sub(r"^\(?(\d+)\)?_\{?10\}?$", r"\1", text.strip())  # base ten
    return text.strip(",;").strip()


def _unfont(match: re.Match[str]) -> str:
    """Return one letter without its font: \\mathrm{e} becomes e. A word stays text."""
    inside = match[1]
    return inside + " " if len(inside) == 1 or inside[0] == "\\" or inside.isdecimal() else rf"\text{{{inside}}}"


def _base_word(match: re.Match[str]) -> str:
    return f"_{_BASE_WORDS.get(match[1].lower(), match[1])}"


def unwrap_text(text: str) -> str:
    """Return a text with the content of each ``\\text{}`` in its place."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)


def compact(text: str) -> str:
    """Return a text for comparison, without spaces, ``\\text`` and braces of single characters."""
    text = re.sub(r"\s+", "", unwrap_text(text)).strip(".")
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return re.sub(r"_\{(\w+)\}$", r"_\1", text)


_WORDS = re.compile(r"(?:\s|\\text\s*\{[^{}\\$]*\}|[.!()])+")
_BARE_WORDS = re.compile(r"[A-Za-z][a-z]{4,}|[A-Za-z]{2,}(?: [A-Za-z']{2,})+")


def words_of(text: str) -> str | None:
    """Return the words of a verbal answer, or a letter in ``\\text{}``; None for mathematics."""
    inside = unwrap_text(text).strip()
    if not (("\\text" in text and _WORDS.fullmatch(text)) or _BARE_WORDS.fullmatch(inside)):
        return None
    words = re.sub(r"[^\w\s]", "", inside).split()
    words = words[1:] if len(words) > 1 and words[0].lower() in ("a", "an", "the") else words
    if not words or not any(char.isalpha() for char in inside):
        return None
    joined = "".join(words)
    return joined if len(joined) == 1 else joined.lower()


_NESTING = re.compile(
    r"(?P<open>\\\{|\\lbrace|\\langle|\\lfloor|\\lceil|\\begin\s*\{\w+\*?\}|[({\[])"
    r"|(?P<close>\\\}|\\rbrace|\\rangle|\\rfloor|\\rceil|\\end\s*\{\w+\*?\}|[)}\]])"
    r"|(?P<thousand>(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,]))|(?P<command>\\[a-zA-Z]+|\\.)|(?P<other>.)",
    re.DOTALL,
)


def split_top(text: str, at: str | tuple[str, ...] | None, *, thousands: bool = True) -> list[str]:
    """Return the parts of a text between signs that are outside all brackets.

    Args:
        text: the text.
        at: the signs; None splits after each closing bracket, so that one bracket is one part.
        thousands: whether ``1,000`` is one number.
    """
    pieces, begin, depth = [], 0, 0
    for match in _NESTING.finditer(text):
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if at is None and depth <= 0:
                pieces.append(text[begin : match.end()])
                begin = match.end()
        elif match["thousand"] and not thousands and depth == 0 and at is not None and "," in at:
            *items, last = match[0].split(",")
            pieces += [text[begin : match.start()] + items[0], *items[1:]]
            begin = match.end() - len(last)
        elif depth == 0 and at is not None and match[0] in at:
            pieces.append(text[begin : match.start()])
            begin = match.end()
    rest = text[begin:]
    if at is not None or rest.strip():
        pieces.append(rest)
    return [piece.strip() for piece in pieces]


def max_depth(text: str) -> int:
    """Return the greatest depth of nested brackets."""
    depth = most = 0
    for match in _NESTING.finditer(text):
        depth += bool(match["open"]) - bool(match["close"])
        most = max(most, depth)
    return most


_MATRIX = re.compile(
    r"\\begin\s*\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|]+\})?(?P<body>.*)\\end\s*\{(?P=kind)\}",
    re.DOTALL,
)


def find_matrix(text: str) -> tuple[str, list[list[str]]] | None:
    """Return kind and rows of a text that is one matrix, None if it is none."""
    inner = re.sub(r"^[(\[]\s*(?=\\begin)|(?<=\})\s*[)\]]$", "", text.strip())
    match = _MATRIX.fullmatch(inner)
    if match is None or "\\begin" in match["body"]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match["body"]) if row.strip()]
    kind = "determinant" if match["kind"] in ("vmatrix", "Vmatrix") else "matrix"
    return (kind, [[cell.strip() for cell in row.split("&")] for row in rows]) if rows else None
