"""Chains: the embedded problem family. Sums of short chains of additions that can be computed in parallel.

A problem is ``A=19-7+12; B=8+15-3; total?``: up to eight chains named in order. A chain is a number and one to eight
operations. Numbers are from 1 to 20, and running values from 0 to 99. Two or three groups in parentheses,
``(A=5+6; B=7+8) (C=9-2; D=4+4) total?``, make it nested. The answer is the sum of the values of all chains.
"""

import random
import re
from dataclasses import dataclass
from enum import StrEnum

from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX, Suffix

MAX_CHAINS = 8
MAX_OPS = 8
NAMES = "ABCDEFGH"
ONLY_CHAINS = (
    "the built-in model only adds chains, such as 'A=19-7+12; B=8+15-3; total?'. Its answer to this prompt means "
    "nothing; for other prompts, name a model: --model PATH"
)


class Kind(StrEnum):
    """Shape of a problem."""

    SINGLE = "single"  # one chain: answered without a block
    FLAT = "flat"  # one block, one path per chain
    NESTED = "nested"  # a path per group, a block inside each


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain: its name, its first number, and the signed numbers added to it."""

    name: str
    start: int
    terms: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.terms) <= MAX_OPS:
            raise ValueError(f"a chain has 1 to {MAX_OPS} operations, {self.name} has {len(self.terms)}")
        for number in (self.start, *self.terms):
            if not 1 <= abs(number) <= 20:
                raise ValueError(f"numbers run from 1 to 20, chain {self.name} has {abs(number)}")
        for value in self.values:
            if not 0 <= value <= 99:
                raise ValueError(f"running values stay between 0 and 99, chain {self.name} reaches {value}")

    @property
    def values(self) -> list[int]:
        """The running value after each operation."""
        value, values = self.start, []
        for term in self.terms:
            value += term
            values.append(value)
        return values

    @property
    def value(self) -> int:
        """The chain's value."""
        return self.start + sum(self.terms)

    def __str__(self) -> str:
        return f"{self.name}={self.start}" + "".join(f"{term:+d}" for term in self.terms)


@dataclass(frozen=True, slots=True)
class ChainsProblem:
    """Chains in one or more groups. One group makes a flat problem, one chain a single one."""

    groups: tuple[tuple[Chain, ...], ...]

    def __post_init__(self) -> None:
        names = "".join(chain.name for chain in self.chains)
        if not 1 <= len(names) <= MAX_CHAINS or names != NAMES[: len(names)]:
            raise ValueError(
                f"a problem has 1 to {MAX_CHAINS} chains named A, B, C, ... in order, got {names or 'none'}"
            )
        if len(self.groups) > 3:
            raise ValueError(f"a nested problem has two or three groups, got {len(self.groups)}")
        if len(self.groups) > 1 and min(len(group) for group in self.groups) < 2:
            raise ValueError("a group in parentheses has at least two chains")

    @property
    def chains(self) -> list[Chain]:
        """All chains, in order."""
        return [chain for group in self.groups for chain in group]

    @property
    def kind(self) -> Kind:
        """Shape of the problem."""
        if len(self.groups) > 1:
            return Kind.NESTED
        return Kind.FLAT if len(self.chains) > 1 else Kind.SINGLE

    @property
    def answer(self) -> int:
        """The sum of the values of all chains."""
        return sum(chain.value for chain in self.chains)

    def __str__(self) -> str:
        groups = ["; ".join(str(chain) for chain in group) for group in self.groups]
        if len(groups) == 1:
            return f"{groups[0]}; total?"
        return " ".join(f"({group})" for group in groups) + " total?"

    def prompt(self, parallel: bool = True) -> str:
        """Return the prompt: the problem, a space, and the suffix of record."""
        return (Suffix.PARALLEL if parallel else Suffix.SEQUENTIAL).end(str(self))


_CHAIN = re.compile(r"([A-H])=(\d+)((?:[+-]\d+)+)")


def parse_problem(text: str) -> ChainsProblem:
    """Return the problem of a text, with or without a suffix.

    Raises:
        ValueError: if the text is not a problem of this family.
    """
    body, found, rest = text.strip().partition("total?")
    if not found or rest.strip() not in ("", PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX):
        raise ValueError(f"not a chains problem: {text!r}; write e.g. 'A=19-7+12; B=8+15-3; total?'")
    groups = re.findall(r"\(([^()]*)\)", body) or [body.rstrip().removesuffix(";")]
    problem = ChainsProblem(tuple(tuple(_parse_chain(part) for part in group.split("; ")) for group in groups))
    if str(problem) != f"{body}{found}".strip():
        raise ValueError(f"not a chains problem: {text!r} reads as {str(problem)!r}")
    return problem


def is_problem(text: str) -> bool:
    """Return whether a text is a problem of this family, with or without a suffix."""
    try:
        parse_problem(text)
    except ValueError:
        return False
    return True


def _parse_chain(text: str) -> Chain:
    match = _CHAIN.fullmatch(text)
    if match is None:
        raise ValueError(f"not a chain: {text!r}; write e.g. 'A=19-7+12'")
    name, start, terms = match.groups()
    return Chain(name, int(start), tuple(int(term) for term in re.findall(r"[+-]\d+", terms)))


def sample_chain(rng: random.Random, name: str, max_ops: int = MAX_OPS) -> Chain:
    """Draw a chain: the number of operations is uniform, and each number is uniform over those that keep it in range.

    One chain in three leans towards plus, so that high running values occur too.
    """
    lean = 0.8 if rng.random() < 1 / 3 else 0.5
    value = start = rng.randint(1, 20)
    terms = []
    for _ in range(rng.randint(1, max_ops)):
        plus, minus = min(20, 99 - value), min(20, value)
        add = minus == 0 or (plus > 0 and rng.random() < lean)
        term = rng.randint(1, plus) if add else -rng.randint(1, minus)
        terms.append(term)
        value += term
    return Chain(name, start, tuple(terms))


