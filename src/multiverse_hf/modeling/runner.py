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
from .decoding import PACKED, TURN, Piece, Step, attend_eager, attend_sdpa
from .hooks import CACHE, evaluating, uncompiled
from .pages import ROUND, choose_pages
from .state import Sequence
from .static import StaticRunner, can_capture
from .threads import chosen_threads

logger = logging.get_logger(__name__)

# When what branches see is copied
MIN_WORK = 1 << 24  # multiplications that a layer's scores take; below, masking costs less
MIN_NEW = 256  # log entries written since it was last thought of,
MIN_TAIL = 64  # and so many by each branch


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


def needs_eager(model: Any) -> bool:
    """Say whether a model attends as its own file has it, and not with torch's kernel."""
    with TURN:
        own = model.config._attn_implementation
    # flash and flex kernels take no mask of single tokens
    can_sdpa = model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None
    return own == "eager" or (own != "sdpa" and not can_sdpa)


def can_copy(model: Any, decoding: str) -> bool:
    """Say whether long branches read copies; a GPU reads keys no faster for meeting fewer queries."""
    is_packed = decoding == "packed" and getattr(model, "_supports_attention_backend", False)
    is_full = SLIDING not in layer_kinds(model.config)
    return model.device.type == "cpu" and is_packed and is_full and not needs_eager(model)


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
        self.is_eager = needs_eager(model)
        self.configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
        self.is_spread = len({weight.device for weight in model.parameters()}) > 1
        is_static = decoding == "static" and self.is_packed and not self.is_eager and self.window is None
        is_static = is_static and not self.is_spread and can_capture(model)
        self.static = StaticRunner(model, cache) if is_static else None
        self.keeps_pages = can_copy(model, decoding)
        self.num_parameters = sum(weight.numel() for weight in model.parameters())
        self.width = model.config.hidden_size  # as many multiplications take the scores of a query and a key
        self.min_work, self.min_new, self.min_tail, self.min_page = MIN_WORK, MIN_NEW, MIN_TAIL, ROUND

    def __call__(self, batch: list[Reading]) -> torch.Tensor:
        """Read log entries into the cache.

        Returns:
            (N, V) logits, a row for each live branch of each sequence that :attr:`Reading.is_last`.
        """
        is_static = self.static is not None
        with TURN, evaluating(self.model), uncompiled(self.model, is_static), self._threads(batch), self._attention():
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

    def _threads(self, batch: list[Reading]) -> contextlib.AbstractContextManager[None]:
        """Compute a pass with the model's own choice of threads."""
        return chosen_threads(self.model, self.num_parameters, sum(len(reading.entries) for reading in batch))

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
                self._copy_branches(sequence)
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
            **{CACHE: self.cache},
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
        if sequence.pages is not None:
            paged = sequence.pages.meet(reading.entries, base, self.model.device)
            if paged is not None:
                return Piece(reading.queries, keys, slice(0, paged.num_tail), paged=paged)
        return Piece(reading.queries, keys, slice(0, end))

    def _copy_branches(self, sequence: Sequence) -> None:
        """Once branches are long, copy what they see."""
        if sequence.is_reading:
            return
        end, pages = sequence.num_computed, sequence.pages
        # of all that have something to read: paths that just closed do not see what the branch after them does
        views = list({id(sees): sees for _, sees in sequence.pending}.values())
        is_due = end - sequence.num_weighed >= max(self.min_new, self.min_tail * len(views), end // 16)
        if pages is not None and not is_due:
            owners = pages.owners(views)
            is_due = owners is None or 2 * owners.count(-1) > len(owners)  # most paths of the copies are closed
        if not is_due:
            return
        sequence.num_weighed, sequence.pages = end, None  # copies go before others are made: they are not held at once
        if len(sequence.live) * end * self.width >= self.min_work:
            room = self.cache.room_for_copies(sequence.arrival)
            sequence.pages = choose_pages(np.stack([each[:end] for each in views]), room, self.min_page)
        self.cache.count_copies(sequence.arrival, 0 if sequence.pages is None else sequence.pages.num_entries)

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
                **{CACHE: self.cache},
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
            begin = reading.queries.start
            if piece.paged is not None:  # only tails need a mask
                mask[reading.queries, : piece.mask.stop] = piece.paged.is_tail
                continue
            for _, run in itertools.groupby(reading.entries, key=lambda entry: id(entry[1])):
                entries = list(run)
                last, seen = entries[-1][0], entries[-1][1]
                rows = mask[begin : begin + len(entries), : last + 1]
                rows[:] = seen[: last + 1]
                if len(entries) > 1:
                    rows &= np.arange(last + 1) <= np.array([entry for entry, _ in entries])[:, None]
                begin += len(entries)
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
