"""The cache: one append-only log of keys and values per sequence, whatever branches write to it.

Keys carry their rotary position, so their physical order does not matter. A fork or a reduce therefore moves nothing:
it makes a row of visibility, which log entries a branch sees.

All logs live in one pool of slots that is allocated once. Each has an extent of the pool, next to those of others,
which grows in place while it can, moves when it cannot, and is given back when its sequence ends or is preempted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .forward_inputs import CACHE
from .hooks import evaluating

SCRATCH = 1  # slots before the first extent: padding queries write there and read there


class LogLayer(CacheLayerMixin):
    """Keys and values of one layer, each (1, kv_heads, capacity, head_dim)."""

    def __init__(self, cache: "LogCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # zeros, not empty: what a mask hides is still multiplied by zero, and zero times NaN is NaN
        shape = (1, key_states.shape[1], self.cache.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (1, kv_heads, queries, head_dim) to the step's slots; give what the step reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write, read = self.cache.write, self.cache.read
        if isinstance(write, slice):
            self.keys[:, :, write] = key_states
            self.values[:, :, write] = value_states
        else:
            write = write.to(self.keys.device)  # of a model on several devices
            self.keys.index_copy_(2, write, key_states)
            self.values.index_copy_(2, write, value_states)
        return self.keys[:, :, read], self.values[:, :, read]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the contents of ``source`` slots to ``target`` slots, (slots,) int64 each; they may overlap."""
        for states in (self.keys, self.values) if self.is_initialized else ():
            moved = states.index_select(2, source.to(states.device))
            states.index_copy_(2, target.to(states.device), moved)

    def resize(self, capacity: int) -> None:
        """Move to a larger allocation."""
        if self.is_initialized:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, capacity - self.keys.shape[2]))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, capacity - self.values.shape[2]))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.read.stop - self.cache.read.start, 0

    def get_seq_length(self) -> int:
        return self.cache.read.stop - self.cache.read.start

    def get_max_length(self) -> int:
        return -1


@dataclass(slots=True)
class Extent:
    """Neighbouring slots of one log.

    Attributes:
        base: the first slot.
        size: how many.
        used: how many hold a log entry, or are about to.
    """

    base: int
    size: int
    used: int

    @property
    def end(self) -> int:
        return self.base + self.size


