"""Compiles a grammar, for the server and, to try it first, in a separate process that may be killed at any time.

The process runs this file as a script, as ``verifier_worker.py`` does. A request is a vocabulary as xgrammar writes it
and a schema. The reply is the size of the compiled grammar in bytes, and the reason if there is none.
"""

import runpy
from pathlib import Path
from typing import Any

MAX_SPACE = 20  # white space in a row between two parts of an answer: a newline, and four spaces for four levels
MAX_SPACE_BEFORE = 8  # white space before an answer, such as the empty line after the reasoning
ADDRESSES = 16 << 30  # bytes; torch for CUDA maps several gigabytes when it is imported


def compile_schema(vocabulary: Any, schema: str) -> Any:
    """Return the compiled grammar of a JSON schema, after optional white space.

    Args:
        vocabulary: an ``xgrammar.TokenizerInfo``.
        schema: as :func:`~.schemas.read_schema` returns it.

    Raises:
        RuntimeError: if xgrammar refuses the schema.
    """
    import xgrammar

    grammar = xgrammar.Grammar.concat(
        xgrammar.Grammar.from_regex(rf"[ \n\r\t]{{0,{MAX_SPACE_BEFORE}}}"),
        xgrammar.Grammar.from_json_schema(schema, max_whitespace_cnt=MAX_SPACE),
    )
    return xgrammar.GrammarCompiler(vocabulary, cache_enabled=False).compile_grammar(grammar)


def measure_grammar(vocabulary: str, schema: str) -> tuple[int, str | None]:
    """Return how many bytes the compiled grammar of a schema takes, and a reason if nothing keeps to it."""
    import xgrammar

    grammar = compile_schema(xgrammar.TokenizerInfo.deserialize_json(vocabulary), schema)
    matcher = xgrammar.GrammarMatcher(grammar)
    bits = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
    if matcher.accept_string(" " * MAX_SPACE_BEFORE):
        matcher.fill_next_token_bitmask(bits)
    return grammar.memory_size_bytes, None if bits.any() else "no text keeps to it; does a reference lead to itself?"


def main() -> None:
    worker = runpy.run_path(str(Path(__file__).parents[1] / "judging" / "verifier_worker.py"))
    worker["serve"](measure_grammar, lambda: __import__("xgrammar"), ADDRESSES)


if __name__ == "__main__":
    main()
