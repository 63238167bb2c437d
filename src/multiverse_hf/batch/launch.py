"""``multiverse generate --input``: check everything, have the tasks run, sum up.

datatrove and torch are imported inside functions, so that ``--help`` answers at once.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from multiverse_hf import __version__
from multiverse_hf.batch.executors import num_threads, slurm_executor, slurm_script, start_tasks
from multiverse_hf.batch.options import Batch, Executor, Outcome
from multiverse_hf.batch.rows import Folder, check_input, count_lines, merge, summarize
from multiverse_hf.checkpoints import (
    FAILURE,
    CommandError,
    check_output,
    fingerprint,
    one_line,
    open_checkpoint,
    quiet,
    write_output,
)

# What a run is and not how it is run: may differ when it is gone on with.
INFORMATION = ("input", "model", "rows", "versions")


def run_batch(batch: Batch) -> Outcome:
    """Answer the rows of a file, or those that an earlier run left; with Slurm, have them answered.

    Raises:
        CommandError: if the input, an option or the folder is not as it should be, or a task failed. What is finished
            is kept.
        KeyboardInterrupt: on Ctrl-C or a SIGTERM, likewise.
    """
    _check_packages(batch.executor)
    begin = time.perf_counter()
    source, folder = batch.source.expanduser().absolute(), Folder(batch.output.expanduser().absolute(), batch.tasks)
    rows, digest = check_input(source)
    read = {"input": str(source), "input_sha256": digest, "rows": rows}
    if batch.cluster.dry_run:
        step = _make_step(batch, folder, source, digest, _settle(batch, folder, read))
        return Outcome(folder.answers, script=slurm_script(slurm_executor(step, batch), len(folder.open_tasks())))
    check_output(folder.path, is_folder=True)
    busy = f"another run is at work in {batch.output}; wait for it, or name another folder"
    with folder.lock("run", busy), _stopping_at_sigterm():
        settings = _settle(batch, folder, read)
        before = count_rows(folder)
        if not folder.answers.exists() and (tasks := folder.open_tasks()):
            for task in tasks:  # datatrove's marks follow the parts, not the other way round
                (folder.logs / "completions" / f"{task:05d}").unlink(missing_ok=True)
            step = _make_step(batch, folder, source, digest, settings)
            try:
                job = start_tasks(step, batch, rows)
            except KeyboardInterrupt:
                done = count_rows(folder)
                print(f"interrupted: {done} of {rows} rows are done; the same command does the rest", file=sys.stderr)
                raise
            if job is not None:
                return Outcome(folder.answers, finished_before=before, job=job)
        if not folder.answers.exists():
            merge(folder, source, digest)
        return Outcome(folder.answers, summarize(folder.answers), before, time.perf_counter() - begin)


def count_rows(folder: Folder) -> int:
    """Count the rows that are finished."""
    if folder.answers.exists():
        return count_lines(folder.answers)[0]
    paths = (path for task in range(folder.tasks) for path in (folder.part(task), folder.unfinished(task)))
    return sum(count_lines(path)[0] for path in paths)


def _check_packages(executor: Executor) -> None:
    if sys.platform == "win32":
        raise CommandError("--input needs Linux or macOS; under Windows use WSL", FAILURE)
    if importlib.util.find_spec("datatrove") is None:
        raise CommandError("--input needs datatrove: pip install 'multiverse_hf[batch]'", FAILURE)
    if executor is Executor.RAY and importlib.util.find_spec("ray") is None:
        raise CommandError("--executor ray needs Ray: pip install 'multiverse_hf[ray]'", FAILURE)
    if executor is Executor.SLURM and "SLURM_ARRAY_TASK_ID" in os.environ:
        raise CommandError("--executor slurm cannot be used inside a job array; run it where you log in")
    from loguru import logger

    import multiverse_hf.batch.task  # noqa: F401 - datatrove sets its log up when it is imported

    logger.remove()


# What a run is


def _settle(batch: Batch, folder: Folder, source: dict[str, Any]) -> dict[str, Any]:
    """Write down what a run is begun with, unless that is a dry run, or check that it is the one that was begun here.

    Returns:
        The settings; the seed is the run's from its first command on.

    Raises:
        CommandError: if the folder is another run's.
    """
    quiet()
    checkpoint = open_checkpoint(batch.model)
    names = ("torch", "transformers", "datatrove")
    asked = source | {"model": checkpoint.name, "weights": fingerprint(checkpoint), "tasks": batch.tasks}
    asked |= {"suffix": batch.suffix.value, **batch.options, "dtype": batch.dtype.value}
    stored = _read_settings(folder)
    if stored is None:
        if folder.answers.exists() or (folder.path / "parts").exists():
            raise CommandError(f"{batch.output} holds rows of a run, but no run.json; name another folder")
        if asked["seed"] is None:
            asked["seed"] = secrets.randbits(31)
        asked["versions"] = {"multiverse_hf": __version__} | {name: version(name) for name in names}
        if not batch.cluster.dry_run:
            write_output(folder.settings, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")
        return asked
    for name, value in asked.items():
        there = stored.get(name)
        if name in INFORMATION or value == there or (name == "seed" and value is None):
            continue
        way_out = "give the same again to go on, or another --output"
        if name == "input_sha256":
            raise CommandError(f"{batch.output} was begun with other rows than {batch.source} now has; {way_out}")
        if name == "weights":
            raise CommandError(f"{batch.output} was begun with another model ({stored.get('model')}); {way_out}")
        was = f"with {_flag(name, there)}" if there is not None else f"without {_flag(name, value)}"
        now = f", now it is {_flag(name, value)}" if None not in (there, value) else ""
        raise CommandError(f"{batch.output} was begun {was}{now}; {way_out}")
    return stored


def _flag(name: str, value: Any) -> str:
    if name == "do_sample":
        return "--do-sample" if value else "--greedy"
    return f"--{name.replace('_', '-')} {value}"


def _read_settings(folder: Folder) -> dict[str, Any] | None:
    try:
        stored = json.loads(folder.settings.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise CommandError(f"cannot read {folder.settings}: {one_line(err)}; name another folder") from err
    if not isinstance(stored, dict):
        raise CommandError(f"{folder.settings} does not describe a run; name another folder")
    return stored


def _make_step(batch: Batch, folder: Folder, source: Path, digest: str, settings: dict[str, Any]) -> Any:
    """Give datatrove's step for the tasks, all paths absolute: they may run elsewhere."""
    from multiverse_hf.batch.task import AnswerRows, Work

    model = batch.model
    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    options = {name: value for name, value in batch.options.items() if value is not None}
    return AnswerRows(
        Work(
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


@contextlib.contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    """Take a SIGTERM as Ctrl-C, so that no process of ours outlives this one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
