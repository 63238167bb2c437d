"""Answers on disk, one row each: finished shards in parquet, and a journal of what came since.

A parquet file cannot be appended to, and one that was being written when the process died cannot be read at all. So
each finished answer first becomes a line of ``unfinished.jsonl``, and when there are enough of them they become a
shard, ``00000.parquet``, which gets its name only when it is whole. A kill at any moment loses no finished answer: a
line that was cut off is dropped, and lines that are in a shard already are passed over.
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
        task, id, group: of the problem.
        sample: number of the answer among the problem's, from 0.
        seed: of its noise.
        prompt: what was asked, without chat template.
        document: the answer as generated, tags included, after the tag of thinking that the prompt's template opened.
        gold: the right answer.
        answer: what the document says in the end; None if nothing.
        correct, rule: the verdict (:mod:`~multiverse_hf.evaluation.answers`).
        well_formed: the document parses.
        num_tokens, length, parallelism, num_steps, num_forks, max_width, depth, num_closed, malformed, finish_reason:
            as the engine counted them (:class:`~multiverse_hf.modeling.state.GenerationStats`).
        seconds: from its submission to its end, what it shared the machine with included.
        error: why it could not be answered; None if it could.
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

    @property
    def key(self) -> tuple[str, str, int]:
        """Tell it from all others of a run."""
        return self.task, self.id, self.sample


class SampleStore:
    """The samples of one run. One process at a time may have it open.

    Args:
        folder: where the files are; made if it is not there.
        shard_rows: rows of a shard.

    Raises:
        CommandError: if another process has it open, or a file in it is damaged.
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
        """Keep a sample; once this returns, a kill of the process cannot lose it."""
        self._journal.write(json_text(asdict(sample)).encode())
        self._journal.flush()
        self.samples[sample.key] = sample
        self._pending.append(sample)
        if len(self._pending) >= self.shard_rows:
            self._write_shard()

    def close(self) -> None:
        """Make a shard of what is in the journal, and let others open the folder."""
        if self._pending:
            self._write_shard()
        self._journal.close()
        self._lock.close()

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_journal(self) -> IO[bytes]:
        """Open the journal at the end of its last whole line."""
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
        # only now: until the shard has its name the lines are all there is
        self._journal.seek(0)
        self._journal.truncate()
        self._pending.clear()


def read_samples(folder: Path) -> list[Sample]:
    """Read all samples of a run, finished or not, each once.

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
    """Return the samples of the journal's whole lines, each with the place where its line ends."""
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
