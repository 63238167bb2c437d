"""Attention masks from a layout, in the form each attention implementation of transformers takes.

Shapes: B rows, L tokens a row, S segments, Q query tokens, K key tokens.
"""

from typing import Any

import torch

from .chunked import CHUNKED, carry, chunk_rows, is_worthwhile
from .layout import build_layout
from .tags import TagSet

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(config: Any) -> set[str]:
    """Give the kinds of attention layer a model has, as :data:`FULL` and :data:`SLIDING`.

    Raises:
        ValueError: if a layer is of another kind: its state cannot hold paths side by side and merge them.
    """
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        kinds = {SLIDING if getattr(config, "sliding_window", None) else FULL}
    if kinds - {FULL, SLIDING}:
        raise ValueError(
            f"{config.model_type} has {', '.join(sorted(kinds - {FULL, SLIDING}))} layers; Multiverse merges paths in "
            "softmax attention only, so choose a model whose layers are all full or sliding-window attention"
        )
    return kinds


def pad_layouts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, tags: TagSet
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out every row of a batch.

    Args:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), nonzero at real tokens, or None if all are real.
        tags: the control tags.

    Returns:
        position_ids (B, L) int64 (0 at padding), segment_ids (B, L) int64 (0 at padding), visible (B, S, S) bool; on
        the device of ``input_ids``.
    """
    ids = input_ids.cpu()
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    layouts = [build_layout(row[keep], tags) for row, keep in zip(ids, real, strict=True)]
    position_ids, segment_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    size = max(len(layout.visible) for layout in layouts)
    visible = torch.zeros(len(ids), size, size, dtype=torch.bool)
    for row, (layout, keep) in enumerate(zip(layouts, real, strict=True)):
        position_ids[row, keep] = layout.position_ids
        segment_ids[row, keep] = layout.segment_ids
        visible[row, : len(layout.visible), : len(layout.visible)] = layout.visible
    device = input_ids.device
    return position_ids.to(device), segment_ids.to(device), visible.to(device)


def dense_mask(
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    visible: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Give the mask of whole documents, (B, 1, L, L) bool, True where the row's token attends to the column's.

    A padding token attends to itself, so that no row is empty. ``window`` counts positions, not tokens.
    """
    batch = torch.arange(len(segment_ids), device=segment_ids.device)[:, None, None]
    mask = visible[batch, segment_ids[:, :, None], segment_ids[:, None, :]]
    mask = mask.tril()
    if window is not None:
        mask = mask & (position_ids[:, :, None] - position_ids[:, None, :] < window)
    if attention_mask is not None:
        mask = mask & (attention_mask[:, None, :] != 0)
    mask = mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask[:, None]


# A BlockMask holds four tables of (L / size)^2 int32, for each tile which other tiles it meets. Tiles of 128, torch's
# own size, up to this many a side; then larger ones, so that the tables stay below 1 MiB however long a row is.
_TILE, _MOST_TILES = 128, 256

# Training that evaluates compiles a kernel of flex_attention for each kind of layer, with gradients and without, for
# one row and for several, for rows with paths and without, ...: 14 for a model with sliding layers. torch stops at 8,
# and from then on computes all scores of L x L.
_MOST_KERNELS = 64


