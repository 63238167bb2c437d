"""One task of a curation, as datatrove runs it: a share of the rows, many of them at once. Imported by workers too."""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from loguru import logger

from multiverse_hf.curator.answers import AnswerChecker
from multiverse_hf.curator.calls import CallLog
from multiverse_hf.curator.curation import Curator, Outcome
from multiverse_hf.curator.endpoint import Endpoint, EndpointError
from multiverse_hf.curator.health import EndpointDown
from multiverse_hf.curator.options import ANSWERS_AGAIN, Settings
from multiverse_hf.curator.results import (
    CurationFolder,
    describe_bad_row,
    describe_outcome,
    merge_outcomes,
    number_of,
)
from multiverse_hf.curator.traces import Trace, read_traces
from multiverse_hf.data.records import RowError
from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.jobs.folders import appending, whole_lines, write_row
from multiverse_hf.jobs.steps import PartStep
from multiverse_hf.outputs import write_output

STATUS_S = 1.0  # between two writings of what a task is at


@dataclass(frozen=True, slots=True)
class CurationWork:
    """What every task of a curation is given. No key is in it: it is written to files.

    Attributes:
        folder: of the output; absolute, as all paths here: workers may run elsewhere.
        source: the input.
        rows: of it.
        settings: of the run.
    """

    folder: CurationFolder
    source: str
    rows: int
    settings: Settings


class CurateRows(PartStep):
    """A datatrove step that curates a task's rows. Task k of N has every N-th row from row k on."""

    name = "curate rows"

    def __init__(self, work: CurationWork) -> None:
        super().__init__(work.folder)
        self.work = work

    def do_task(self, rank: int, world_size: int) -> None:
        """Curate the rows of a task that are not finished.

        Raises:
            CommandError: if the endpoint takes no calls.
        """
        part = self.folder.unfinished(rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        finished, end = _finished(part, world_size)
        with appending(part, end) as file:
            try:
                asyncio.run(_TaskRun(self.work, rank, world_size, finished, file).run())
            except BaseExceptionGroup as group:
                raise _explain(group, self.work.settings.base_url) from group

    def merge(self) -> None:
        """Write accepted and rejected rows, each in the input's order."""
        merge_outcomes(self.work.folder, self.work.rows, self.work.settings)


def _explain(group: BaseExceptionGroup, url: str) -> BaseException:
    """Give what went wrong first, where it is the endpoint's fault with the way out."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, EndpointError):
        return CommandError(
            f"the endpoint takes no calls: {error}; mend that, and give the same command again", FAILURE
        )
    if isinstance(error, EndpointDown):
        return CommandError(f"the endpoint {url} is down: {error}; then the same command goes on", FAILURE)
    return error


def _finished(part: Any, world_size: int) -> tuple[bytearray, int]:
    """Read which rows a part has: a byte for each row of the task, and the bytes of all whole lines."""
    finished, end = bytearray(), 0
    for begin, line in whole_lines(part):
        place = (number_of(line, part) - 1) // world_size
        finished.extend(bytes(max(0, place + 1 - len(finished))))
        finished[place] = 1
        end = begin + len(line)
    return finished, end


class _TaskRun:
    """The rows of a task on their way. Only as many are in memory as are worked at."""

    def __init__(self, work: CurationWork, rank: int, world_size: int, finished: bytearray, file: IO[bytes]) -> None:
        self.work, self.rank, self.world_size = work, rank, world_size
        self.finished, self.file = finished, file
        self.counts: Counter[str] = Counter(_read_status(work.folder, rank))
        self.endpoint: Endpoint | None = None

    async def run(self) -> None:
        """Curate all rows.

        Raises:
            ExceptionGroup: of EndpointError or EndpointDown.
        """
        settings = self.work.settings
        gc.freeze()  # what is imported stays: else every full collection looks it over, and all calls wait meanwhile
        log, answers = CallLog(self.work.folder.calls(self.rank)), AnswerChecker()
        try:
            async with Endpoint(settings, settings.api_key()) as self.endpoint:
                curator = Curator(settings, self.endpoint.ask, answers, log)
                rows = self._open_rows()
                # more rows than calls: while some are checked, others have a request ready for each slot that is free
                num_workers = settings.concurrency + settings.concurrency // 2 + 1
                async with asyncio.TaskGroup() as group:
                    status = group.create_task(self._keep_status())
                    workers = [group.create_task(self._curate_rows(curator, rows)) for _ in range(num_workers)]
                    await asyncio.wait(workers)
                    status.cancel()
        finally:
            answers.close()
            log.close()
            self._write_status()

    def _open_rows(self) -> Iterator[tuple[int, Trace | RowError]]:
        """Give the rows of the task that are not finished, each when it is asked for."""
        settings = self.work.settings
        rows = read_traces(
            self.work.source, settings.columns, settings.subset, settings.split, self.rank, self.world_size
        )
        for number, row in rows:
            place = (number - 1) // self.world_size
            if place >= len(self.finished) or not self.finished[place]:
                yield number, row

    async def _curate_rows(self, curator: Curator, rows: Iterator[tuple[int, Trace | RowError]]) -> None:
        """Take one row after the other, beside others that do the same."""
        for number, trace in rows:
            if isinstance(trace, RowError):
                self._write(describe_bad_row(number, trace.detail))
                continue
            outcome = await curator.curate(trace)
            self._write(describe_outcome(outcome, self.work.settings))
            self._count(outcome)

    def _write(self, line: dict[str, Any]) -> None:
        write_row(self.file, line)
        self.counts["accepted" if line["accepted"] else "rejected"] += 1

    def _count(self, outcome: Outcome) -> None:
        for attempt in outcome.attempts:
            self.counts["prompt_tokens"] += attempt.prompt_tokens
            self.counts["completion_tokens"] += attempt.completion_tokens

    async def _keep_status(self) -> None:
        logged = None
        while True:
            if (trouble := self.endpoint.trouble) != logged:
                logged = trouble
                logger.warning(trouble or ANSWERS_AGAIN)
            self._write_status()
            await asyncio.sleep(STATUS_S)

    def _write_status(self) -> None:
        """Say on the disk what the task is at. The calls of earlier runs of the task are counted on."""
        status: dict[str, Any] = dict(self.counts)
        if self.endpoint is not None:
            calls = Counter({f"calls {name}": count for name, count in self.endpoint.counts.items()})
            calls["outages"] = self.endpoint.health.num_outages
            status = dict(self.counts + calls) | {"trouble": self.endpoint.trouble}
        write_output(self.work.folder.status(self.rank), json.dumps(status) + "\n")


def _read_status(folder: CurationFolder, rank: int) -> dict[str, int]:
    try:
        status = json.loads(folder.status(rank).read_bytes())
    except (OSError, ValueError):
        return {}
    counts = status.items() if isinstance(status, dict) else ()
    return {name: count for name, count in counts if isinstance(count, int) and not isinstance(count, bool)}
