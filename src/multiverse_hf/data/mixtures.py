"""Training rows of the chains family for a small model: short chains first, every shape, both suffixes."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from multiverse_hf.data.chains import MAX_CHAINS, MAX_OPS, ChainsProblem, Kind, document, sample_problem
from multiverse_hf.data.records import Form, Record
from multiverse_hf.documents import parse_document


@dataclass(frozen=True, slots=True)
class ChainsRow:
    """One training row: a problem and the form of its answer."""

    problem: ChainsProblem
    form: Form

    @property
    def prompt(self) -> str:
        """The problem with the suffix of its form."""
        return self.problem.prompt(parallel=self.form is not Form.SEQUENTIAL)

    @property
    def document(self) -> str:
        """The answer in its form."""
        text = document(self.problem)
        return parse_document(text).sequential() if self.form is Form.SEQUENTIAL else text

    def record(self) -> Record:
        """Return the record; a parallel row leaves its form to the epoch."""
        messages = ({"role": "user", "content": str(self.problem)},)
        form = None if self.form is Form.PARALLEL else self.form
        return Record(messages, parse_document(document(self.problem)), form)


@dataclass(frozen=True, slots=True)
class ChainsMixture:
    """A seeded stream of chains rows.

    Args:
        num_rows: number of rows.
        seed: the same seed draws the same rows.
        sequential: every row in sequential form under the sequential suffix, for the autoregressive twin.
        sequential_share: otherwise, the share of rows in that form, so that the model obeys both suffixes.
        plain_share: share of parallel rows read as plain causal text. The checkpoint then also decodes documents
            autoregressively (``structure="off"``, or a server that does not know Multiverse).
        ramp: share of the stream over which the limits grow: from 2 operations to ``max_ops``, and from 3 chains to
            ``max_chains``. Short rows are cheap, and teach everything but length.
        max_chains, max_ops: limits of the longest problems, 3 to 8 chains of 2 to 8 operations.
        single_share, nested_share: shares of the shapes; the rest is flat.
    """

    num_rows: int
    seed: int = 0
    sequential: bool = False
    sequential_share: float = 0.15
    plain_share: float = 0.15
    ramp: float = 0.6
    max_chains: int = MAX_CHAINS
    max_ops: int = MAX_OPS
    single_share: float = 0.08
    nested_share: float = 0.3

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {self.num_rows}")
        for name, low, high in (("max_chains", 3, MAX_CHAINS), ("max_ops", 2, MAX_OPS)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        for name in ("sequential_share", "plain_share", "ramp", "single_share", "nested_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")

    def __iter__(self) -> Iterator[ChainsRow]:
        rng = random.Random(self.seed)
        for index in range(self.num_rows):
            progress = min(1.0, index / (self.ramp * self.num_rows)) if self.ramp else 1.0
            max_ops = 2 + round(progress * (self.max_ops - 2))
            max_chains = 3 + round(progress * (self.max_chains - 3))
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
            if sequential or self.sequential:  # after the draws, so that the twin gets the same problems
                form = Form.SEQUENTIAL
            else:
                form = Form.PLAIN if plain else Form.PARALLEL
            yield ChainsRow(problem, form)
