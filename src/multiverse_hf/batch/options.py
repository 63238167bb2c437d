"""Settings of a batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import MAX_NUM_SEQS, Attention, Dtype
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.jobs.options import Job


@dataclass(frozen=True, slots=True)
class Batch(Job):
    """Settings of a batch.

    Attributes:
        source: the input, JSONL.
        output: output folder.
        model, dtype, attention, device, threads, suffix, options: as for one prompt; None in ``options`` is the
            default.
        max_num_seqs, max_cache_tokens: limits of each task's engine.
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