def sample_problem(
    rng: random.Random, kind: Kind | str, num_chains: int | None = None, max_ops: int = MAX_OPS
) -> ChainsProblem:
    """Draw a problem.

    Args:
        rng: source of randomness; the same state draws the same problem.
        kind: its shape.
        num_chains: number of chains; by default drawn from those that the shape allows (flat 2 to 8, nested 4 to 8).
        max_ops: most operations of a chain.

    Raises:
        ValueError: if the shape cannot have that many chains.
    """
    kind = Kind(kind)
    low = {Kind.SINGLE: 1, Kind.FLAT: 2, Kind.NESTED: 4}[kind]
    high = 1 if kind is Kind.SINGLE else MAX_CHAINS
    if num_chains is None:
        num_chains = rng.randint(low, high)
    if not low <= num_chains <= high:
        raise ValueError(f"a {kind.value} problem has {low} to {high} chains, got {num_chains}")
    chains = [sample_chain(rng, name, max_ops) for name in NAMES[:num_chains]]
    if kind is not Kind.NESTED:
        return ChainsProblem((tuple(chains),))
    num_groups = rng.randint(2, min(3, num_chains // 2))
    sizes = [2] * num_groups
    for _ in range(num_chains - sum(sizes)):
        sizes[rng.randrange(num_groups)] += 1
    groups, begin = [], 0
    for size in sizes:
        groups.append(tuple(chains[begin : begin + size]))
        begin += size
    return ChainsProblem(tuple(groups))


def _split(value: int) -> str:
    """Return a value split into tens and ones, e.g. ``35=30+5``."""
    return f"{value}={value - value % 10}+{value % 10}"


def _work(chain: Chain) -> str:
    """Return the steps of one chain: every intermediate value, tens before ones.

    Each line begins with the rest of the chain, so that a small model need not count its steps.
    """
    lines, value = [f"Follow chain {chain}, one term at a time, from left to right, tens before ones."], chain.start
    for step, term in enumerate(chain.terms):
        left = "".join(f"{later:+d}" for later in chain.terms[step:])
        sign, ones = ("+" if term > 0 else "-"), abs(term) % 10
        middle = value + term - (ones if term > 0 else -ones)
        tens = abs(term) - ones
        lines.append(f"{value}{left}: {value}{sign}{tens}{sign}{ones}={middle}{sign}{ones}={value + term}")
        value += term
    lines.append(f"Nothing is left of chain {chain.name}, which ends at {_split(value)}.")
    return "\n".join(lines)


def _sum(names: list[str], values: list[int]) -> str:
    """Return the sum of values, one by one. Each step names its addend, tens before ones."""
    total, steps = values[0], [f"{names[0]} {values[0]}"]
    for name, value in zip(names[1:], values[1:], strict=True):
        ones = value % 10
        steps.append(f"{name}+{value - ones}={total + value - ones}+{ones}={total + value}")
        total += value
    return "Sum: " + " ".join(steps)


def _block(outlines: list[str], paths: list[str], conclusion: str) -> str:
    goal = "".join(f"<Outline>{outline}</Outline>" for outline in outlines)
    body = "".join(f"<Path>\n{path}\n</Path>\n" for path in paths)
    return f"<Parallel>\n<Goal>{goal}</Goal>\n{body}<Conclusion>\n{conclusion}\n</Conclusion>\n</Parallel>"


def _solve_group(chains: tuple[Chain, ...], label: str = "") -> str:
    labels = [f"{label}{number}:" for number in range(1, len(chains) + 1)]
    block = _block(
        [f"{name} {chain.name}" for name, chain in zip(labels, chains, strict=True)],
        [f"{name} {_work(chain)}" for name, chain in zip(labels, chains, strict=True)],
        f"{len(chains)} ends",
    )
    return block + "\n" + _sum([chain.name for chain in chains], [chain.value for chain in chains])


def document(problem: ChainsProblem) -> str:
    """Return the parallel document of a problem; a single chain has no block."""
    if problem.kind is Kind.SINGLE:
        work = _work(problem.chains[0])
    elif problem.kind is Kind.FLAT:
        work = _solve_group(problem.groups[0])
    else:
        sums = [sum(chain.value for chain in group) for group in problem.groups]
        numbers = range(1, len(problem.groups) + 1)
        block = _block(
            [f"{n}: {' '.join(c.name for c in group)}" for n, group in zip(numbers, problem.groups, strict=True)],
            [
                f"{n}:\n{_solve_group(group, f'{n}.')}\nGroup {n} is {_split(value)}."
                for n, group, value in zip(numbers, problem.groups, sums, strict=True)
            ],
            f"{len(problem.groups)} groups",
        )
        work = block + "\n" + _sum([f"G{n}" for n in numbers], sums)
    return f"<Think>\n{work}\n</Think>\n\nAnswer: {problem.answer}"


_ANSWER = re.compile(r"^Answer: (0|[1-9][0-9]{0,17})\s*\Z", re.MULTILINE)


def read_chains_answer(text: str) -> int | None:
    """Return the number on the last line ``Answer: 123``, None if there is no such line."""
    match = _ANSWER.search(text)
    return int(match.group(1)) if match else None


def is_correct(problem: ChainsProblem, text: str) -> bool:
    """Return whether an answer's last line is ``Answer:`` and exactly the problem's answer."""
    return read_chains_answer(text) == problem.answer
