"""Settings of a job: its tasks, its executor and its cluster."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError


class Executor(StrEnum):
    """The executor of a job's tasks."""

    LOCAL = "local"
    SLURM = "slurm"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Resources of each task on a cluster.

    Attributes:
        partition, time, sbatch: options of Slurm; ``sbatch`` has others as ``name=value``.
        cpus_per_task, gpus_per_task: for Slurm and Ray.
        mem_per_cpu: memory in GB, for Slurm and Ray.
        dry_run: print Slurm's script and start nothing.
    """

    partition: str | None = None
    time: str | None = None
    sbatch: list[str] = field(default_factory=list)
    cpus_per_task: int | None = None
    gpus_per_task: int | None = None
    mem_per_cpu: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a job ended.

    Attributes:
        result: file with all rows; it is there once the last task has ended.
        summary: totals over the rows; None while tasks are still to run.
        finished_before: rows that an earlier command had finished.
        seconds: duration of this command.
        job: Slurm's number of the job.
        script: Slurm's script, for a dry run.
    """

    result: Path
    summary: Any = None
    finished_before: int = 0
    seconds: float = 0.0
    job: str | None = None
    script: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The tasks of a job.

    Attributes:
        tasks: number of tasks, each with a share of the rows.
        workers: concurrent tasks; None for as many as the machine or the cluster allows.
        executor, cluster: executor of the tasks, and their resources.
    """

    tasks: int = 1
    workers: int | None = None
    executor: Executor = Executor.LOCAL
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        """Check that the options fit together.

        Raises:
            CommandError: if an option is for another executor, or one is missing.
        """
        cluster = self.cluster
        for_slurm = {"--partition": cluster.partition, "--time": cluster.time, "--sbatch": cluster.sbatch}
        for_slurm["--dry-run"] = cluster.dry_run
        counts = {"--cpus-per-task": cluster.cpus_per_task, "--gpus-per-task": cluster.gpus_per_task}
        for_any = counts | {"--mem-per-cpu": cluster.mem_per_cpu}
        if self.executor is not Executor.SLURM and (
            given := next((name for name in for_slurm if for_slurm[name]), "")
        ):
            raise CommandError(f"{given} is for --executor slurm; leave it out")
        if self.executor is Executor.LOCAL and (
            given := next((name for name in for_any if for_any[name] is not None), "")
        ):
            raise CommandError(f"{given} is for --executor slurm or ray; leave it out")
        if self.executor is Executor.SLURM:
            for name in ("--partition", "--time"):
                if not for_slurm[name]:
                    raise CommandError(f"--executor slurm needs {name}; sinfo shows partitions and their time limits")
            for each in cluster.sbatch:
                if "=" not in each:
                    raise CommandError(f"--sbatch takes NAME=VALUE, such as account=me; got {each!r}")
