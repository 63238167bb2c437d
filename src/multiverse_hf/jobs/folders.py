"""Files of a job: parts that tasks append whole lines to, and locks that keep others out."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.outputs import lock_file

SETTINGS = "run.json"


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where things are in an output folder.

    A task appends the rows it finishes to its part, which gets its final name when all of them are there: what is
    finished can be seen from the names alone, and nothing else has to be kept in step with the files.
    """

    path: Path
    tasks: int
    result_name: ClassVar[str]

    @property
    def result(self) -> Path:
        """All rows in the input's order; there only when all are."""
        return self.path / self.result_name

    @property
    def settings(self) -> Path:
        """What the run was begun with."""
        return self.path / SETTINGS

    @property
    def logs(self) -> Path:
        """What datatrove and Slurm write."""
        return self.path / "logs"

    def part(self, task: int) -> Path:
        """A task's rows, complete."""
        return self.path / "parts" / f"{task:05d}.jsonl"

    def unfinished(self, task: int) -> Path:
        """A task's rows so far."""
        return self.path / "parts" / f"{task:05d}.unfinished.jsonl"

    def open_tasks(self) -> list[int]:
        """Give the tasks that have rows to do."""
        names = {path.name for path in (self.path / "parts").glob("*.jsonl")}
        return [task for task in range(self.tasks) if self.part(task).name not in names]

    def count_rows(self) -> int:
        """Count the rows in all parts."""
        paths = (path for task in range(self.tasks) for path in (self.part(task), self.unfinished(task)))
        return sum(count_lines(path)[0] for path in paths)

    @contextlib.contextmanager
    def lock(self, name: str, busy: str | None = None) -> Iterator[None]:
        """Keep other processes out of the same work; where there are no locks, users see to it themselves.

        Args:
            name: of the work.
            busy: the error's message if it is held; None waits.

        Raises:
            CommandError: if it is held.
        """
        path = self.logs / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            if lock_file(file, waits=busy is None) is False:
                raise CommandError(busy, FAILURE)
            yield


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Give the place and the bytes of each line that has its end; not what a killed task wrote of a last one."""
    begin = 0
    with path.open("rb") as file:
        for data in file:
            if not data.endswith(b"\n"):
                break
            yield begin, data
            begin += len(data)


@contextlib.contextmanager
def appending(path: Path, end: int) -> Iterator[IO[bytes]]:
    """Open a file to append lines to, after the bytes that are to stay; on the disk when it is closed."""
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_row(file: IO[bytes], row: dict[str, Any]) -> None:
    """Append a row; once this returns, a kill of the process cannot lose it."""
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    file.flush()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a large file to write, under another name until it is whole and on the disk."""
    new = path.with_name(f".{path.name}.unfinished")
    with new.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def count_lines(path: Path, begin: int = 0) -> tuple[int, int]:
    """Count the line ends in a file from a place on, none if it is not there; and give the place where it ends."""
    count = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(begin)
        while data := file.read(1 << 20):
            count += data.count(b"\n")
            begin += len(data)
    return count, begin
