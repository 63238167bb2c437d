"""``mv:chains``: a fixed set of problems of the embedded family, and the problems that a model was trained on."""

import functools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from multiverse_hf.data.chains import (
    MAX_CHAINS,
    MAX_OPS,
    ChainsProblem,
    Kind,
    is_problem,
    parse_problem,
    sample_problem,
)
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.records import RowError, number_rows
from multiverse_hf.errors import CommandError

SEED = 1000  # no training run uses it
NUM_PROBLEMS = 300  # a third of each kind


def chains_rows(count: int = NUM_PROBLEMS, seed: int = SEED) -> Iterator[dict[str, str]]:
    """Yield chains problems, the three kinds in turn, each problem once."""
    streams = [unseen_chains(kind, seed=seed) for kind in Kind]
    for number in range(count):
        problem = next(streams[number % len(streams)])
        yield {"problem": str(problem), "answer": str(problem.answer), "kind": problem.kind.value}


def unseen_chains(
    kind: Kind,
    seed: int = SEED,
    seen: Iterable[str] = (),
    max_chains: int = MAX_CHAINS,
    max_ops: int = MAX_OPS,
) -> Iterator[ChainsProblem]:
    """Yield problems that are not in ``seen``, each once, without end."""
    rng, drawn = random.Random(f"{seed}-{kind.value}"), set(seen)
    while True:
        problem = sample_problem(rng, kind, max_ops=max_ops)
        if len(problem.chains) <= max_chains and str(problem) not in drawn:
            drawn.add(str(problem))
            yield problem


def training_problems(model: str) -> set[str]:
    """Return the chains problems that a model was trained on, from its ``run.json``; none without this file.

    Raises:
        CommandError: if neither sft.py nor grpo.py wrote the file, or the rows that it names are not there.
    """
    record = Path(model, "run.json")
    if not record.is_file():
        return set()
    try:
        data = json.loads(record.read_bytes())["data"]
        source = data.get("dataset_name", "chains")
        if source == ["chains"]:  # of grpo.py, which may name several
            return {row["problem"] for row in chains_rows(data["num_rows"], data["rows_seed"])}
        if source != "chains":
            source = source[0] if isinstance(source, list) else source
            if source.startswith("rg:"):
                return set()
            prompts = (row.get("prompt") for _, row in number_rows(source) if not isinstance(row, RowError))
            return {str(parse_problem(text)) for text in prompts if isinstance(text, str) and is_problem(text)}
        names = {field.name for field in fields(ChainsMixture)} & data.keys()
        return _problems_of(ChainsMixture(seed=data["rows_seed"], **{name: data[name] for name in names}))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CommandError(f"{record} names no training rows ({err!r}); move it away if no recipe wrote it") from err


@functools.lru_cache(maxsize=4)  # a table or a curve asks for the same problems repeatedly
def _problems_of(mixture: ChainsMixture) -> set[str]:
    return {str(row.problem) for row in mixture}
