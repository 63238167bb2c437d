"""Starting the tasks of a batch with datatrove's executors: on this machine, with Slurm, on Ray.

datatrove, torch and Ray are imported inside functions, so that ``--help`` answers at once.
"""

import contextlib
import functools
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multiverse_hf.batch.options import Batch, Executor
from multiverse_hf.checkpoints import FAILURE, CommandError


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_workers(batch: Batch) -> int:
    """Say how many tasks run at once here: by default one for each GPU, or each core."""
    if batch.workers is not None:
        return min(batch.workers, batch.tasks)
    import torch

    gpus = torch.cuda.device_count() if batch.device in ("auto", "cuda") else 0
    return min(gpus or _cores(), batch.tasks)


def num_threads(batch: Batch) -> int:
    """Share the cores among the tasks that run at once."""
    if batch.executor is not Executor.LOCAL:
        return batch.cluster.cpus_per_task or 1
    return max(1, _cores() // num_workers(batch))


def start_tasks(step: Any, batch: Batch, rows: int) -> str | None:
    """Run the tasks that are open; give Slurm's number of the job where it is Slurm that will run them."""
    if batch.executor is Executor.SLURM:
        return _submit_slurm(slurm_executor(step, batch))
    from multiverse_hf.batch.watch import Watch

    with Watch(step.work.folder, rows) as watch:
        try:
            if batch.executor is Executor.RAY:
                _run_ray(step, batch)
            else:
                _run_local(step, batch)
        except KeyboardInterrupt:
            if watch.has_lost_worker:
                raise CommandError(
                    "a worker was killed, as happens when memory runs out; the same command does the rest, with "
                    "fewer --workers or a lower --max-cache-tokens",
                    FAILURE,
                ) from None
            raise
    return None


def _run_local(step: Any, batch: Batch) -> None:
    import multiprocess
    from loguru import logger
    from multiprocess import forkserver

    from multiverse_hf.batch.task import LocalTasks

    _end_children_with_this_process()
    executor = LocalTasks(
        [step], tasks=batch.tasks, workers=num_workers(batch), logging_dir=str(step.work.folder.logs)
    )
    multiprocess.set_forkserver_preload(["multiverse_hf.batch.task", "multiverse_hf.modeling.continuous_batching"])
    # Ctrl-C in a terminal goes to all of a command's processes. Workers ignore it, as what they are forked from does,
    # and are ended by this process; so they leave no traceback on the screen each.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _output_to(step.work.folder.logs / "workers.log"):
            forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
    # a single worker is this process itself
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            executor.run()
        finally:
            logger.remove()


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Have the processes started meanwhile write to a file what they would write to the screen."""
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


@functools.cache  # once a process
def _end_children_with_this_process() -> None:
    """Have forked children end when this process is killed: datatrove's queue, for one, would stay for ever."""
    parent = os.getpid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(FAILURE)

    os.register_at_fork(after_in_child=lambda: threading.Thread(target=watch, daemon=True).start())


def slurm_executor(step: Any, batch: Batch) -> Any:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    cluster = batch.cluster
    # the job's shell has to find datatrove's commands, whether or not this environment is activated there
    scripts = shlex.quote(str(Path(sys.executable).absolute().parent))
    return SlurmPipelineExecutor(
        [step],
        tasks=batch.tasks,
        time=cluster.time,
        partition=cluster.partition,
        cpus_per_task=cluster.cpus_per_task or 1,
        mem_per_cpu_gb=cluster.mem_per_cpu or 2,
        gpus_per_task=cluster.gpus_per_task or 0,
        workers=batch.workers or -1,
        job_name="multiverse",
        qos="",  # datatrove asks for "normal", which not every cluster has
        env_command=f"export PATH={scripts}:$PATH",
        sbatch_args=dict(each.split("=", 1) for each in cluster.sbatch),
        logging_dir=str(step.work.folder.logs),
    )


def slurm_script(executor: Any, num_tasks: int) -> str:
    """Give the script that datatrove would submit, as its ``launch_job`` puts it together."""
    begun = Path(executor.slurm_logs_folder).exists()
    size = min(num_tasks, executor.max_array_size)
    command = f"srun  -l -n 1 launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}"
    script = executor.get_launch_file_contents(executor.get_sbatch_args(size), command)
    if not begun:
        with contextlib.suppress(OSError):
            os.removedirs(executor.slurm_logs_folder)  # made on the way; a dry run leaves nothing
    return script


def _submit_slurm(executor: Any) -> str:
    try:
        executor.run()
    except FileNotFoundError as err:
        if err.filename != "sbatch":
            raise
        raise CommandError("no sbatch here; run this where you log in to the Slurm cluster", FAILURE) from err
    except subprocess.CalledProcessError as err:  # which says why on the screen
        raise CommandError(
            f"sbatch refused the job (exit code {err.returncode}); --dry-run shows it", FAILURE
        ) from err
    return str(executor.job_id)


def _run_ray(step: Any, batch: Batch) -> None:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    cluster, folder = batch.cluster, step.work.folder
    cpus, gpus, memory = cluster.cpus_per_task or 1, cluster.gpus_per_task or 0, cluster.mem_per_cpu or 2
    ray.init(log_to_driver=False, logging_level=logging.ERROR)  # RAY_ADDRESS, a cluster started here, or a new one
    try:
        there = ray.cluster_resources()
        wanted = {"CPU": cpus, "GPU": gpus, "memory": cpus * memory * 2**30}
        for name, most in wanted.items():
            if most > there.get(name, 0):  # it would wait for ever
                raise CommandError(
                    f"a task asks Ray for {most:g} of {name} and the whole cluster has {there.get(name, 0):g}; lower "
                    "--cpus-per-task, --gpus-per-task or --mem-per-cpu"
                )
        RayPipelineExecutor(
            [step],
            tasks=batch.tasks,
            workers=batch.workers or -1,
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
