"""Options of :class:`~.multiverse_engine.MultiverseEngine`, and the memory that its cache takes."""

from dataclasses import dataclass
from typing import Any

import torch

from .cache import bytes_per_entry
from .cpu import can_pack, free_cpu_memory
from .distributed import Broadcast

DEFAULT_MEMORY = {"cpu": 0.25, "cuda": 0.8}  # share of the free memory that the cache takes by default
CPU_MEMORY = 1 << 29  # bytes; more only if asked for


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine works.

    Args:
        max_num_seqs: answers written at once; others wait.
        max_cache_tokens: tokens the cache holds, of all answers together, or
        cache_memory: bytes it may take. By default 80 % of a GPU's free memory, on a CPU a quarter of it and at most
            512 MiB, and never more than ``max_num_seqs`` contexts.
        prefill_chunk: prompt tokens read in one step, of all answers together, so that a long prompt does not hold up
            those that are being written.
        decoding: ``"packed"``, ``"static"`` or ``"simple"``, see :func:`~.runner.make_runner`. By default static on a
            GPU and packed elsewhere, or simple where the model cannot.
        pack_weights: keep a second copy of bfloat16 weights on a CPU in the order its instructions read them. By
            default where that is possible and the copy takes less than half of the free memory.

    Raises:
        ValueError: if an option is out of range.
    """

    max_num_seqs: int = 64
    max_cache_tokens: int | None = None
    cache_memory: int | None = None
    prefill_chunk: int = 512
    decoding: str | None = None
    pack_weights: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_cache_tokens", "cache_memory", "prefill_chunk"):
            value = getattr(self, name)
            if value is None and name in ("max_cache_tokens", "cache_memory"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                unit = " (bytes)" if name == "cache_memory" else ""
                raise ValueError(f"{name} must be an integer of at least 1{unit}, got {value!r}")
        if self.max_cache_tokens is not None and self.cache_memory is not None:
            raise ValueError("give max_cache_tokens or cache_memory, not both")
        if self.decoding not in (None, "packed", "static", "simple"):
            raise ValueError(f"decoding must be 'packed', 'static' or 'simple', got {self.decoding!r}")

    def decoding_for(self, model: Any) -> str:
        """Return the way to decode with a model."""
        return self.decoding or ("static" if model.device.type == "cuda" else "packed")

    def packs(self, model: Any) -> bool:
        """Return whether to pack a model's weights.

        Raises:
            ValueError: if that is asked for and not possible.
        """
        if self.pack_weights and not can_pack(model):
            raise ValueError(
                "pack_weights=True needs bfloat16 weights on a CPU with bfloat16 instructions, and free memory of "
                "twice their size; leave it out"
            )
        return can_pack(model) if self.pack_weights is None else self.pack_weights

    def plan_cache(self, model: Any) -> tuple[int, int, int]:
        """Return the tokens that the cache holds, the bytes that it takes, and those that one token takes.

        Raises:
            ValueError: if they do not fit the free memory.
        """
        size, tokens = bytes_per_entry(model), self.max_cache_tokens
        if tokens is None:
            memory = default_memory(model.device) if self.cache_memory is None else self.cache_memory
            tokens = memory // size
            if tokens < 1:
                raise ValueError(f"cache_memory={memory} holds no token: one takes {size} bytes")
            context = getattr(model.config, "max_position_embeddings", None)
            if self.cache_memory is None and context is not None:
                tokens = min(tokens, self.max_num_seqs * context)
            tokens = Broadcast(model)(tokens)  # processes may have unlike free memory
        taken = tokens * size
        free = free_memory(model.device)
        if free is not None and taken > free:
            raise ValueError(
                f"a cache of {tokens} tokens takes {taken / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
                "free; lower max_cache_tokens or cache_memory"
            )
        return tokens, taken, size


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later, as of an engine that was closed, is free too
        return torch.cuda.mem_get_info(device)[0]
    return free_cpu_memory()


def default_memory(device: torch.device) -> int:
    """Return the bytes that a cache takes by default."""
    free = free_memory(device)
    share = DEFAULT_MEMORY.get(device.type, DEFAULT_MEMORY["cpu"])
    most = free if device.type == "cuda" else CPU_MEMORY
    return most if free is None else min(int(free * share), most)
