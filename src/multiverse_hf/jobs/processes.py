"""Processes that end together: nothing of a run is left behind when it is killed."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator

from multiverse_hf.errors import FAILURE


def end_with(parent: int) -> None:
    """End this process when the one that started it does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(FAILURE)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache  # once a process
def end_forks_with_this_process() -> None:
    """Have forked children end when this process is killed: datatrove's queue, for one, would stay for ever."""
    parent = os.getpid()
    os.register_at_fork(after_in_child=lambda: end_with(parent))


@functools.cache  # once a process
def end_worker_with_its_pool() -> None:
    """Have a worker end when the process that started the pool does; a fork server stands between the two."""
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(FAILURE)), daemon=True).start()


@contextlib.contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    """Take a SIGTERM as Ctrl-C, so that no process of ours outlives this one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
