"""``mv:chains``: a fixed set of problems of the embedded family, and which of them a model was trained on."""

import functools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from multiverse_hf.data.chains import MAX_CHAINS, MAX_OPS, ChainsProblem, Kind, sample_problem
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.errors import CommandError

SEED = 1000  # no training run draws its rows with it
NUM_PROBLEMS = 300  # a third of each kind


def chains_rows(count: int = NUM_PROBLEMS, seed: int = SEED) -> Iterator[dict[str, str]]:
    """Draw chains problems, the three kinds in turn, each problem once."""
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
    """Draw problems that are not among those seen, each once, for as long as there are any."""
    rng, drawn = random.Random(f"{seed}-{kind.value}"), set(seen)
    while True:
        problem = sample_problem(rng, kind, max_ops=max_ops)
        if len(problem.chains) <= max_chains and str(problem) not in drawn:
            drawn.add(str(problem))
            yield problem


def training_problems(model: str) -> set[str]:
    """Return the chains problems a run was trained on, from the ``run.json`` beside it; none if there is no such file.

    Raises:
        CommandError: if the file is not what sft.py writes.
    """
    record = Path(model, "run.json")
    if not record.is_file():
        return set()
    try:
        data = json.loads(record.read_bytes())["data"]
        names = {field.name for field in fields(ChainsMixture)} & data.keys()
        return _problems_of(ChainsMixture(seed=data["rows_seed"], **{name: data[name] for name in names}))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CommandError(f"{record} names no training rows ({err!r}); move it away if it is not of sft.py") from err


@functools.lru_cache(maxsize=4)  # a table or a curve asks for the same ones again and again
def _problems_of(mixture: ChainsMixture) -> set[str]:
    return {str(row.problem) for row in mixture}
