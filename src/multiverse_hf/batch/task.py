"""One task of a batch, as datatrove runs it: a share of the rows, answered by one engine. Imported by workers too."""

import collections
import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from multiverse_hf.batch.rows import OWN_FIELDS, Folder, Row, append_rows, merge, read_unchanged, write_row
from multiverse_hf.checkpoints import (
    FAILURE,
    Answer,
    Attention,
    Checkpoint,
    CommandError,
    Dtype,
    load_model,
    one_line,
    open_checkpoint,
    quiet,
)
from multiverse_hf.data.suffixes import Suffix

# Handles wake whoever waits for them at every token; looking at them now and then costs a batch nothing.
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Work:
    """What every task of a batch is given.

    Attributes:
        folder: of the output.
        source: the input; absolute, as all paths here: workers may run elsewhere.
        digest: SHA-256 of the input.
        model: what to open.
        model_name: what rows call it.
        options: of generation; ``seed`` is that of the whole batch.
        suffix: sentence at the end of each prompt.
        dtype, attention, device, threads: as for :func:`~multiverse_hf.checkpoints.load_model`.
        max_num_seqs, max_cache_tokens: of the engine; None for its own.
    """

    folder: Folder
    source: Path
    digest: str
    model: str | None
    model_name: str
    options: dict[str, Any]
    suffix: Suffix
    dtype: Dtype
    attention: Attention
    device: str
    threads: int | None
    max_num_seqs: int
    max_cache_tokens: int | None


def row_seed(seed: int, row_id: str | int) -> int:
    """Give a row's seed: of the batch's and its id alone, so that it has the same answer in any task."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=7).digest(), "little")


class AnswerRows(PipelineStep):
    """A datatrove step that answers a task's rows and appends them to its part. It ends a pipeline.

    Task k of N has every N-th row from row k on. The last task to end merges the parts.
    """

    type = "multiverse"
    name = "answer rows"

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.local_rank = 0  # which of this machine's workers it is; schedulers show each its own GPUs instead

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> tuple[()]:
        """Answer the rows of a task that are not finished.

        Raises:
            CommandError: if the task cannot go on; what is finished is kept.
        """
        _end_with_parent()
        folder = self.work.folder
        with _failing_in_a_line(rank), folder.lock(f"{rank:05d}", f"another process is at work on task {rank}"):
            if folder.answers.exists():  # the parts may be gone by now
                return ()
            if not folder.part(rank).exists():
                self._answer_task(rank, world_size)
            if not folder.open_tasks():
                merge(folder, self.work.source, self.work.digest)
        return ()

    def _answer_task(self, rank: int, world_size: int) -> None:
        work = self.work
        part = work.folder.unfinished(rank)
        # read to its end at once: that shows whether the input is still the one that was checked
        rows = [row for row in read_unchanged(work.source, work.digest) if row.number % world_size == rank]
        with append_rows(part) as (file, finished):
            if todo := [row for row in rows if str(row.id) not in finished]:
                self._answer(todo, file)
        part.replace(work.folder.part(rank))

    def _answer(self, todo: list[Row], file: IO[bytes]) -> None:
        """Answer rows, at most a window of them at once, and write each when it is done."""
        from multiverse_hf.modeling.continuous_batching import MultiverseEngine

        work = self.work
        quiet()
        checkpoint = open_checkpoint(work.model)
        model = load_model(checkpoint, work.dtype, work.attention, self._device(), work.threads)
        # twice as many as run, so that none is waited for; but a time limit counts from the submission
        window = work.max_num_seqs * (1 if work.options.get("max_time") is not None else 2)
        queue = collections.deque(todo)
        running: list[tuple[Row, Any, float]] = []
        sizes = {"max_num_seqs": work.max_num_seqs, "max_cache_tokens": work.max_cache_tokens}
        with MultiverseEngine(model, checkpoint.tokenizer, **sizes) as engine:
            while queue or running:
                while queue and len(running) < window:
                    row = queue.popleft()
                    try:
                        handle = self._submit(engine, checkpoint, row)
                    except CommandError as err:
                        self._write(file, row, {"error": one_line(err)})
                    else:
                        running.append((row, handle, time.perf_counter()))
                still: list[tuple[Row, Any, float]] = []
                for row, handle, begin in running:
                    if not handle.done:
                        still.append((row, handle, begin))
                        continue
                    result = handle.result()
                    answer = Answer(checkpoint.decode(result.ids), result.stats, time.perf_counter() - begin)
                    self._write(file, row, answer.to_dict())
                if len(still) == len(running):
                    time.sleep(POLL_S)
                running = still

    def _submit(self, engine: Any, checkpoint: Checkpoint, row: Row) -> Any:
        """Hand a row to the engine.

        Raises:
            CommandError: if this row can never be answered.
            ValueError: if none can.
        """
        ids = checkpoint.encode(row.question(self.work.suffix))
        options = self.work.options | {"seed": row_seed(self.work.options["seed"], row.id)}
        try:
            return engine.submit(ids, **options)
        except ValueError as err:
            # not the row's fault if a single token fares no better
            engine.submit(ids[:1], **options | {"max_new_tokens": 1}).cancel()
            raise CommandError(one_line(err)) from err

    def _write(self, file: IO[bytes], row: Row, answer: dict[str, Any]) -> None:
        """Append a row. All have the same fields, so that they load as one table."""
        own = dict.fromkeys(OWN_FIELDS) | answer | {"model": self.work.model_name}
        write_row(file, {"id": row.id} | row.fields | own)
        self.stat_update("rows" if own["error"] is None else "errors")
        if own["stats"] is not None:
            self.stat_update("tokens", value=own["stats"]["num_tokens"], unit="row")

    def _device(self) -> str:
        """Share a machine's GPUs among its workers."""
        import torch

        if self.work.device in ("auto", "cuda") and (count := torch.cuda.device_count()):
            return f"cuda:{self.local_rank % count}"
        return self.work.device


class LocalTasks(LocalPipelineExecutor):
    """datatrove's executor for one machine, whose workers know which of them they are and fail in a line."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        for step in self.pipeline:
            step.local_rank = local_rank
        with _failing_in_a_line(rank):  # its logs may fail too, on a full disk
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextlib.contextmanager
def _failing_in_a_line(rank: int) -> Iterator[None]:
    """Turn whatever fails into one error with one message: others may not survive the way back from a worker.

    Raises:
        CommandError: instead.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as err:
        reason = one_line(err).rstrip(".")
        if type(err).__name__ == "OutOfMemoryError":
            reason = "out of memory; lower --max-num-seqs or --max-cache-tokens, or use --dtype bfloat16"
        raise CommandError(f"task {rank} failed: {reason} ({type(err).__name__})", FAILURE) from err


@functools.cache  # once a process
def _end_with_parent() -> None:
    """Have a worker end when the process that started it does: after a kill nothing is left running."""
    parent = multiprocess.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(FAILURE)), daemon=True).start()
