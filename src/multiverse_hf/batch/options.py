"""What a user asks of a batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import MAX_NUM_SEQS, Attention, Dtype
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.jobs.options import Job


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
