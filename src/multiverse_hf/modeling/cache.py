"""The cache: one append-only log of keys and values per sequence, whatever branches write to it.

Keys carry their rotary position, so their physical order does not matter. A fork or a reduce therefore moves nothing:
it makes a row of visibility, which log entries a branch sees. Column 0 of every sequence is scratch: padding queries
write there and read there, and no real token ever sees it.
"""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

SCRATCH = 1  # columns before the first log entry
GROWTH = 256  # columns; a log grows by half of itself, rounded up to this


class LogLayer(CacheLayerMixin):
    """Keys and values of one layer, each (sequences, kv_heads, capacity, head_dim)."""

    def __init__(self, cache: "LogCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (key_states.shape[0], key_states.shape[1], self.cache.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (sequences, kv_heads, queries, head_dim) at the step's columns; give all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.write_slice is not None:
            self.keys[:, :, cache.write_slice] = key_states
            self.values[:, :, cache.write_slice] = value_states
        else:
            rows = torch.arange(len(key_states), device=key_states.device)[:, None]
            columns = cache.write_columns.to(key_states.device)
            self.keys[rows, :, columns] = key_states.transpose(1, 2)
            self.values[rows, :, columns] = value_states.transpose(1, 2)
        return self.keys[:, :, : cache.columns], self.values[:, :, : cache.columns]

    def resize(self, capacity: int) -> None:
        """Move to a larger allocation."""
        if self.is_initialized:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, capacity - self.keys.shape[2]))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, capacity - self.values.shape[2]))

    def keep(self, rows: list[int]) -> None:
        """Drop the sequences that are not in ``rows``."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1


class LogCache(Cache):
    """The logs of a batch of sequences.

    Before each forward, :meth:`prepare` says which log entries its queries are.

    Args:
        num_layers: layers of the model.
        capacity: log entries to make room for at first.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = SCRATCH + capacity
        self.columns = SCRATCH
        self.write_slice: slice | None = None
        self.write_columns: torch.Tensor | None = None
        super().__init__(layers=[LogLayer(self) for _ in range(num_layers)])

    def prepare(self, begins: list[int], ends: list[int], device: torch.device) -> None:
        """Say that the next forward's queries are log entries ``begins[i]`` to ``ends[i]`` of sequence ``i``.

        Shorter rows are padded on the right; their padding goes to the scratch column.
        """
        self.columns = SCRATCH + max(ends)
        if self.columns > self.capacity:
            self.capacity = -(-max(self.columns, self.capacity * 3 // 2) // GROWTH) * GROWTH
            for layer in self.layers:
                layer.resize(self.capacity)
        if len(set(begins)) == 1 and len(set(ends)) == 1:
            self.write_slice = slice(SCRATCH + begins[0], SCRATCH + ends[0])
            return
        self.write_slice = None
        length = max(end - begin for begin, end in zip(begins, ends, strict=True))
        columns = np.zeros((len(begins), length), dtype=np.int64)
        for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            columns[row, : end - begin] = np.arange(SCRATCH + begin, SCRATCH + end)
        self.write_columns = torch.from_numpy(columns).to(device)

    def keep(self, rows: list[int]) -> None:
        """Release all sequences but ``rows``."""
        for layer in self.layers:
            layer.keep(rows)

    @staticmethod
    def fork(sees: np.ndarray, num_paths: int) -> list[np.ndarray]:
        """Fork a branch: every path sees what it saw. No key or value moves.

        Args:
            sees: (capacity,) bool, the log entries the branch sees.
            num_paths: how many paths.
        """
        return [sees.copy() for _ in range(num_paths)]

    @staticmethod
    def reduce(paths: list[np.ndarray]) -> np.ndarray:
        """Merge paths: what follows sees all that any of them saw. No key or value moves."""
        return np.logical_or.reduce(paths)
