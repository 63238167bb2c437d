"""The number of threads that a small model steps with: its own choice, by a short measurement.

A step of a few million parameters takes milliseconds. Threads then wait for each other longer than they compute, and
on a busy machine much longer. So for each width of a step the engine times passes with one thread and with torch's
number, once in a process, and takes the better. An answer depends on it only as far as floating point does.
"""

import os
import statistics
import time
import weakref
from typing import Any

import torch

from .hooks import evaluating
from .layout import plain_layout

WIDTHS = (32, 512)  # tokens of a step; one of fewer goes by the next width
MAX_WORK = 1 << 30  # parameters times tokens; a step of more gains from threads
MAX_SECONDS = 0.2  # of measuring at one width; past them no further pass begins
MAX_ROUNDS = 5
# Several threads must be so many times as fast as one: they gain little here, and lose far more when the machine gets
# busy later.
MIN_GAIN = 1.5

_FIXED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables by which a user says how many
_DEFAULT = torch.get_num_threads()  # another number later was somebody's choice
_keeps = False
_chosen: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()


def set_threads(number: int) -> None:
    """Set torch's number of CPU threads, and have every model keep to it."""
    global _keeps
    _keeps = True
    torch.set_num_threads(number)


def may_choose(model: Any) -> bool:
    """Return whether the engine may choose: on a CPU, alone, and where nobody else has chosen."""
    is_fixed = _keeps or torch.get_num_threads() != _DEFAULT or any(os.environ.get(name) for name in _FIXED)
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return not is_fixed and torch.get_num_threads() > 1 and is_alone and model.device.type == "cpu"


def step_threads(model: Any) -> int:
    """Return the number of threads that a model's steps of one answer take: torch's where nothing was chosen."""
    return _chosen.get(model, {}).get(WIDTHS[0], torch.get_num_threads())


def best_threads(model: Any, width: int | None) -> int | None:
    """Return the number of threads that is best for a step; None where torch's number shall stay.

    Args:
        model: a causal LM.
        width: of :data:`WIDTHS`, at least the tokens that the step reads; None for more.
    """
    if width is None or not may_choose(model):
        return None
    if width * sum(weight.numel() for weight in model.parameters()) > MAX_WORK:
        return None
    numbers = _chosen.setdefault(model, {})
    if width not in numbers:
        own = torch.get_num_threads()
        try:
            numbers[width] = _measure(model, width, own)
        finally:
            torch.set_num_threads(own)
    return numbers[width]


def _measure(model: Any, width: int, own: int) -> int:
    """Time passes of ``width`` tokens with one thread and with ``own`` threads in turns, and return the better."""
    ids = torch.zeros(1, width, dtype=torch.long)

    def one_pass(number: int) -> float:
        torch.set_num_threads(number)
        begin = time.perf_counter()
        with torch.no_grad(), plain_layout(), evaluating(model):
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - begin

    begin = time.perf_counter()
    one_pass(1)  # the first pass of each kind makes threads and fills caches
    alone, together = [one_pass(1)], []
    one_pass(own)
    while time.perf_counter() - begin < MAX_SECONDS and len(together) < MAX_ROUNDS:
        together.append(one_pass(own))
        alone.append(one_pass(1))
    if not together:  # one pass took it all
        return 1
    return own if statistics.median(alone) > MIN_GAIN * statistics.median(together) else 1
