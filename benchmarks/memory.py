"""The most memory that tensors take at once while something is done."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(work: Callable[[], Any], device: torch.device) -> int:
    """Do something, and give the most bytes of tensors alive at once beyond those that were alive before.

    On a CPU torch's profiler notes what its allocator gives and takes back, temporaries inside an operation among
    them. That is exact where the size of a process is not: it would count what the allocator keeps, and pages never
    touched. Python's own objects, such as lists of ids, are not counted. It takes longer than the work alone: do not
    time it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
