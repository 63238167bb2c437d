"""Files of a job: its settings, parts to which tasks append whole lines, and locks against other processes."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from multiverse_hf.begun import Explain, check_begun, read_begun
from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.outputs import json_text, lock_file, write_output
from multiverse_hf.provenance import versions

SETTINGS = "run.json"


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Paths in the output folder of a job.

    A task appends finished rows to its part. The part gets its final name when it is complete, so the names alone show
    which tasks are finished.
    """

    path: Path
    tasks: int
    result_name: ClassVar[str]

    @property
    def result(self) -> Path:
        """File of all rows in the input's order; it exists once the job is complete."""
        return self.path / self.result_name

    @property
    def settings(self) -> Path:
        """File of the settings that the run began with."""
        return self.path / SETTINGS

    @property
    def logs(self) -> Path:
        """Folder of the logs of datatrove and Slurm."""
        return self.path / "logs"

    def part(self, task: int) -> Path:
        """Return the file of a finished task's rows."""
        return self.path / "parts" / f"{task:05d}.jsonl"

    def unfinished(self, task: int) -> Path:
        """Return the file of an unfinished task's rows so far."""
        return self.path / "parts" / f"{task:05d}.unfinished.jsonl"

    def open_tasks(self) -> list[int]:
        """Return the unfinished tasks."""
        names = {path.name for path in (self.path / "parts").glob("*.jsonl")}
        return [task for task in range(self.tasks) if self.part(task).name not in names]

    def count_rows(self) -> int:
        """Return the number of rows in all parts."""
        paths = (path for task in range(self.tasks) for path in (self.part(task), self.unfinished(task)))
        return sum(count_lines(path)[0] for path in paths)

    @contextlib.contextmanager
    def lock(self, name: str, busy: str | None = None) -> Iterator[None]:
        """Lock work against other processes. Without locks on a file system, users must take care themselves.

        Args:
            name: name of the work.
            busy: message of the error if another process holds the lock; None waits.

        Raises:
            CommandError: if another process holds the lock.
        """
        path = self.logs / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            if lock_file(file, waits=busy is None) is False:
                raise CommandError(busy, FAILURE)
            yield


def begin_or_resume(
    folder: JobFolder,
    output: Path,
    asked: Mapping[str, Any],
    may_differ: Collection[str],
    explain: Explain,
    packages: Collection[str],
    draws: Mapping[str, Any] | None = None,
    is_dry_run: bool = False,
) -> dict[str, Any]:
    """Store the settings of a new run, except for a dry run, or check that they are those of the run in this folder.

    Args:
        folder, output: the folder; ``output`` is its path as the user gave it.
        asked: the settings.
        may_differ: names of settings that may differ when a run is continued.
        explain: as for :func:`~multiverse_hf.begun.check_begun`.
        packages: packages whose versions are stored.
        draws: values for settings that are None when a run begins.
        is_dry_run: write nothing.

    Returns:
        The settings that the run began with.

    Raises:
        CommandError: if the folder is another run's.
    """
    stored, draws = read_begun(folder.settings), draws or {}
    if stored is None:
        if folder.result.exists() or (folder.path / "parts").exists():
            raise CommandError(f"{output} holds rows of a run, but no run.json; name another folder")
        begun = dict(asked) | {name: value for name, value in draws.items() if asked[name] is None}
        begun["versions"] = versions(*packages)
        if not is_dry_run:
            write_output(folder.settings, json_text(begun, indent=2))
        return begun
    drawn = [name for name in draws if asked[name] is None]
    check_begun(output, stored, asked, [*may_differ, *drawn], explain)
    return stored


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each whole line, without a torn last line of a killed task."""
    begin = 0
    with path.open("rb") as file:
        for data in file:
            if not data.endswith(b"\n"):
                break
            yield begin, data
            begin += len(data)


@contextlib.contextmanager
def appending(path: Path, end: int) -> Iterator[IO[bytes]]:
    """Yield a file opened to append after its first ``end`` bytes. It is synced to disk at the end."""
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_row(file: IO[bytes], row: dict[str, Any]) -> None:
    """Append a row. Once this returns, a kill of the process cannot lose it."""
    file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    file.flush()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file opened to write. It gets its name once it is complete and on disk."""
    new = path.with_name(f".{path.name}.unfinished")
    with new.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def count_lines(path: Path, begin: int = 0) -> tuple[int, int]:
    """Return the number of line ends in a file from an offset on, 0 without the file, and the offset of its end."""
    count = 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(begin)
        while data := file.read(1 << 20):
            count += data.count(b"\n")
            begin += len(data)
    return count, begin