def block_mask(
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    visible: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
) -> Any:
    """Give the same mask as :func:`dense_mask` as a flex_attention BlockMask, on the device of ``segment_ids``.

    Which tiles are empty, full or partial follows from the segments that begin and end in them: no L x L tensor is
    made, as torch's ``create_block_mask`` makes unless it is compiled. Memory O(L + S^2).
    """
    from torch.nn.attention.flex_attention import BlockMask

    if getattr(torch._dynamo.config, "recompile_limit", _MOST_KERNELS) < _MOST_KERNELS:  # older torch: another name
        torch._dynamo.config.recompile_limit = _MOST_KERNELS
    batch, length = segment_ids.shape
    real = torch.ones_like(segment_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (q >= k) & visible[b, segment_ids[b, q], segment_ids[b, k]] & real[b, k]
        if window is not None:
            seen = seen & (position_ids[b, q] - position_ids[b, k] < window)
        return seen | (q == k)

    size = _TILE
    while size * _MOST_TILES < length:
        size *= 2
    tiles = -(-length // size)

    def ends(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give the least and greatest value at the real tokens of each tile, (B, tiles), and how many they are."""
        pad = (0, tiles * size - length)
        values = torch.nn.functional.pad(values, pad).view(batch, tiles, size)
        here = torch.nn.functional.pad(real, pad).view(batch, tiles, size)
        least = values.masked_fill(~here, torch.iinfo(values.dtype).max).amin(-1)
        return least, values.masked_fill(~here, -1).amax(-1), here.sum(-1)

    first, last, count = ends(segment_ids)
    first = first.clamp(max=visible.shape[-1] - 1)  # of a tile without a real token, where it does not matter
    # sums[b, i, j]: how many pairs of segments below (i, j) see each other; a rectangle of them is then four look-ups
    sums = torch.nn.functional.pad(visible.int().cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows = torch.arange(batch, device=segment_ids.device)[:, None, None]

    def below(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return sums[rows, queries[:, :, None], keys[:, None, :]]

    high, low = last + 1, first
    seen = below(high, high) - below(low, high) - below(high, low) + below(low, low)
    has_any = (seen > 0) & (count[:, :, None] > 0) & (count[:, None, :] > 0)
    is_full = (seen == (high - low)[:, :, None] * (high - low)[:, None, :]) & (count[:, :, None] == size)
    is_full &= count[:, None, :] == size
    if window is not None:
        nearest, farthest, _ = ends(position_ids)
        has_any &= nearest[:, :, None] - farthest[:, None, :] < window
        is_full &= farthest[:, :, None] - nearest[:, None, :] < window
    here = torch.arange(tiles, device=segment_ids.device)
    is_full &= here[:, None] > here[None, :]
    has_any = (has_any & (here[:, None] > here[None, :])) | (here[:, None] == here[None, :])  # each meets itself

    def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give for each tile of queries how many tiles of keys it meets, and which, those first."""
        order = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *listed(has_any & ~is_full),
        *listed(is_full),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def to_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a bool mask into the float one that eager attention adds to its scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def document_masks(
    config: Any,
    dtype: torch.dtype,
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    visible: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> Any:
    """Give the ``attention_mask`` argument that makes a backbone follow a layout.

    Returns:
        A bool (sdpa) or float (eager) tensor (B, 1, L, L), a BlockMask (flex_attention), chunks in the shape of a
        tensor (multiverse_sdpa, see :mod:`~.chunked`), or, where a model has both full and sliding layers, a dict of
        them by kind.

    Raises:
        ValueError: if the model's attention implementation cannot follow a layout.
    """
    implementation = config._attn_implementation
    if "flash" in implementation:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot mask sibling paths; load the model with "
            "attn_implementation='sdpa' or 'flex_attention', or give it documents without parallel blocks"
        )
    masks = {}
    for kind in layer_kinds(config):
        window = config.sliding_window if kind == SLIDING else None
        if implementation == "flex_attention":
            masks[kind] = block_mask(position_ids, segment_ids, visible, attention_mask, window)
        elif implementation == CHUNKED and is_worthwhile(segment_ids.shape[1]):
            chunks = chunk_rows(position_ids, segment_ids, visible, attention_mask, window)
            masks[kind] = carry(chunks, segment_ids.device)
        else:
            mask = dense_mask(position_ids, segment_ids, visible, attention_mask, window)
            masks[kind] = to_additive(mask, dtype) if implementation == "eager" else mask
    return masks if len(masks) > 1 else masks.popitem()[1]


class LayoutHook:
    """Forward pre-hook of a backbone: given ids alone, it lays them out.

    Sits on the backbone, not on the causal LM, because trainers call the backbone directly for their fused loss.
    Rows without a closed goal go through untouched: exactly the base model, with any attention kernel.
    """

    def __init__(self, tags: TagSet) -> None:
        self.tags = tags
        self._goal_end = tags.close("goal")

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        segment_ids, visible = kwargs.pop("segment_ids", None), kwargs.pop("visible", None)
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            return (), kwargs  # the caller brought its own mask
        if segment_ids is None:
            cache = kwargs.get("past_key_values")
            goes_on = cache is not None and cache.get_seq_length() > 0
            if input_ids is None or kwargs.get("position_ids") is not None or goes_on:
                return (), kwargs
            if not bool((input_ids == self._goal_end).any()):
                return (), kwargs
            kwargs["position_ids"], segment_ids, visible = pad_layouts(input_ids, mask, self.tags)
        if visible is None or kwargs.get("position_ids") is None:
            raise ValueError("a layout is position_ids, segment_ids and visible together; pass all three or none")
        dtype = next(module.parameters()).dtype
        kwargs["attention_mask"] = document_masks(
            module.config, dtype, kwargs["position_ids"], segment_ids, visible, mask
        )
        return (), kwargs
