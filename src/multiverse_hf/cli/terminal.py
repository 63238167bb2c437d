"""The terminal: whether it can show branches, and a spinner while a command loads."""

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from multiverse_hf.errors import CommandError


def wants_live(live: bool | None, as_json: bool) -> bool:
    """Return whether to show branches side by side.

    Raises:
        CommandError: if both that and JSON were asked for.
    """
    if as_json and live:
        raise CommandError("--json and --live exclude each other; leave one out")
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return not as_json and (is_terminal if live is None else live)


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Show a message with a spinner and the elapsed time in a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(message, total=None)
            yield
    else:
        yield
