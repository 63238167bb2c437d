"""``multiverse generate --input``: check the input, run the tasks, and summarize.

datatrove and torch are imported inside functions, so that ``--help`` answers at once.
"""

import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multiverse_hf.batch.rows import Folder, check_input, merge_answers, summarize_answers
from multiverse_hf.begun import explain_option, name_option
from multiverse_hf.checkpoints import MAX_NUM_SEQS, Attention, Checkpoint, Dtype, fingerprint, open_checkpoint, quiet
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.jobs.executors import check_executor, cores, slurm_executor, slurm_script, start_tasks
from multiverse_hf.jobs.folders import begin_or_resume
from multiverse_hf.jobs.options import Executor, Job, JobOutcome
from multiverse_hf.jobs.processes import stopping_at_sigterm
from multiverse_hf.outputs import check_output

_PRELOAD = ("multiverse_hf.batch.task", "multiverse_hf.modeling.multiverse_engine")
# Settings that do not change the answers; they may differ when a run is continued.
_MAY_DIFFER = ("input", "model", "rows", "versions")


@dataclass(frozen=True, slots=True)
class Batch(Job):
    """Settings of a batch.

    Attributes:
        source: the input, JSONL.
        output: output folder.
        model, dtype, attention, device, threads, suffix, options: as for one prompt; None is the default, in
            ``options`` too.
        max_num_seqs, max_cache_tokens: limits of each task's engine.
    """

    source: Path
    output: Path
    model: str | None
    suffix: Suffix | None
    options: dict[str, Any]
    dtype: Dtype
    attention: Attention
    device: str
    threads: int | None
    max_num_seqs: int = MAX_NUM_SEQS
    max_cache_tokens: int | None = None


def run_batch(batch: Batch) -> JobOutcome:
    """Answer the rows of a file that are not finished. With Slurm, submit the job.

    Raises:
        CommandError: if the input, an option or the folder is invalid, or a task failed. Finished rows are kept.
        KeyboardInterrupt: on Ctrl-C or a SIGTERM; likewise.
    """
    check_executor(batch.executor, "--input", {"datatrove": "batch"})
    begin = time.perf_counter()
    if sys.stderr.isatty():
        print("reading the rows, loading torch and transformers", file=sys.stderr)
    source, folder = batch.source.expanduser().absolute(), Folder(batch.output.expanduser().absolute(), batch.tasks)
    rows, digest, counted = check_input(source)
    quiet()
    checkpoint = open_checkpoint(batch.model)
    batch = replace(batch, suffix=batch.suffix or checkpoint.suffix, options=checkpoint.with_record(batch.options))
    read = {"input": str(source), "input_sha256": digest, "rows": rows, "ids_count": counted}
    if batch.cluster.dry_run:
        step = _make_step(batch, folder, source, digest, _settle(batch, checkpoint, folder, read))
        return JobOutcome(folder.result, script=slurm_script(slurm_executor(step, batch), len(folder.open_tasks())))
    check_output(folder.path, is_folder=True)
    busy = f"another run is at work in {batch.output}; wait for it, or name another folder"
    with folder.lock("run", busy), stopping_at_sigterm():
        settings = _settle(batch, checkpoint, folder, read)
        before = rows if folder.result.exists() else folder.count_rows()
        if not folder.result.exists() and folder.open_tasks():
            step, workers = _make_step(batch, folder, source, digest, settings), num_workers(batch)
            advice = ", with fewer --workers or a lower --max-cache-tokens"
            job = start_tasks(step, batch, workers, rows, _PRELOAD, advice)
            if job is not None:
                return JobOutcome(folder.result, finished_before=before, job=job)
        if not folder.result.exists():
            merge_answers(folder, source, digest)
        return JobOutcome(folder.result, summarize_answers(folder.result), before, time.perf_counter() - begin)


# Settings and tasks


def _settle(batch: Batch, checkpoint: Checkpoint, folder: Folder, source: dict[str, Any]) -> dict[str, Any]:
    """Store the settings of a new run, except for a dry run, or check that they are those of the run in this folder.

    Returns:
        The settings. The first command of a run draws its seed.

    Raises:
        CommandError: if the folder is another run's.
    """
    asked = source | {"model": checkpoint.name, "weights": fingerprint(checkpoint), "tasks": batch.tasks}
    asked |= {"suffix": batch.suffix.value, **batch.options, "dtype": batch.dtype.value}

    def explain(name: str, stored: Mapping[str, Any], value: Any) -> str:
        if name == "input_sha256":
            return f"with other rows than {batch.source} now has"
        if name == "ids_count":
            return "by an earlier version, which counted rows without an id from 0 and not by their line"
        if name == "weights":
            return f"with another model ({stored.get('model')})"
        return explain_option(name, stored, value, _flag)

    packages, draws = ("datatrove",), {"seed": secrets.randbits(31)}
    return begin_or_resume(folder, batch.output, asked, _MAY_DIFFER, explain, packages, draws, batch.cluster.dry_run)


def _flag(name: str, value: Any) -> str:
    if name == "do_sample":
        return "--do-sample" if value else "--greedy"
    return name_option(name, value)


def _make_step(batch: Batch, folder: Folder, source: Path, digest: str, settings: dict[str, Any]) -> Any:
    """Return datatrove's step for the tasks. All paths are absolute, as tasks may run elsewhere."""
    from multiverse_hf.batch.task import AnswerRows, BatchWork

    model = batch.model
    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    options = {name: value for name, value in batch.options.items() if value is not None}
    return AnswerRows(
        BatchWork(
            folder=folder,
            source=source,
            digest=digest,
            model=model,
            model_name=settings.get("model", ""),
            options=options | {"seed": settings.get("seed", 0)},
            suffix=batch.suffix,
            dtype=batch.dtype,
            attention=batch.attention,
            device=batch.device,
            threads=batch.threads or num_threads(batch),
            max_num_seqs=batch.max_num_seqs,
            max_cache_tokens=batch.max_cache_tokens,
        )
    )


def num_workers(batch: Batch) -> int:
    """Return the number of concurrent tasks on this machine: by default one per GPU, or per core."""
    if batch.workers is not None:
        return min(batch.workers, batch.tasks)
    import torch

    gpus = torch.cuda.device_count() if batch.device in ("auto", "cuda") else 0
    return min(gpus or cores(), batch.tasks)


def num_threads(batch: Batch) -> int:
    """Return the threads of a task: its share of the cores among concurrent tasks."""
    if batch.executor is not Executor.LOCAL:
        return batch.cluster.cpus_per_task or 1
    return max(1, cores() // num_workers(batch))
