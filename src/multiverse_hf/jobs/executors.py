"""Starts the tasks of a job with datatrove's executors: on this machine, with Slurm, or on Ray.

datatrove and Ray are imported inside functions, so that ``--help`` answers at once.
"""

import contextlib
import importlib.util
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiverse_hf.errors import FAILURE, CommandError, install_line
from multiverse_hf.jobs.options import Executor, Job
from multiverse_hf.jobs.processes import end_forks_with_this_process

if TYPE_CHECKING:
    from multiverse_hf.jobs.watch import Notes


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_executor(executor: Executor, option: str, needed: Mapping[str, str]) -> None:
    """Check that an executor can start tasks here, and that the needed modules are installed.

    Args:
        executor: executor of the tasks.
        option: option or command that needs the modules, for errors.
        needed: the extra that installs each module.

    Raises:
        CommandError: if a module is missing, with the line that installs it, or if jobs cannot start here.
    """
    if sys.platform == "win32":
        raise CommandError(f"{option} needs Linux or macOS; under Windows use WSL", FAILURE)
    for module, extra in needed.items():
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"{option} needs {module}: {install_line(extra)}", FAILURE)
    if executor is Executor.RAY and importlib.util.find_spec("ray") is None:
        raise CommandError(f"--executor ray needs Ray: {install_line('ray')}", FAILURE)
    if executor is Executor.SLURM and "SLURM_ARRAY_TASK_ID" in os.environ:
        raise CommandError("--executor slurm cannot be used inside a job array; run it where you log in")
    from loguru import logger

    import multiverse_hf.jobs.steps  # noqa: F401 - datatrove sets up its log on import

    logger.remove()


def start_tasks(
    step: Any,
    job: Job,
    workers: int,
    rows: int,
    preload: Sequence[str],
    advice: str = "",
    notes: "Notes | None" = None,
) -> str | None:
    """Run the unfinished tasks. With Slurm, submit them and return the job's number.

    Args:
        step: a :class:`~.steps.PartStep`.
        job: the job.
        workers: concurrent tasks on this machine.
        rows: total number of rows.
        preload: modules that workers need.
        advice: advice for a lack of memory.
        notes: as for :class:`~.watch.Watch`.

    Raises:
        CommandError: if a task fails.
        KeyboardInterrupt: on Ctrl-C or a SIGTERM.
    """
    folder = step.folder
    for task in folder.open_tasks():  # the parts decide what is finished, not datatrove's marks
        (folder.logs / "completions" / f"{task:05d}").unlink(missing_ok=True)
    if job.executor is Executor.SLURM:
        return _submit_slurm(slurm_executor(step, job))
    from multiverse_hf.jobs.watch import Watch

    with Watch(folder, rows, notes) as watch:
        try:
            if job.executor is Executor.RAY:
                _run_ray(step, job)
            else:
                _run_local(step, job, workers, preload)
        except KeyboardInterrupt:
            if watch.has_lost_worker:
                raise CommandError(
                    f"a worker was killed, as happens when memory runs out; the same command does the rest{advice}",
                    FAILURE,
                ) from None
            done = folder.count_rows()
            print(f"interrupted: {done} of {rows} rows are done; the same command does the rest", file=sys.stderr)
            raise
    return None


