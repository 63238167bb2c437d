"""One task of a curation, run by datatrove: a share of the rows, many of them concurrently. Workers import it too."""

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

STATUS_S = 1.0  # between two updates of a task's status


@dataclass(frozen=True, slots=True)
class CurationWork:
    """The work of a curation, given to every task. It is stored in files, so it holds no key.

    Attributes:
        folder: output folder. All paths here are absolute, as workers may run elsewhere.
        source: the input.
        rows: number of rows of the input.
        settings: settings of the run.
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
            CommandError: if the endpoint refuses all calls.
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
    """Return the first error of a group; for a fault of the endpoint, a CommandError with the next step."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, EndpointError):
        return CommandError(
            f"the endpoint refuses all calls: {error}; correct that, then run the same command again", FAILURE
        )
    if isinstance(error, EndpointDown):
        return CommandError(f"the endpoint {url} is down: {error}; then run the same command again", FAILURE)
    return error


def _finished(part: Any, world_size: int) -> tuple[bytearray, int]:
    """Return which rows a part has, one byte for each row of the task, and the length of its whole lines in bytes."""
    finished, end = bytearray(), 0
    for begin, line in whole_lines(part):
        place = (number_of(line, part) - 1) // world_size
        finished.extend(bytes(max(0, place + 1 - len(finished))))
        finished[place] = 1
        end = begin + len(line)
    return finished, end


class _TaskRun:
    """A running task. Only the rows in progress are in memory."""

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
        gc.freeze()  # imported modules stay in memory: otherwise each full collection scans them, and all calls wait
        log, answers = CallLog(self.work.folder.calls(self.rank)), AnswerChecker()
        try:
            async with Endpoint(settings, settings.api_key()) as self.endpoint:
                curator = Curator(settings, self.endpoint.ask, answers, log)
                rows = self._open_rows()
                # more workers than calls: while some check a reply, others have a request ready for each free slot
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
        """Yield the task's rows that are not finished."""
        settings = self.work.settings
        rows = read_traces(
            self.work.source, settings.columns, settings.subset, settings.split, self.rank, self.world_size
        )
        for number, row in rows:
            place = (number - 1) // self.world_size
            if place >= len(self.finished) or not self.finished[place]:
                yield number, row

    async def _curate_rows(self, curator: Curator, rows: Iterator[tuple[int, Trace | RowError]]) -> None:
        """Curate rows one after another; several workers share ``rows``."""
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
        """Write the task's status, with the calls of its earlier runs added."""
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
