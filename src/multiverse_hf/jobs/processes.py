"""Processes that end together: a killed run leaves no processes behind."""

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator

from multiverse_hf.errors import FAILURE


def end_with(parent: int) -> None:
    """End this process when its parent ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(FAILURE)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache  # once per process
def end_forks_with_this_process() -> None:
    """End forked children when this process is killed: datatrove's queue would otherwise stay forever."""
    parent = os.getpid()
    os.register_at_fork(after_in_child=lambda: end_with(parent))


@functools.cache  # once per process
def end_worker_with_its_pool() -> None:
    """End this worker when the process of its pool ends; a fork server is between the two."""
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(FAILURE)), daemon=True).start()


@contextlib.contextmanager
def stopping_at_sigterm() -> Iterator[None]:
    """Treat a SIGTERM as Ctrl-C, so that no child process outlives this one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
