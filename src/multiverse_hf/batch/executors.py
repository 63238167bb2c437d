"""How many tasks of a batch run at once here, and with how many threads: each has a model of its own."""

from multiverse_hf.batch.options import Batch
from multiverse_hf.jobs.executors import cores
from multiverse_hf.jobs.options import Executor


def num_workers(batch: Batch) -> int:
    """Say how many tasks run at once here: by default one for each GPU, or each core."""
    if batch.workers is not None:
        return min(batch.workers, batch.tasks)
    import torch

    gpus = torch.cuda.device_count() if batch.device in ("auto", "cuda") else 0
    return min(gpus or cores(), batch.tasks)


def num_threads(batch: Batch) -> int:
    """Share the cores among the tasks that run at once."""
    if batch.executor is not Executor.LOCAL:
        return batch.cluster.cpus_per_task or 1
    return max(1, cores() // num_workers(batch))
