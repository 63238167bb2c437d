"""The runner: one forward pass over what the engine's sequences have to read, as cheap as the device allows."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .attention import SLIDING, layer_kinds, to_additive
from .cache import LogCache
from .decoding import PACKED, TURN, Paged, Piece, Step, attend_eager, attend_sdpa
from .state import Pages, Sequence
from .static import StaticRunner, can_capture

logger = logging.get_logger(__name__)

# When branches are kept apart
MIN_WORK = 3 << 22  # multiplications that a layer's scores take; below, masking costs less than leaving out
SHARE = 3  # if that leaves one of so many products to do
MIN_TAIL = 256  # log entries written since it was last done
MIN_PAGE = 16


def round_up(num_keys: int) -> int:
    """Have few numbers of keys: oneDNN compiles a product for every one it meets, which takes longer than to do it."""
    return -(-num_keys // 64) * 64


@dataclass(slots=True)
class Reading:
    """Log entries of one sequence that a step reads: ``first`` to ``end``, packed as ``queries`` of its row."""

    sequence: Sequence
    entries: list[tuple[int, np.ndarray]]  # each with what it sees
    queries: slice
    first: int
    end: int

    @property
    def is_last(self) -> bool:
        """Nothing is left to read: the sequence's branches choose their next tokens."""
        return len(self.entries) == len(self.sequence.pending)