class LogCache(Cache):
    """The pool of all logs.

    Args:
        num_layers: layers of the model.
        capacity: log entries to make room for, of all sequences together.
        growable: allocate a larger pool when this one is full; otherwise :meth:`reserve` returns False.
    """

    is_log = True  # tells the hooks that the engine made a call, whichever copy of this code it is from

    def __init__(self, num_layers: int, capacity: int, growable: bool = False) -> None:
        self.capacity = SCRATCH + capacity
        self.growable = growable
        self.extents: dict[int, Extent] = {}  # by the sequence's number
        self.write: slice | torch.Tensor = slice(0, 0)  # slots of the next forward's queries
        self.read = slice(0, 0)  # slots the next forward gets to see
        super().__init__(layers=[LogLayer(self) for _ in range(num_layers)])

    @property
    def num_used(self) -> int:
        """Log entries held."""
        return sum(extent.used for extent in list(self.extents.values()))  # a copy: other threads ask

    @property
    def num_free(self) -> int:
        """Log entries there is still room for, after moving logs together if need be."""
        return self.capacity - SCRATCH - self.num_used

    def prepare(self, slots: list[tuple[int, int]], device: torch.device, read: slice | None = None) -> None:
        """Set where the next forward's queries go.

        Args:
            slots: the first slot and the one past the last, of each run of queries.
            read: what attention gets to see; by default the whole pool as far as any log reaches.
        """
        if len(slots) == 1:
            self.write = slice(*slots[0])
        else:
            self.write = torch.from_numpy(np.concatenate([np.arange(*run) for run in slots])).to(device)
        self.read = read or slice(0, max(end for _, end in slots))

    def reserve(self, owner: int, need: int, wish: int = 0) -> bool:
        """Make room for ``need`` entries of a log, and for up to ``wish`` where that is free.

        Returns:
            False if the pool has no room for it; nothing has changed then.
        """
        extent = self.extents.get(owner)
        if extent is not None and extent.size >= need:
            extent.used = max(extent.used, need)
            return True
        wish = max(need, wish)
        held = extent.used if extent is not None else 0
        if need - held > self.num_free:
            if not self.growable:
                return False
            self._enlarge(wish)
        gaps = self._gaps()
        if extent is not None:
            behind = next((size for base, size in gaps if base == extent.end), 0)
            if extent.size + behind >= need:
                extent.size, extent.used = min(extent.size + behind, wish), need
                return True
        base = next((base for base, size in gaps if size >= wish), None)
        if base is None:  # a gap that only just fits would have to be left again at once
            self._lay_out(owner, need)
            return True
        if extent is not None:
            slots = torch.arange(extent.used)
            for layer in self.layers:
                layer.move(extent.base + slots, base + slots)
        self.extents[owner] = Extent(base, wish, need)
        return True

    def keep(self, owner: int, first: int, entries: list[int]) -> None:
        """Cut a log off at ``first`` but for some later entries, which move to there."""
        if entries != list(range(first, first + len(entries))):
            source = self.extents[owner].base + torch.tensor(entries)
            target = self.extents[owner].base + first + torch.arange(len(entries))
            for layer in self.layers:
                layer.move(source, target)
        self.extents[owner].used = first + len(entries)

    def release(self, owner: int) -> None:
        """Free a log's slots."""
        self.extents.pop(owner, None)

    def free(self) -> None:
        """Free the pool's memory; a later forward allocates it again."""
        for owner in list(self.extents):
            self.release(owner)
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def _gaps(self) -> list[tuple[int, int]]:
        """Return (first slot, length) of what no log has, in order."""
        gaps, at = [], SCRATCH
        for extent in sorted(self.extents.values(), key=lambda extent: extent.base):
            if extent.base > at:
                gaps.append((at, extent.base - at))
            at = extent.end
        if at < self.capacity:
            gaps.append((at, self.capacity - at))
        return gaps

    def _lay_out(self, owner: int, need: int) -> None:
        """Lay all logs out anew, that of ``owner`` with ``need`` entries, and share the free room out evenly.

        Logs grow at much the same pace, so that this is done again only when most of that room is used.
        """
        order = sorted(self.extents, key=lambda key: self.extents[key].base)
        lengths = {key: self.extents[key].used for key in order} | {owner: need}
        share, rest = divmod(self.capacity - SCRATCH - sum(lengths.values()), len(lengths))
        extents, at = {}, SCRATCH
        for key, length in lengths.items():
            extents[key] = Extent(at, length + share + (rest if key == owner else 0), length)
            at = extents[key].end
        if order:
            runs = [np.arange(self.extents[key].used) for key in order]
            source = np.concatenate([self.extents[key].base + run for key, run in zip(order, runs, strict=True)])
            target = np.concatenate([extents[key].base + run for key, run in zip(order, runs, strict=True)])
            for layer in self.layers:
                layer.move(torch.from_numpy(source), torch.from_numpy(target))
        self.extents = extents

    def _enlarge(self, room: int) -> None:
        """Allocate a pool with ``room`` slots more, and at least half as large again."""
        self.capacity += max(room, self.capacity // 2)
        for layer in self.layers:
            layer.resize(self.capacity)

    @staticmethod
    def fork(sees: np.ndarray) -> np.ndarray:
        """Fork a branch: a path sees what it saw. No key or value moves.

        Args:
            sees: (entries,) bool, the log entries the branch sees.
        """
        return sees.copy()

    @staticmethod
    def reduce(paths: list[np.ndarray]) -> np.ndarray:
        """Merge paths: what follows sees all that any of them saw. No key or value moves."""
        size = max(map(len, paths))
        return np.logical_or.reduce([np.pad(path, (0, size - len(path))) for path in paths])


@torch.no_grad()
def bytes_per_entry(model: Any) -> int:
    """Measure what one log entry takes, in bytes: keys and values of all layers, by reading one token."""
    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with evaluating(model):
        model.base_model(input_ids=ids, use_cache=True, **{CACHE: cache})
    return sum(
        states.numel() * states.element_size() for layer in cache.layers for states in (layer.keys, layer.values)
    )
