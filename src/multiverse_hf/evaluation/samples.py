"""Answers on disk, one row each: finished shards in parquet, and a journal of later answers.

A parquet file cannot be appended to, and a partly written one cannot be read. So each finished answer first becomes a
line of ``unfinished.jsonl``. When there are enough lines, they become a shard, ``00000.parquet``, which gets its name
once it is complete. A kill at any time loses no finished answer: a cut-off line is dropped, and lines that a shard
already has are skipped.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from multiverse_hf.errors import FAILURE, CommandError, one_line
from multiverse_hf.outputs import json_text, lock_file

SHARD_ROWS = 1000
TYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, judged.

    Attributes:
        task, id, group: task, id and group of the problem.
        sample: number of the answer among the problem's answers, from 0.
        seed: seed of its noise.
        prompt: the prompt without chat template.
        document: the answer as generated, with its tags, after the tag of thinking that the prompt's template opened.
        gold: the right answer.
        answer: the document's final answer; None if there is none.
        correct, rule: the verdict (:mod:`~multiverse_hf.evaluation.answers`).
        well_formed: whether the document parses.
        num_tokens, length, parallelism, num_steps, num_forks, max_width, depth, num_closed, malformed, finish_reason:
            the engine's counts (:class:`~multiverse_hf.modeling.state.GenerationStats`).
        seconds: time from submission to end, while other answers share the machine.
        error: why the prompt was refused; None if it was answered.
        score: score of the answer from 0 to 1; None in tasks without scores.
    """

    task: str
    id: str
    group: str | None
    sample: int
    seed: int
    prompt: str
    document: str
    gold: str
    answer: str | None
    correct: bool
    rule: str
    well_formed: bool
    num_tokens: int
    length: int
    parallelism: float
    num_steps: int
    num_forks: int
    max_width: int
    depth: int
    num_closed: int
    malformed: int
    finish_reason: str
    seconds: float
    error: str | None = None
    score: float | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """The key of the sample, unique in a run."""
        return self.task, self.id, self.sample


class SampleStore:
    """The samples of one run. Only one process at a time can open it.

    Args:
        folder: folder of the files; it is created if it is missing.
        shard_rows: rows per shard.

    Raises:
        CommandError: if another process has it open, or a file is damaged.
    """

    def __init__(self, folder: Path, shard_rows: int = SHARD_ROWS) -> None:
        self.folder, self.shard_rows = folder, shard_rows
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        if lock_file(self._lock) is False:
            self._lock.close()
            raise CommandError(f"another run is at work in {folder.parent}; wait for it, or name another folder")
        self.samples = {sample.key: sample for sample in read_samples(folder)}
        self._pending: list[Sample] = []
        self._journal = self._open_journal()

    def add(self, sample: Sample) -> None:
        """Store a sample. Once this returns, a kill of the process cannot lose it."""
        self._journal.write(json_text(asdict(sample)).encode())
        self._journal.flush()
        self.samples[sample.key] = sample
        self._pending.append(sample)
        if len(self._pending) >= self.shard_rows:
            self._write_shard()

    def close(self) -> None:
        """Write the journal as a shard, and unlock the folder."""
        if self._pending:
            self._write_shard()
        self._journal.close()
        self._lock.close()

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_journal(self) -> IO[bytes]:
        """Return the journal, opened at the end of its last whole line."""
        path = self.folder / "unfinished.jsonl"
        path.touch()
        in_shards = {sample.key for shard in _shards(self.folder) for sample in _read_shard(shard)}
        end = 0
        for end, sample in _read_journal(path):  # noqa: B007 - the last one counts
            if sample.key not in in_shards:
                self._pending.append(sample)
        journal = path.open("r+b")
        journal.truncate(end)
        journal.seek(end)
        return journal

    def _write_shard(self) -> None:
        import pyarrow.parquet

        numbers = [int(path.stem) for path in _shards(self.folder)]
        path = self.folder / f"{max(numbers, default=-1) + 1:05d}.parquet"
        part = self.folder / f".{path.name}.writing"
        table = pyarrow.Table.from_pylist([asdict(sample) for sample in self._pending], schema=_schema())
        with part.open("wb") as file:
            pyarrow.parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        # only now: until the shard has its name, only the journal has these lines
        self._journal.seek(0)
        self._journal.truncate()
        self._pending.clear()


def read_samples(folder: Path) -> list[Sample]:
    """Return all samples of a run, finished or not, each once.

    Raises:
        CommandError: if a file is damaged.
    """
    found = {sample.key: sample for shard in _shards(folder) for sample in _read_shard(shard)}
    journal = folder / "unfinished.jsonl"
    if journal.exists():
        for _, sample in _read_journal(journal):
            found.setdefault(sample.key, sample)
    return list(found.values())


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.parquet"))


def _schema() -> Any:
    import pyarrow

    kinds = {field.name: field.type for field in fields(Sample)}
    types = {
        name: next(TYPES[kind] for kind in TYPES if kind is of or kind | None == of) for name, of in kinds.items()
    }
    return pyarrow.schema([(name, getattr(pyarrow, kind.replace("bool", "bool_"))()) for name, kind in types.items()])


def _read_shard(path: Path) -> Iterator[Sample]:
    import pyarrow
    import pyarrow.parquet

    try:
        for row in pyarrow.parquet.read_table(path, partitioning=None).to_pylist():
            yield Sample(**row)
    except (pyarrow.ArrowException, OSError, TypeError) as err:
        raise CommandError(f"{path} is damaged ({one_line(err, 100)}); delete it and run again", FAILURE) from err


def _read_journal(path: Path) -> Iterator[tuple[int, Sample]]:
    """Yield the samples of the journal's whole lines, each with the offset of its line's end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                yield end, Sample(**json.loads(line))
            except (ValueError, TypeError) as err:
                raise CommandError(
                    f"{path}, line {number} is damaged; delete the line and run again", FAILURE
                ) from err
