"""One task of a job, as datatrove runs it. Imported by workers too."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from multiverse_hf.errors import FAILURE, CommandError, one_line
from multiverse_hf.jobs.folders import JobFolder
from multiverse_hf.jobs.processes import end_worker_with_its_pool


class PartStep(PipelineStep):
    """A datatrove step that does a task's rows and appends them to its part. It ends a pipeline.

    The last task to end merges the parts.
    """

    type = "multiverse"
    advice: ClassVar[Mapping[str, str]] = {}  # by the name of an error's class: what to say in place of its message

    def __init__(self, folder: JobFolder) -> None:
        super().__init__()
        self.folder = folder
        self.local_rank = 0  # which of this machine's workers it is; schedulers show each its own GPUs instead

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> tuple[()]:
        """Do the rows of a task that are not finished.

        Raises:
            CommandError: if the task cannot go on; what is finished is kept.
        """
        end_worker_with_its_pool()
        folder = self.folder
        with (
            failing_in_a_line(rank, self.advice),
            folder.lock(f"{rank:05d}", f"another process is at work on task {rank}"),
        ):
            if folder.result.exists():  # the parts may be gone by now
                return ()
            if not folder.part(rank).exists():
                self.do_task(rank, world_size)
                folder.unfinished(rank).replace(folder.part(rank))
            if not folder.open_tasks():
                self.merge()
        return ()

    @abstractmethod
    def do_task(self, rank: int, world_size: int) -> None:
        """Append all rows of a task that are not there yet to its unfinished part."""

    @abstractmethod
    def merge(self) -> None:
        """Make the result of all parts."""


class LocalTasks(LocalPipelineExecutor):
    """datatrove's executor for one machine, whose workers know which of them they are and fail in a line."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        for step in self.pipeline:
            step.local_rank = local_rank
        with failing_in_a_line(rank):  # its logs may fail too, on a full disk
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextlib.contextmanager
def failing_in_a_line(rank: int, advice: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn whatever fails into one error with one message: others may not survive the way back from a worker.

    Raises:
        CommandError: instead.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as err:
        name = type(err).__name__
        reason = (advice or {}).get(name, one_line(err).rstrip("."))
        raise CommandError(f"task {rank} failed: {reason} ({name})", FAILURE) from err
