"""One task of a job, run by datatrove. Workers import it too."""

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
    """A datatrove step that appends a task's rows to its part. It is the last of a pipeline.

    The last task to end merges the parts.
    """

    type = "multiverse"
    advice: ClassVar[Mapping[str, str]] = {}  # by the name of an error's class: a message in place of its own

    def __init__(self, folder: JobFolder) -> None:
        super().__init__()
        self.folder = folder
        self.local_rank = 0  # number of this worker on its machine; schedulers show each worker only its own GPUs

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> tuple[()]:
        """Finish the rows of a task.

        Raises:
            CommandError: if the task fails; finished rows are kept.
        """
        end_worker_with_its_pool()
        folder = self.folder
        with (
            failing_in_a_line(rank, self.advice),
            folder.lock(f"{rank:05d}", f"another process is at work on task {rank}"),
        ):
            if folder.result.exists():  # the parts may have been deleted
                return ()
            if not folder.part(rank).exists():
                self.do_task(rank, world_size)
                folder.unfinished(rank).replace(folder.part(rank))
            if not folder.open_tasks():
                self.merge()
        return ()

    @abstractmethod
    def do_task(self, rank: int, world_size: int) -> None:
        """Append the missing rows of a task to its unfinished part."""

    @abstractmethod
    def merge(self) -> None:
        """Merge all parts into the result."""


class LocalTasks(LocalPipelineExecutor):
    """datatrove's executor for one machine. Its workers know their number, and fail with one line."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        for step in self.pipeline:
            step.local_rank = local_rank
        with failing_in_a_line(rank):  # writing logs fails too on a full disk
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextlib.contextmanager
def failing_in_a_line(rank: int, advice: Mapping[str, str] | None = None) -> Iterator[None]:
    """Raise any error as one CommandError, as other errors may not survive the transfer from a worker.

    Raises:
        CommandError: instead of any other error.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as err:
        name = type(err).__name__
        reason = (advice or {}).get(name, one_line(err).rstrip("."))
        raise CommandError(f"task {rank} failed: {reason} ({name})", FAILURE) from err
