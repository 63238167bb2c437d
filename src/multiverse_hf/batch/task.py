"""One task of a batch, run by datatrove: one engine answers a share of the rows. Workers import it too."""

import collections
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from multiverse_hf.batch.rows import OWN_FIELDS, Folder, PromptRow, append_rows, merge_answers, read_unchanged
from multiverse_hf.checkpoints import Answer, Attention, Checkpoint, Dtype, load_model, open_checkpoint, quiet
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.jobs.folders import write_row
from multiverse_hf.jobs.steps import PartStep

# Waiting on a handle wakes at every token; polling costs a batch nothing.
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class BatchWork:
    """The work of a batch, given to every task.

    Attributes:
        folder: output folder.
        source: the input. All paths here are absolute, as workers may run elsewhere.
        digest: SHA-256 of the input.
        model: folder or repository of the model.
        model_name: name of the model in rows.
        options: options of generation; ``seed`` is the seed of the whole batch.
        suffix: sentence at the end of each prompt.
        dtype, attention, device, threads: as for :func:`~multiverse_hf.checkpoints.load_model`.
        max_num_seqs, max_cache_tokens: limits of the engine; None for its default.
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
    """Return a row's seed, which depends only on the batch's seed and the row's id."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=7).digest(), "little")


class AnswerRows(PartStep):
    """A datatrove step that answers a task's rows. Task k of N has every N-th row from row k on."""

    name = "answer rows"
    advice: ClassVar[Mapping[str, str]] = {
        "OutOfMemoryError": "out of memory; lower --max-num-seqs or --max-cache-tokens, or use --dtype bfloat16"
    }

    def __init__(self, work: BatchWork) -> None:
        super().__init__(work.folder)
        self.work = work

    def do_task(self, rank: int, world_size: int) -> None:
        """Answer the rows of a task that are not finished."""
        work = self.work
        # read to its end first, which checks that the input has not changed
        rows = [row for row in read_unchanged(work.source, work.digest) if row.number % world_size == rank]
        with append_rows(work.folder.unfinished(rank)) as (file, finished):
            if todo := [row for row in rows if str(row.id) not in finished]:
                self._answer(todo, file)

    def merge(self) -> None:
        """Write all rows to one file, in the input's order."""
        merge_answers(self.work.folder, self.work.source, self.work.digest)

    def _answer(self, todo: list[PromptRow], file: IO[bytes]) -> None:
        """Answer rows, a window of them at a time, and write each when it is done."""
        from multiverse_hf.modeling.multiverse_engine import MultiverseEngine

        work = self.work
        quiet()
        checkpoint = open_checkpoint(work.model)
        model = load_model(checkpoint, work.dtype, work.attention, self._device(), work.threads)
        # twice the running ones, so that the engine never waits; but a time limit counts from the submission
        window = work.max_num_seqs * (1 if work.options.get("max_time") is not None else 2)
        queue = collections.deque(todo)
        running: list[tuple[PromptRow, Any, float]] = []
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
                still: list[tuple[PromptRow, Any, float]] = []
                for row, handle, begin in running:
                    if not handle.done:
                        still.append((row, handle, begin))
                        continue
                    result = handle.result()
                    seconds = time.perf_counter() - begin
                    answer = Answer(checkpoint.decode(result.ids), result.stats, seconds, checkpoint.tags.names)
                    self._write(file, row, answer.to_dict())
                if len(still) == len(running):
                    time.sleep(_POLL_S)
                running = still

    def _submit(self, engine: Any, checkpoint: Checkpoint, row: PromptRow) -> Any:
        """Submit a row to the engine.

        Raises:
            CommandError: if this row can never be answered.
            ValueError: if no row can be answered.
        """
        ids = checkpoint.encode(row.question(self.work.suffix))
        options = self.work.options | {"seed": row_seed(self.work.options["seed"], row.id)}
        try:
            return engine.submit(ids, **options)
        except ValueError as err:
            # not the row's fault if a single token fails too
            engine.submit(ids[:1], **options | {"max_new_tokens": 1}).cancel()
            raise CommandError(one_line(err)) from err

    def _write(self, file: IO[bytes], row: PromptRow, answer: dict[str, Any]) -> None:
        """Append a row. All rows have the same fields, so that they load as one table."""
        own = dict.fromkeys(OWN_FIELDS) | answer | {"model": self.work.model_name}
        write_row(file, {"id": row.id} | row.fields | own)
        self.stat_update("rows" if own["error"] is None else "errors")
        if own["stats"] is not None:
            self.stat_update("tokens", value=own["stats"]["num_tokens"], unit="row")

    def _device(self) -> str:
        """Return the device of this worker: workers share a machine's GPUs."""
        import torch

        if self.work.device in ("auto", "cuda") and (count := torch.cuda.device_count()):
            return f"cuda:{self.local_rank % count}"
        return self.work.device
