"""Compares mathematical expressions in a process of its own, which may be killed at any time.

Run as a script: it imports math-verify and nothing of this package, so it starts quickly. A line of standard input is
``[gold, answer]``, the line it writes for it ``[is the same, why not]``.
"""

import json
import sys

# math-verify's own timeouts are signals, which long computations in C do not see, and what they cut off counts as
# different. Here the process is killed. None, its word for never, is an error in versions before 0.7.
NEVER_S = 3600
MEMORY = 4 << 30  # bytes; a tower of powers takes all there is before it takes long


def compare(gold: str, answer: str) -> tuple[bool, str | None]:
    """Say whether math-verify holds two answers to be the same, and if it reads one of them at all."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    parsed = [parse(f"${text}$", configs, parsing_timeout=NEVER_S) for text in (gold, answer)]
    for text, values in zip(("gold answer", "answer"), parsed, strict=True):
        if not values:
            return False, f"the {text} cannot be read"
    return bool(verify(*parsed, timeout_seconds=NEVER_S)), None


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # Windows and some systems have no such limit
        pass
    import logging

    logging.disable(logging.WARNING)  # math-verify warns at each call without a timeout
    out, sys.stdout = sys.stdout, sys.stderr
    compare("1", "1")  # imports, before the first clock runs
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        try:
            reply = compare(*json.loads(line))
        except (Exception, RecursionError) as err:
            reply = (False, f"{type(err).__name__}: {err}"[:200])
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
