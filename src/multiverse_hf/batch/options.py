"""What a user asks of a batch, and how it ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiverse_hf.batch.rows import Summary
from multiverse_hf.checkpoints import Attention, Dtype
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.jobs.options import Job

MAX_NUM_SEQS = 64  # the engine's own default


@dataclass(frozen=True, slots=True)
class Batch(Job):
    """What a user asks for.

    Attributes:
        source: the input, JSONL.
        output: folder.
        model, dtype, attention, device, threads, suffix, options: as for one prompt; None in ``options`` says nothing.
        max_num_seqs, max_cache_tokens: of each task's engine.
    """

    source: Path
    output: Path
    model: str | None
    suffix: Suffix
    options: dict[str, Any]
    dtype: Dtype
    attention: Attention
    device: str
    threads: int | None
    max_num_seqs: int = MAX_NUM_SEQS
    max_cache_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        answers: where all rows are, or will be.
        summary: None if the tasks are still to run.
        finished_before: rows that were there already.
        seconds: it took.
        job: Slurm's number for it.
        script: what a dry run shows.
    """

    answers: Path
    summary: Summary | None = None
    finished_before: int = 0
    seconds: float = 0.0
    job: str | None = None
    script: str | None = None
