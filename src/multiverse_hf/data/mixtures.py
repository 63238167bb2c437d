"""The order in which a small model meets the chains family: short chains first, every shape, both suffixes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from multiverse_hf.data.chains import MAX_CHAINS, MAX_OPS, Kind, Problem, document, sample_problem
from multiverse_hf.documents import parse_document


@dataclass(frozen=True, slots=True)
class ChainsRow:
    """One training row: the problem, its prompt, and the document to learn."""

    problem: Problem
    prompt: str
    document: str
    plain: bool = False  # read as plain causal text: how a loader that knows nothing of branches writes it


@dataclass(frozen=True, slots=True)
class ChainsMixture:
    """A seeded stream of chains rows.

    Args:
        num_rows: how many rows.
        seed: same seed, same rows.
        sequential: every row in its sequential form under the sequential suffix (the autoregressive twin).
        sequential_share: otherwise, the share of rows in that form, so that the model obeys either suffix.
        plain_share: the share of parallel rows read as plain causal text, so that the same checkpoint also writes the
            tags one after the other (``structure="off"``, or a server that does not know Multiverse).
        ramp: the share of the stream over which the most operations a chain may have grows from 2 to 8, and the most
            chains from 3 to 8. Short rows are cheap, and they teach everything but length.
        single_share, nested_share: shares of the shapes; the rest is flat.
    """

    num_rows: int
    seed: int = 0
    sequential: bool = False
    sequential_share: float = 0.15
    plain_share: float = 0.15
    ramp: float = 0.6
    single_share: float = 0.08
    nested_share: float = 0.3

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {self.num_rows}")
        for name in ("sequential_share", "plain_share", "ramp", "single_share", "nested_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")

    def __iter__(self) -> Iterator[ChainsRow]:
        rng = random.Random(self.seed)
        for index in range(self.num_rows):
            progress = min(1.0, index / (self.ramp * self.num_rows)) if self.ramp else 1.0
            max_ops = 2 + round(progress * (MAX_OPS - 2))
            max_chains = 3 + round(progress * (MAX_CHAINS - 3))
            draw = rng.random()
            if draw < self.single_share:
                kind = Kind.SINGLE
            elif draw < self.single_share + self.nested_share and max_chains >= 4:
                kind = Kind.NESTED
            else:
                kind = Kind.FLAT
            low = {Kind.SINGLE: 1, Kind.FLAT: 2, Kind.NESTED: 4}[kind]
            num_chains = 1 if kind is Kind.SINGLE else rng.randint(low, max_chains)
            problem = sample_problem(rng, kind, num_chains, max_ops)
            sequential = rng.random() < self.sequential_share
            plain = not sequential and rng.random() < self.plain_share
            # decided after the draws, so that the twin sees the very same problems
            sequential, plain = sequential or self.sequential, plain and not self.sequential
            text = document(problem)
            if sequential:
                text = parse_document(text).sequential()
            yield ChainsRow(problem, problem.prompt(parallel=not sequential), text, plain)
