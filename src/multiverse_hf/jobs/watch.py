"""Watches a run: its progress, and whether its workers are alive."""

import os
import signal
import sys
import threading
import time
from typing import Any, Protocol

import multiprocess
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from multiverse_hf.jobs.folders import JobFolder, count_lines
from multiverse_hf.outputs import EVERY_S, FIRST_S

WATCH_S = 0.5
FIGURES, NARROW = 48, 110  # characters of the shortest bar with its figures, and of everything else


class Notes(Protocol):
    """Other information about a run."""

    def describe(self) -> str:
        """Return short notes for the end of the bar, separated by middle dots."""

    def news(self) -> str:
        """Return a new line to show, or an empty text."""


class Watch:
    """Watches a run from a thread: shows its progress, and ends it when a worker was killed.

    A terminal has a bar. A log has a line after 5 s, and then every 30 s. Both show news at once.

    A pool would wait forever for the task of a killed worker.
    """

    def __init__(self, folder: JobFolder, rows: int, notes: Notes | None = None) -> None:
        """Create a watch for a run.

        Args:
            folder: folder of the run.
            rows: total number of rows.
            notes: other information to show.
        """
        self.folder, self.rows, self.notes = folder, rows, notes
        self.has_lost_worker = False
        self._before: int | None = None  # finished rows when the bar first appeared
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._console = Console(file=sys.stderr)  # the current one: it is redirected while a single worker runs

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        bar = BarColumn(max(4, min(40, self._console.width - NARROW)))
        columns = [bar, MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn(), TimeRemainingColumn()]
        columns.append(TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)))
        shown = self._console.is_terminal
        with Progress(
            *columns, console=self._console, disable=not shown, redirect_stdout=False, redirect_stderr=False
        ) as progress:
            task = progress.add_task("rows", total=self.rows, note="")
            counts: dict[int, tuple[int, int]] = {}
            alive: set[int] = set()
            missing: set[int] = set()
            begin = time.monotonic()
            next_line = begin + FIRST_S
            while not self._stop.wait(WATCH_S):
                self._tell(progress)
                if shown:
                    self._show(progress, task, counts)
                elif time.monotonic() >= next_line:
                    next_line += EVERY_S
                    self._say(time.monotonic() - begin, counts)
                lost = {pid for pid in alive if not _is_alive(pid)}
                # missing twice: at the end of a run workers end by themselves
                if lost & missing and not self.has_lost_worker:
                    self.has_lost_worker = True
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
                missing = lost
                alive |= _children()
            self._tell(progress)
            if shown:
                self._show(progress, task, counts)

    def _tell(self, progress: Progress) -> None:
        if self.notes is not None and (line := self.notes.news()):
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, progress: Progress, task: Any, counts: dict[int, tuple[int, int]]) -> None:
        done = self._count(counts)
        if self._before is None:
            self._before = done
        rate = (done - self._before) / max(progress.tasks[0].elapsed or 0.0, WATCH_S)
        speed = f"{rate:.2g} rows/s" if done > self._before else ""
        said = " · ".join(filter(None, (speed, self._describe()))) or "loading, then the first rows"
        progress.update(task, completed=done, note=_fit(said, self._console.width - FIGURES))

    def _say(self, seconds: float, counts: dict[int, tuple[int, int]]) -> None:
        parts = [f"{self._count(counts)} of {self.rows} rows after {seconds:.0f} s", self._describe()]
        print(" · ".join(filter(None, parts)), file=self._console.file, flush=True)

    def _describe(self) -> str:
        return self.notes.describe() if self.notes is not None else ""

    def _count(self, counts: dict[int, tuple[int, int]]) -> int:
        """Return the number of finished rows, counting only new lines of each part."""
        for task in range(self.folder.tasks):
            rows, end = counts.get(task, (0, 0))
            path = self.folder.unfinished(task)
            new, end = count_lines(path if path.exists() else self.folder.part(task), end)
            counts[task] = rows + new, end
        return sum(rows for rows, _ in counts.values())


def _fit(note: str, width: int) -> str:
    """Return a note without the last parts that do not fit."""
    while len(note) > width and note:
        note = note.rpartition(" · ")[0]
    return note


def _children() -> set[int]:
    return {child.pid for child in multiprocess.active_children()}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
