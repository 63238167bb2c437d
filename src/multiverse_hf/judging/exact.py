"""Rational numbers in answers, read exactly: no floats, so ``0.1`` is not ``0.10000001``.

It reads integers, decimals (repeating ones too), fractions, mixed numbers, scientific notation, and their sums,
products, quotients, integer powers and factorials. Everything else is left to math-verify.
"""

import math
import re
from fractions import Fraction

MAX_BITS = 200_000  # of a number; towers of powers are not computed here
MIN_DIGITS = 6  # of a decimal that may be the rounded value of a non-terminating number

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:\\overline\s*\{(?P<repeat>\d+)\})?"
    r"(?:[eE](?P<power>[+-]?\d{1,5})(?![\w.]))?"
    r"|(?P<name>\\frac|\\cdot|\\times|\\div)(?![a-zA-Z])|(?P<scale>hundred|thousand|million|billion|trillion)\b"
    r"|(?P<sign>[-+*/^(){}!]))"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)")


class _NotRational(Exception):
    pass


def exact_value(text: str) -> Fraction | None:
    """Return the rational number in a text, None if it is no such number or too large."""
    if len(text) > 4000:
        return None
    text = _MIXED.sub(lambda match: rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}", text, count=1)
    try:
        return _Reader(text).read()
    except (_NotRational, ZeroDivisionError, RecursionError):
        return None


def is_decimal(text: str) -> bool:
    """Return whether a text is a decimal with enough digits to be a rounded value."""
    match = re.fullmatch(r"[-+]?(\d*)\.(\d+)", text.strip())
    return match is not None and len((match[1] + match[2]).lstrip("0")) >= MIN_DIGITS


def same_number(ours: str, theirs: str, a: Fraction, b: Fraction) -> bool:
    """Return whether two numbers are equal, or one is the rounded decimal of the other, non-terminating one."""
    if a == b:
        return True
    for text, decimal, other in ((ours, a, b), (theirs, b, a)):
        if is_decimal(text) and not _ends(other):
            digits = len(text.strip().partition(".")[2])
            return round(other, digits) == decimal
    return False


def _ends(value: Fraction) -> bool:
    """Return whether a number is a terminating decimal."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


class _Reader:
    """Reads a text from left to right, one method for each level of precedence."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, re.Match[str]]] = []
        end = 0
        text = text.strip()
        while end < len(text):
            match = _TOKEN.match(text, end)
            if match is None or match.end() == end:
                raise _NotRational
            kind = match.lastgroup if match["number"] is None else "number"
            self.tokens.append((kind, match[kind], match))
            end = match.end()
        self.place = 0

    def read(self) -> Fraction:
        value = self.sum()
        if self.place < len(self.tokens):
            raise _NotRational
        return value

    def next(self) -> str | None:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else None

    def kind(self) -> str | None:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else None

    def take(self, *words: str) -> str | None:
        if self.next() in words and self.kind() != "number":
            self.place += 1
            return self.tokens[self.place - 1][1]
        return None

    def expect(self, word: str) -> None:
        if self.take(word) is None:
            raise _NotRational

    def sum(self) -> Fraction:
        sign = -1 if self.take("-", "+") == "-" else 1
        value = sign * self.product()
        while sign := self.take("+", "-"):
            value = bounded(value + (self.product() if sign == "+" else -self.product()))
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if self.take("*", r"\cdot", r"\times"):
                value = bounded(value * self.signed())
            elif self.take("/", r"\div"):
                value = bounded(value / self.signed())
            elif self.kind() == "scale":
                value *= _SCALES[self.tokens[self.place][1]]
                self.place += 1
            elif self.next() in ("(", r"\frac") and self.kind() != "number":
                value = bounded(value * self.power())
            else:
                return value

    def signed(self) -> Fraction:
        return -self.power() if self.take("-") else self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.take("^"):
            exponent = self.exponent()
            if exponent.denominator != 1:
                raise _NotRational
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(base) != 1 and base and size * abs(exponent) > MAX_BITS:
                raise _NotRational
            if abs(exponent) > MAX_BITS:
                exponent = exponent % 2 if base else abs(exponent)  # of 0, 1 and -1
            base = base ** int(exponent)
        if self.take("!"):
            if base.denominator != 1 or not 0 <= base <= 2000:
                raise _NotRational
            base = Fraction(math.factorial(int(base)))
        return base

    def exponent(self) -> Fraction:
        if self.take("-"):
            return -self.exponent()
        if self.kind() == "number":
            return self.number()
        return self.atom()

    def atom(self) -> Fraction:
        if self.kind() == "number":
            whole = self.number()
            text = self.tokens[self.place - 1][1]
            # a numeral and a fraction of numerals are a mixed number: 2\frac{1}{3} is 7/3
            if self.next() == r"\frac" and text.isdecimal():
                before = self.place
                self.place += 1
                top, bottom = self.numeral(), self.numeral()
                if top is not None and bottom and top < bottom:
                    return whole + Fraction(top, bottom)
                self.place = before
            return whole
        if self.take(r"\frac"):
            return bounded(self.group() / self.group())
        if self.take("("):
            value = self.sum()
            self.expect(")")
            return value
        return self.group()

    def group(self) -> Fraction:
        self.expect("{")
        value = self.sum()
        self.expect("}")
        return value

    def numeral(self) -> int | None:
        """Return the integer of ``{12}``, as in a mixed number's fraction, None for other tokens."""
        words = self.tokens[self.place : self.place + 3]
        if len(words) == 3 and words[0][1] == "{" and words[1][1].isdecimal() and words[2][1] == "}":
            self.place += 3
            return int(words[1][1])
        return None

    def number(self) -> Fraction:
        match = self.tokens[self.place][2]
        self.place += 1
        text, repeat, power = match["number"].replace(",", ""), match["repeat"], int(match["power"] or 0)
        value = Fraction(text if text[-1] != "." else text[:-1])
        if repeat:
            if "." not in text:
                raise _NotRational
            places = len(text.partition(".")[2])
            value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10**places)
        return bounded(value * Fraction(10) ** power)


def bounded(value: Fraction) -> Fraction:
    """Return a number; raise if it is too large."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotRational
    return value
