"""Packed decoding: one forward pass over what all sequences have to read.

The queries of all sequences stand in one row, without padding, so that every linear layer runs once over what there
is. Only attention has to know which queries belong together, and what part of the pool of keys is theirs:
:func:`packed_attention` takes the row apart, lets an attention function of transformers do each piece, and puts the
row together again.
"""

import itertools
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import LogCache
from .cpu import PackedLinear
from .forward_inputs import CACHE
from .hooks import engine_pass, needs_eager
from .masks import SLIDING, layer_kinds
from .state import Reading
from .threads import WIDTHS, best_threads

# The name under which transformers finds packed_attention. A process may hold several copies of this code, which came
# with checkpoints, and each must find its own.
PACKED = f"multiverse_packed_{zlib.crc32(__name__.encode()):08x}"
FOLD_QUERIES = 512  # folded queries; above, as in a prompt, the copies that folding avoids are cheap


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that attend to the same slots.

    Attributes:
        queries: their place in the packed row.
        keys: the slots they may see, a slice of the pool.
        mask: columns of the step's mask that stand for these slots. None if the slots are a plain text so far and the
            queries its end: no mask is needed.
    """

    queries: slice
    keys: slice
    mask: slice | None


@dataclass(frozen=True, slots=True)
class Step:
    """What :func:`packed_attention` has to know about a step.

    Attributes:
        pieces: in the order of their queries, which they cover.
        attend: an attention function as transformers registers them.
        folded: masks in the shape the kernel wants, by piece and mask: made in the first layer, used in all. By the
            mask itself, not its id: each layer on another device has a copy, and a new one may get the id of the last.
    """

    pieces: list[Piece]
    attend: Callable[..., tuple[torch.Tensor, Any]]
    folded: dict[tuple[int, torch.Tensor | None], torch.Tensor] = field(default_factory=dict)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    multiverse_step: "Step | Callable[..., torch.Tensor] | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend piece by piece.

    Args:
        module: the attention layer.
        query: (1, heads, Q, head_dim), the queries of all sequences.
        key, value: (1, kv_heads, slots, head_dim), the pool.
        attention_mask: (1, 1, Q, K) in the queries' dtype, added to the scores: what a query sees of its own piece.
        multiverse_step: where the pieces are; or what attends all at once, given queries, keys, values and scaling.

    Returns:
        (1, Q, heads, head_dim), and no weights.
    """
    if callable(multiverse_step):
        return multiverse_step(query, key, value, kwargs.get("scaling")), None
    if multiverse_step is None:  # not the engine's own pass: a layer that is computed again for its gradient
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    outputs = []
    step = multiverse_step
    for number, piece in enumerate(step.pieces):
        mask = None if piece.mask is None else attention_mask[:, :, piece.queries, piece.mask]
        keys, values = key[:, :, piece.keys], value[:, :, piece.keys]
        kwargs |= {"causal": mask is None, "folded": (step.folded, (number, attention_mask))}
        output, _ = step.attend(module, query[:, :, piece.queries], keys, values, mask, *args, **kwargs)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def attend_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    causal: bool = False,
    folded: tuple[dict[Any, torch.Tensor], Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with torch's kernel; with few queries, without a copy of keys and values for every query head.

    The query heads that share a key head are then folded into the query dimension instead; the result is the same.

    Args:
        query: (1, heads, Q, head_dim).
        key, value: (1, kv_heads, K, head_dim).
        attention_mask: (1, 1, Q, K), zero where a query attends to a key and minus infinity elsewhere.
        causal: the queries are the last Q of K tokens in a row; ``attention_mask`` is None.
        folded: where masks are kept for the layers to come, and under what key.

    Returns:
        (1, Q, heads, head_dim), and no weights.
    """
    _, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    begins = causal and queries == key.shape[2]  # the one causal mask all of torch's kernels agree on
    if causal and not begins and queries > 1:
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril_(key.shape[2] - queries)[None, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if groups * queries > FOLD_QUERIES or groups == 1:
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = sdpa(query, key, value, attention_mask, is_causal=begins and queries > 1, scale=scaling)
        return output.transpose(1, 2), None
    if begins and queries > 1:
        attention_mask = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=query.device).tril_()
    mask = None
    if attention_mask is not None:
        store, name = folded if folded is not None else ({}, None)
        mask = store.get(name)
        if mask is None:
            mask = store[name] = attention_mask.repeat(1, 1, groups, 1)
    query = query.reshape(1, key.shape[1], groups * queries, query.shape[-1])
    output = sdpa(query, key, value, mask, scale=scaling)
    return output.reshape(1, heads, queries, -1).transpose(1, 2), None


def attend_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    causal: bool = False,
    folded: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attend as the model's own file does it: whatever it does besides, such as soft capping, is done here too."""
    if causal:
        queries, keys = query.shape[2], key.shape[2]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu_(keys - queries + 1)
        attention_mask = torch.zeros(1, 1, queries, keys, dtype=query.dtype, device=query.device)
        attention_mask.masked_fill_(hidden, torch.finfo(query.dtype).min)
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
# The engine always brings a mask of its own; the entry only says that the implementation takes the masks of sdpa.
AttentionMaskInterface.register(PACKED, sdpa_mask)


class PackedRunner:
    """Reads log entries with one forward pass over all sequences.

    Args:
        model: a causal LM of transformers whose backbone takes positions, a 4-D mask and a cache.
        cache: the pool of logs.

    Attributes:
        name: of this way of decoding.
        is_eager: the model attends as its own file has it.
    """

    name = "packed"
    attention = PACKED  # the attention implementation of its passes

    def __init__(self, model: Any, cache: LogCache) -> None:
        self.model, self.cache, self.device = model, cache, model.device
        self.kinds = layer_kinds(model.config)
        self.window = model.config.sliding_window if SLIDING in self.kinds else None
        self.is_eager = needs_eager(model)
        self.configs = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
        self.is_spread = len({weight.device for weight in model.parameters()}) > 1
        self.packed_layers: list[PackedLinear] = []  # layers with packed weights
        self.threads: dict[int | None, int | None] = {}  # by the width of a step

    def __call__(self, batch: list[Reading]) -> torch.Tensor:
        """Read log entries into the cache.

        Returns:
            (N, V) logits, a row for each live branch of each sequence that :attr:`~.state.Reading.is_last`.
        """
        num_tokens = batch[-1].queries.stop
        width = next((each for each in WIDTHS if num_tokens <= each), None)
        if width not in self.threads:
            self.threads[width] = best_threads(self.model, width)
        is_static = self.name == "static"
        with engine_pass(self.model, self.configs, self.attention, self.packed_layers, self.threads[width], is_static):
            return self.read(batch)

    def free(self) -> None:
        """Free the cache's memory."""
        self.cache.free()

    def read(self, batch: list[Reading]) -> torch.Tensor:
        """Do what ``__call__`` says, during a pass of the engine.

        The new log entries of all sequences become one row of ids and positions. For each sequence there are the slots
        they are written to, and a piece for attention. Logits are wanted of the last entry of each live branch.
        """
        ids, positions, slots, pieces, rows = [], [], [], [], []
        for reading in batch:
            sequence, first, end = reading.sequence, reading.first, reading.end
            base = self.cache.extents[sequence.arrival].base
            ids += sequence.ids[first:end]
            positions.append(sequence.positions[first:end])
            slots.append((base + first, base + end))
            is_plain = sequence.root.block is None and (self.window is None or end <= self.window)
            pieces.append(Piece(reading.queries, slice(base, base + end), None if is_plain else slice(0, end)))
            rows += [entry + reading.queries.start - first for entry in reading.rows]
        self.cache.prepare(slots, self.device)
        masked = [(each, piece) for each, piece in zip(batch, pieces, strict=True) if piece.mask is not None]
        step = Step(pieces, attend_eager if self.is_eager else attend_sdpa)
        return self.forward(ids, np.concatenate(positions), masked, rows or [0], multiverse_step=step)

    def forward(
        self,
        ids: list[int],
        positions: np.ndarray,
        masked: list[tuple[Reading, Piece]],
        rows: list[int],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the model.

        Args:
            ids: Q token ids.
            positions: (Q,) int64.
            masked: what is read where queries do not see all of the slots.
            rows: places of Q whose logits are wanted.
            **kwargs: for the model.

        Returns:
            (rows, V) logits.
        """
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device)[None],
            position_ids=torch.from_numpy(positions)[None].to(self.device),
            attention_mask=self.mask(masked),
            **{CACHE: self.cache},
            use_cache=True,
            # a tensor would come to the first of several devices, where the last layer is not; a list comes to where
            # it is used
            logits_to_keep=rows if self.is_spread else torch.tensor(rows, device=self.device),
            **kwargs,
        )
        return output.logits[0]

    def mask(self, batch: list[tuple[Reading, Piece]]) -> Any:
        """Return the model's ``attention_mask``: one tensor (1, 1, queries, columns), or one by kind of layer."""
        shape = (max(r.queries.stop for r, _ in batch), max(p.mask.stop for _, p in batch)) if batch else (1, 1)
        mask = np.zeros(shape, dtype=bool)
        for reading, _ in batch:
            begin = reading.queries.start
            for _, run in itertools.groupby(reading.entries, key=lambda entry: id(entry[1])):
                entries = list(run)
                last, seen = entries[-1]
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
            tensor = torch.from_numpy(allowed)[None, None].to(self.device)
            if self.attention != "sdpa":  # added to the scores
                hidden = torch.finfo(self.model.dtype).min
                tensor = torch.zeros_like(tensor, dtype=self.model.dtype).masked_fill_(~tensor, hidden)
            masks[kind] = tensor
        return masks if len(masks) > 1 else masks.popitem()[1]
