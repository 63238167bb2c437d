"""What it takes to answer some prompts at once: the prompts' own pass, and everything after it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from multiverse_hf.modeling.continuous_batching import MultiverseEngine
from multiverse_hf.modeling.handles import MultiverseResult
from multiverse_hf.modeling.state import BranchEvent

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Timed:
    """What answering some prompts took.

    Attributes:
        prompt_seconds: until the first token of an answer was chosen: the prompts' own pass.
        seconds: from then on.
        results: the answers.
    """

    prompt_seconds: float
    seconds: float
    results: list[MultiverseResult]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers that were written in ``seconds``: the prompts' pass chooses the first of each."""
        return sum(result.stats.num_tokens - 1 for result in self.results)

    @property
    def length(self) -> int:
        """Positions of all answers that were passed in ``seconds``."""
        return sum(result.stats.length - 1 for result in self.results)


def time_answers(engine: MultiverseEngine, prompts: Sequence[Any], **options: Any) -> Timed:
    """Have prompts answered at once, and take the time.

    Raises:
        RuntimeError: if the cache was too small to hold all answers: reading them again is no part of writing.
    """
    first: list[float] = []

    def listen(_event: BranchEvent) -> None:
        if not first:  # a token's id has come back from the device, so the pass before it is over
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
    """Wait for what was given to a device; a CPU is done when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(items: Sequence[Item], repeats: int) -> Iterator[Item]:
    """Return items in turns, all of them ``repeats`` times, each time beginning with another: what else runs on the
    machine then meets all of them alike.
    """
    for repeat in range(repeats):
        begin = repeat % len(items)
        yield from (*items[begin:], *items[:begin])
