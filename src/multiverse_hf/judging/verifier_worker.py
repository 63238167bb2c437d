"""Compares mathematical expressions in a separate process, which may be killed at any time.

It is run as a script. It imports math-verify and nothing of this package, so it starts quickly. Each line of standard
input is ``[gold, answer, search]``, and its reply is ``[equal, reason]``. With ``search`` both are prose, and
math-verify looks for an expression in each.

math-verify 0.9 reads and compares. Two things are stricter than its defaults. An expression is read as a whole or not
at all: its own search takes a number from an unreadable text, and drops units and single letters. Equal values must
agree to 30 relative digits: math-verify compares 15, and 6 of decimals.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# math-verify's own timeouts are signals, which long computations in C ignore, and a cut-off comparison counts as
# different. Here the process is killed instead.
NEVER_S = 3600
CPU_S = 120  # of one comparison: an end even if the process that would kill this one was killed
MEMORY = 4 << 30  # bytes; a tower of powers fills the memory before it takes long
DIGITS = 40  # digits of computed numbers
SAME = 1e-30  # greatest relative difference of equal numbers
MIN_ROUNDED_DIGITS = 6  # of a rounded irrational number, as MIN_DIGITS of judging/exact.py

_DECIMAL = re.compile(r"(?<![\w.\\])(\d*)\.(\d+)(?![\d.])")
_LONE_DECIMAL = re.compile(r"\s*([-+]?)\s*(\d*)\.(\d+)\s*")


def read(text: str) -> Any:
    """Return the expression of a text, with decimals as fractions. Raise any error if it cannot be read."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from sympy import Basic, I

    text = _DECIMAL.sub(lambda match: rf"{{\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}}}", text)
    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    parts = re.split(r"(?<![\\<>!])=", text)
    if len(parts) > 2 and not re.search("[,;]", text):
        text = parts[-1]
    text = normalize_latex(text, config)
    value = latex2sympy(
        text, is_real=not should_treat_as_complex(text), convert_degrees=False, normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),  # R and r are two
    )  # fmt: skip
    if isinstance(value, Basic):
        value = value.subs({symbol: I for symbol in value.free_symbols if symbol.name == "i"})
    return value


def compare_expressions(gold: str, answer: str) -> tuple[bool, str | None]:
    """Return whether math-verify finds two answers equal, and which one it cannot read."""
    from math_verify import verify

    read_: list[Any] = []
    for name, text in (("gold answer", gold), ("answer", answer)):
        try:
            read_.append(read(text))
        except (MemoryError, RecursionError):
            raise
        except Exception:  # the parser raises many kinds
            return False, f"the {name} cannot be read"
    if is_rounded(gold, read_[1]) or is_rounded(answer, read_[0]):
        return True, None
    same = verify(
        *read_, float_rounding=DIGITS, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=NEVER_S
    )
    return bool(same) and not differ(*read_), None


def compare_prose(gold: str, answer: str) -> tuple[bool, str | None]:
    """Return whether math-verify finds equal expressions in two texts of prose."""
    from math_verify import parse, verify

    found = [
        parse(text if "\\boxed" in text or "$" in text else f"${text}$", parsing_timeout=NEVER_S)
        for text in (gold, answer)
    ]
    return bool(all(found) and verify(*found, timeout_seconds=NEVER_S)), None


def is_rounded(text: str, value: Any) -> bool:
    """Return whether a text is the rounded decimal of an irrational number."""
    from sympy import Expr, Rational

    match = _LONE_DECIMAL.fullmatch(text)
    if match is None or len((match[2] + match[3]).lstrip("0")) < MIN_ROUNDED_DIGITS:
        return False
    if not isinstance(value, Expr) or value.free_symbols or value.is_Rational:
        return False
    number = value.evalf(DIGITS)
    if not number.is_Float:
        return False
    decimal = Rational(f"{match[1]}{match[2] or 0}.{match[3]}")
    return abs(number - decimal) <= Rational(1, 2 * 10 ** len(match[3]))


def differ(gold: Any, answer: Any) -> bool:
    """Return whether two expressions have different values, with variables at some point."""
    from sympy import Eq, Expr, Integer, Rational

    gold, answer = (each.rhs if isinstance(each, Eq) and each.lhs.is_Symbol else each for each in (gold, answer))
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for shift in (3, 5) if symbols else (0,):
        place = {symbol: Rational(shift + 7 * k, 11 + k) for k, symbol in enumerate(symbols)}
        try:
            values = [each.subs(place).doit().evalf(DIGITS) for each in (gold, answer)]
            # a sum that cancels out leaves a number without an exact digit
            values = [Integer(0) if value.is_Float and value._prec == 1 else value for value in values]
            if not all(value.is_number and value.is_finite for value in values):
                continue
            if abs(values[0] - values[1]) > SAME * max(abs(values[0]), abs(values[1])):
                return True
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            continue
    return False


def limit(name: str, value: int) -> None:
    """Limit a resource of this process, if the system supports it."""
    try:
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    except (ImportError, ValueError, OSError):  # Windows and some systems have no such limit
        pass


def serve(reply: Callable[..., tuple[Any, str | None]], start: Callable[[], Any], memory: int = MEMORY) -> None:
    """Answer each line of standard input, a JSON list of arguments, with a line of JSON: value, reason of none.

    Args:
        reply: answers a request.
        start: imports what is needed, before the first clock runs.
        memory: bytes that this process may take.
    """
    limit("RLIMIT_AS", memory)
    out, sys.stdout = sys.stdout, sys.stderr  # printed lines must not look like replies
    start()
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        limit("RLIMIT_CPU", int(time.process_time()) + CPU_S)
        try:
            answer = json.dumps(reply(*json.loads(line)))
        except (Exception, RecursionError) as err:
            answer = json.dumps((None, f"{type(err).__name__}: {err}"[:200]))
        print(answer, file=out, flush=True)


def answer_request(gold: str, answer: str, search: bool) -> tuple[bool, str | None]:
    """Return whether two answers are equal, and the reason if there is no verdict."""
    return compare_prose(gold, answer) if search else compare_expressions(gold, answer)


def main() -> None:
    import logging

    logging.disable(logging.WARNING)  # math-verify warns at each call without a timeout
    serve(answer_request, lambda: compare_expressions("x", "1"))


if __name__ == "__main__":
    main()