def _run_local(step: Any, job: Job, workers: int, preload: Sequence[str]) -> None:
    import multiprocess
    from loguru import logger
    from multiprocess import forkserver

    from multiverse_hf.jobs.steps import LocalTasks

    end_forks_with_this_process()
    executor = LocalTasks([step], tasks=job.tasks, workers=workers, logging_dir=str(step.folder.logs))
    multiprocess.set_forkserver_preload(list(preload))
    # Ctrl-C in a terminal reaches all processes of a command. Workers ignore it, like the server they are forked from,
    # and this process ends them, so that they print no tracebacks.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _output_to(step.folder.logs / "workers.log"):
            forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    # a single worker runs in this process
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            executor.run()
        finally:
            logger.remove()


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send the output of processes started in this context to a file."""
    with log.open("ab") as file:
        screen = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in screen:
                os.dup2(file.fileno(), number)
            yield
        finally:
            for number, kept in screen:
                os.dup2(kept, number)
                os.close(kept)


def _check_for_shell(logs: Path, sbatch: Sequence[str]) -> None:
    """Refuse characters that datatrove writes unquoted into Slurm's script, and that the shell or sbatch would split.

    Raises:
        CommandError: with the character.
    """
    shell, quotes = r"[\s\"'\\$`&|;<>()*?\[\]!#~{}%]", r"[\s\"']"
    for what, text, wrong in (
        ("the output folder", str(logs), shell),
        *(("--sbatch", each, quotes) for each in sbatch),
    ):
        if found := re.search(wrong, text):
            raise CommandError(
                f"{what} {text!r} holds {found[0]!r}, which a Slurm script cannot take; use only letters, "
                "digits, and _ - . /"
            )


def slurm_executor(step: Any, job: Job) -> Any:
    """Return datatrove's executor for Slurm."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    cluster = job.cluster
    _check_for_shell(step.folder.logs, cluster.sbatch)
    # the job's shell must find datatrove's commands, even if this environment is not activated there
    scripts = shlex.quote(str(Path(sys.executable).absolute().parent))
    return SlurmPipelineExecutor(
        [step],
        tasks=job.tasks,
        time=cluster.time,
        partition=cluster.partition,
        cpus_per_task=cluster.cpus_per_task or 1,
        mem_per_cpu_gb=cluster.mem_per_cpu or 2,
        gpus_per_task=cluster.gpus_per_task or 0,
        workers=job.workers or -1,
        job_name="multiverse",
        qos="",  # datatrove's default is "normal", which not every cluster has
        env_command=f"export PATH={scripts}:$PATH",
        sbatch_args=dict(each.split("=", 1) for each in cluster.sbatch),
        logging_dir=str(step.folder.logs),
    )


def slurm_script(executor: Any, num_tasks: int) -> str:
    """Return the script that datatrove would submit, built as in its ``launch_job``."""
    begun = Path(executor.slurm_logs_folder).exists()
    size = min(num_tasks, executor.max_array_size)
    command = f"srun  -l -n 1 launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}"
    script = executor.get_launch_file_contents(executor.get_sbatch_args(size), command)
    if not begun:
        with contextlib.suppress(OSError):
            os.removedirs(executor.slurm_logs_folder)  # created on the way; a dry run leaves nothing
    return script


def _submit_slurm(executor: Any) -> str:
    try:
        executor.run()
    except FileNotFoundError as err:
        if err.filename != "sbatch":
            raise
        raise CommandError("no sbatch here; run this where you log in to the Slurm cluster", FAILURE) from err
    except subprocess.CalledProcessError as err:  # sbatch prints the reason
        raise CommandError(
            f"sbatch refused the job (exit code {err.returncode}); --dry-run shows it", FAILURE
        ) from err
    return str(executor.job_id)


def _run_ray(step: Any, job: Job) -> None:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    cluster, folder = job.cluster, step.folder
    cpus, gpus, memory = cluster.cpus_per_task or 1, cluster.gpus_per_task or 0, cluster.mem_per_cpu or 2
    ray.init(
        log_to_driver=False, logging_level=logging.ERROR
    )  # at RAY_ADDRESS, a cluster on this machine, or a new one
    try:
        there = ray.cluster_resources()
        wanted = {"CPU": cpus, "GPU": gpus, "memory": cpus * memory * 2**30}
        for name, most in wanted.items():
            if most > there.get(name, 0):  # it would wait forever
                raise CommandError(
                    f"a task asks Ray for {most:g} of {name} and the whole cluster has {there.get(name, 0):g}; lower "
                    "--cpus-per-task, --gpus-per-task or --mem-per-cpu"
                )
        RayPipelineExecutor(
            [step],
            tasks=job.tasks,
            workers=job.workers or -1,
            logging_dir=str(folder.logs),
            cpus_per_task=cpus,
            gpus_per_task=gpus,
            mem_per_cpu_gb=memory,
        ).run()
    finally:
        ray.shutdown()
    if failed := folder.open_tasks():
        log = folder.logs / "logs" / f"task_{failed[0]:05d}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        reason = next(iter(re.findall(r"^\S*CommandError: (.*)$", text, re.MULTILINE)), f"task {failed[0]} failed")
        raise CommandError(f"{reason.rstrip('.')}; {log} has more", FAILURE)
