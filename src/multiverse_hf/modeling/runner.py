"""The choice of how the engine's steps are read: packed, static or simple."""

from dataclasses import replace
from typing import Any

import torch

from .attention_packed import PackedRunner, Piece
from .attention_static import StaticRunner, can_capture
from .cache import LogCache
from .hooks import needs_eager
from .masks import SLIDING, layer_kinds
from .state import Reading


def make_runner(model: Any, cache: LogCache, decoding: str) -> PackedRunner:
    """Return what reads log entries with a model.

    Args:
        model: a causal LM of transformers whose backbone takes positions, a 4-D mask and a cache.
        cache: the pool of logs.
        decoding: ``"packed"`` reads all sequences in one pass; ``"static"`` does so in fixed shapes, which a GPU
            replays as CUDA graphs; ``"simple"`` reads each in a pass of its own, with the model's own attention:
            slower, needs nothing of the model, and the oracle of the others. A model that cannot be read as asked is
            read in the next way of these.
    """
    if decoding == "simple" or not getattr(model, "_supports_attention_backend", False):
        return SimpleRunner(model, cache)
    is_full = SLIDING not in layer_kinds(model.config)
    is_spread = len({weight.device for weight in model.parameters()}) > 1
    if decoding == "static" and is_full and not is_spread and not needs_eager(model) and can_capture(model):
        return StaticRunner(model, cache)
    return PackedRunner(model, cache)


class SimpleRunner(PackedRunner):
    """Reads the log entries of each sequence in a pass of its own, as anyone would."""

    name = "simple"

    def __init__(self, model: Any, cache: LogCache) -> None:
        super().__init__(model, cache)
        self.attention = "eager" if self.is_eager else "sdpa"

    def read(self, batch: list[Reading]) -> torch.Tensor:
        """Do what :class:`~.attention_packed.PackedRunner` does."""
        logits = []
        for reading in batch:
            sequence, first, end = reading.sequence, reading.first, reading.end
            base = self.cache.extents[sequence.arrival].base
            self.cache.prepare([(base + first, base + end)], self.device, slice(base, base + end))
            alone = replace(reading, queries=slice(0, end - first))
            whole = Piece(alone.queries, slice(base, base + end), slice(0, end))
            rows = [entry - first for entry in reading.rows] or [0]
            read = self.forward(sequence.ids[first:end], sequence.positions[first:end], [(alone, whole)], rows)
            logits += [read] if reading.is_last else []
        return torch.cat(logits) if logits else read