class ModelRunner:
    """Calls the model for :class:`~.engine.Engine`.

    Args:
        model: a causal LM of transformers whose backbone takes positions, a 4-D mask and a cache.
        cache: the pool of logs.
        decoding: as for the engine.
    """

    def __init__(self, model: Any, cache: LogCache, decoding: str) -> None:
        self.model, self.cache = model, cache
        self.kinds = layer_kinds(model.config)
        self.window = model.config.sliding_window if SLIDING in self.kinds else None
        self.is_packed = decoding != "simple" and getattr(model, "_supports_attention_backend", False)
        with TURN:
            own = model.config._attn_implementation
        # flash and flex kernels take no mask of single tokens
        can_sdpa = model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None
        self.is_eager = own == "eager" or (own != "sdpa" and not can_sdpa)
        self.configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
        self.is_spread = len({weight.device for weight in model.parameters()}) > 1
        is_static = decoding == "static" and self.is_packed and not self.is_eager and self.window is None
        is_static = is_static and not self.is_spread and can_capture(model)
        self.static = StaticRunner(model, cache) if is_static else None
        # a GPU reads keys no faster for meeting fewer queries
        self.keeps_pages = model.device.type == "cpu" and not is_static and not self.is_eager and self.window is None
        self.width = model.config.hidden_size  # as many multiplications take the scores of a query and a key
        self.min_work, self.share, self.min_tail, self.min_page = MIN_WORK, SHARE, MIN_TAIL, MIN_PAGE

    def __call__(self, batch: list[Reading]) -> torch.Tensor:
        """Read log entries into the cache.

        Returns:
            (N, V) logits, a row for each live branch of each sequence that :attr:`Reading.is_last`.
        """
        with TURN, self._attention():
            if not self.is_packed:
                return self._forward_simple(batch)
            if self.static is not None and self.static.fits(batch):
                try:
                    return self.static(batch)
                # kernels that cannot be made here, no memory for another graph; torch's compiler raises errors of many
                # classes, the one at its limit of shapes is a plain Exception
                except Exception as err:
                    if self.model.device.type != "cuda":
                        raise
                    logger.warning(f"static decoding fails on this device, packed decoding goes on: {err}")
                    self.static = None
            return self._forward_packed(batch)

    @property
    def kind(self) -> str:
        """How it decodes: ``"static"``, ``"packed"`` or ``"simple"``."""
        return "static" if self.static is not None else "packed" if self.is_packed else "simple"

    def free(self) -> None:
        """Give the cache's memory back, and that of graphs, which know it by its address."""
        self.cache.free()
        if self.static is not None:
            self.static.free()

    def _forward_packed(self, batch: list[Reading]) -> torch.Tensor:
        """Read the entries of all sequences in one row."""
        device = self.model.device
        ids, positions, slots, pieces, rows = [], [], [], [], []
        for reading in batch:
            sequence, first, end = reading.sequence, reading.first, reading.end
            if self.keeps_pages:
                self._part_branches(sequence)
            base = self.cache.extents[sequence.arrival].base
            ids += sequence.ids[first:end]
            positions.append(sequence.positions[first:end])
            slots.append((base + first, base + end))
            pieces.append(self._piece(reading, base))
            if reading.is_last:
                shift = reading.queries.start - first
                rows += [branch.segment.entries[-1] + shift for branch in sequence.live]
        self.cache.prepare(slots, device)
        masked = [(reading, piece) for reading, piece in zip(batch, pieces, strict=True) if piece.mask is not None]
        output = self.model(
            input_ids=torch.tensor(ids, device=device)[None],
            position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
            attention_mask=self._masks(masked),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self._places(rows or [0]),
            multiverse_step=Step(pieces, attend_eager if self.is_eager else attend_sdpa),
        )
        return output.logits[0]

    def _piece(self, reading: Reading, base: int) -> Piece:
        """Say what part of the pool a reading attends to."""
        sequence, end = reading.sequence, reading.end
        keys = slice(base, base + end)
        if sequence.root.block is None and (self.window is None or end <= self.window):
            return Piece(reading.queries, keys, None, causal=True)
        if len(reading.entries) > 1 and sequence.pages is not None:
            size, order = sequence.pages.size, sequence.pages.order
            seen = np.stack([sees[order[: sequence.pages.count * size : size]] for _, sees in reading.entries])
            owners: list[int] = []
            shared: list[slice] = []
            for page, (count, owner) in enumerate(zip(seen.sum(axis=0), seen.argmax(axis=0), strict=True)):
                is_own = count == 1 and owner not in owners  # after a reduce one query sees the pages of several
                owners.append(int(owner) if is_own else -1)
                if count and not is_own:
                    shared.append(slice(page * size, (page + 1) * size))
            shared.append(slice(len(owners) * size, end))
            num_shared = sum(part.stop - part.start for part in shared)
            if self.share * (len(seen) * num_shared + len(owners) * size) <= len(seen) * end:
                return Piece(reading.queries, keys, slice(0, round_up(num_shared)), paged=Paged(size, owners, shared))
        return Piece(reading.queries, keys, slice(0, end))

    def _part_branches(self, sequence: Sequence) -> None:
        """Once its branches are long, bring together in the pool what each alone sees, in pages of one size.

        The log interleaves branches that are written at the same time. Attention would meet the keys of all of them
        only to mask them, which costs the square of the branches.
        """
        end = sequence.num_computed
        is_due = end - len(sequence.slots) >= max(self.min_tail, end // 32)
        if not is_due or sequence.is_reading or len(sequence.live) * end * self.width < self.min_work:
            return
        # of all that have something to read: paths that just closed do not see what the branch after them does
        views = {id(sees): sees[:end] for _, sees in sequence.pending}
        sees = np.stack(list(views.values()))
        if self.share * np.count_nonzero(sees, axis=1).max() > end:
            return
        owner = np.where(np.count_nonzero(sees, axis=0) == 1, sees.argmax(axis=0), -1)
        own = [np.flatnonzero(owner == view) for view in range(len(sees))]
        # live branches have mostly forked together, and are of one length; what they have beyond a page is shared
        lengths = sorted(len(entries) for entries in own)
        sizes = [length // self.min_page * self.min_page for length in lengths]
        size = max(sizes, key=lambda size: size * sum(length >= size for length in lengths))
        if size == 0:
            return
        pages = [entries[:size] for entries in own if len(entries) >= size]
        paged = np.concatenate(pages)
        rest = np.ones(end, dtype=bool)
        rest[paged] = False
        order = np.concatenate([paged, np.flatnonzero(rest)])
        slots = np.arange(end)
        slots[: len(sequence.slots)] = sequence.slots
        self.cache.arrange(sequence.arrival, slots[order])
        sequence.slots = np.empty(end, dtype=np.int64)
        sequence.slots[order] = np.arange(end)
        sequence.pages = Pages(len(pages), size, order)

    def _forward_simple(self, batch: list[Reading]) -> torch.Tensor:
        """Read the entries of each sequence in a pass of its own, as anyone would."""
        device, logits = self.model.device, []
        for reading in batch:
            sequence, first, end = reading.sequence, reading.first, reading.end
            base = self.cache.extents[sequence.arrival].base
            self.cache.prepare([(base + first, base + end)], device, slice(base, base + end))
            alone = Reading(sequence, reading.entries, slice(0, end - first), first, end)
            rows = [branch.segment.entries[-1] - first for branch in sequence.live] if reading.is_last else [0]
            output = self.model(
                input_ids=torch.tensor(sequence.ids[first:end], device=device)[None],
                position_ids=torch.from_numpy(sequence.positions[first:end])[None].to(device),
                attention_mask=self._masks([(alone, Piece(alone.queries, slice(base, base + end), slice(0, end)))]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=self._places(rows),
            )
            logits += [output.logits[0]] if reading.is_last else []
        return torch.cat(logits) if logits else output.logits[0]

    def _places(self, rows: list[int]) -> Any:
        """Say which places of a row logits are wanted of. A tensor would come to the first of several devices, where
        the last layer is not; a list comes to where it is used."""
        return rows if self.is_spread else torch.tensor(rows, device=self.model.device)

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Have the model attend as the engine decodes, for one pass."""
        own = self.configs[0]._attn_implementation
        name = PACKED if self.is_packed else "eager" if self.is_eager else "sdpa"
        for config in self.configs:
            config._attn_implementation = name
        try:
            yield
        finally:
            for config in self.configs:
                config._attn_implementation = own

    def _masks(self, batch: list[tuple[Reading, Piece]]) -> Any:
        """Give the model's ``attention_mask``: one tensor (1, 1, queries, columns), or one for each kind of layer."""
        shape = (max(r.queries.stop for r, _ in batch), max(p.mask.stop for _, p in batch)) if batch else (1, 1)
        mask = np.zeros(shape, dtype=bool)
        for reading, piece in batch:
            sequence, begin = reading.sequence, reading.queries.start
            if piece.paged is not None:  # columns for shared keys only
                order = np.concatenate([sequence.pages.order, np.arange(len(sequence.slots), reading.end)])
                columns = np.concatenate([order[part] for part in piece.paged.shared])
                for row, (entry, sees) in enumerate(reading.entries, begin):
                    (known,) = np.nonzero(columns <= entry)
                    mask[row, known] = sees[columns[known]]
                continue
            for _, run in itertools.groupby(reading.entries, key=lambda entry: id(entry[1])):
                entries = list(run)
                last, seen = entries[-1][0], entries[-1][1]
                rows = mask[begin : begin + len(entries), : last + 1]
                rows[:] = seen[: last + 1]
                if len(entries) > 1:
                    rows &= np.arange(last + 1) <= np.array([entry for entry, _ in entries])[:, None]
                begin += len(entries)
            if moved := len(sequence.slots):
                rows = mask[reading.queries]
                rows[:, sequence.slots] = rows[:, :moved].copy()
        masks = {}
        for kind in self.kinds:
            allowed = mask
            if kind == SLIDING and batch:
                allowed = mask.copy()
                for reading, _ in batch:
                    positions = reading.sequence.positions[: reading.end]
                    near = positions[reading.first :, None] - positions < self.window
                    allowed[reading.queries, : reading.end] &= near
            tensor = torch.from_numpy(allowed)[None, None].to(self.model.device)
            masks[kind] = to_additive(tensor, self.model.dtype) if self.is_packed or self.is_eager else tensor
        return masks if len(masks) > 1 else masks.popitem()[1]
