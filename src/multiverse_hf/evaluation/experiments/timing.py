"""The time to answer prompts at once, separately for the prompts' own pass and the rest."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from multiverse_hf.modeling.handles import MultiverseResult
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.state import BranchEvent

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Timed:
    """Times of answering prompts.

    Attributes:
        prompt_seconds: time until the first token of an answer was chosen: the prompts' own pass.
        seconds: time after it.
        results: the answers.
    """

    prompt_seconds: float
    seconds: float
    results: list[MultiverseResult]

    @property
    def num_tokens(self) -> int:
        """Tokens written in ``seconds``, without each answer's first, which the prompts' pass chooses."""
        return sum(result.stats.num_tokens - 1 for result in self.results)

    @property
    def length(self) -> int:
        """Positions of all answers in ``seconds``, without each answer's first."""
        return sum(result.stats.length - 1 for result in self.results)


def time_answers(engine: MultiverseEngine, prompts: Sequence[Any], **options: Any) -> Timed:
    """Answer prompts at once, and measure the time.

    Raises:
        RuntimeError: if the cache was too small for all answers: reading them again would count as writing.
    """
    first: list[float] = []

    def listen(_event: BranchEvent) -> None:
        if not first:  # a token's id is on the host, so the pass before it is over
            first.append(time.perf_counter())

    before = engine.memory()["num_preemptions"]
    synchronize(engine.model.device)
    begin = time.perf_counter()
    results = engine.generate(list(prompts), on_event=listen, **options)
    synchronize(engine.model.device)
    end = time.perf_counter()
    if preempted := engine.memory()["num_preemptions"] - before:
        raise RuntimeError(
            f"{preempted} answers were preempted and read again: the cache is too small to measure with"
        )
    return Timed(first[0] - begin, end - first[0], results)


def synchronize(device: torch.device) -> None:
    """Wait for a device's pending work; a CPU has none when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(items: Sequence[Item], repeats: int) -> Iterator[Item]:
    """Yield all items ``repeats`` times, each time starting with another one.

    Other work on the machine then affects all items alike.
    """
    for repeat in range(repeats):
        begin = repeat % len(items)
        yield from (*items[begin:], *items[:begin])
