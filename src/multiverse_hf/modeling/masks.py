"""Attention masks from a layout, in the form each attention implementation of transformers takes.

Shapes: B rows, L tokens a row, S segments, Q query tokens, K key tokens.
"""

from typing import Any

import torch

from .attention_chunked import CHUNKED, carry, chunk_rows, is_worthwhile
from .layout import Layout, build_layout
from .tags import TagSet

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(config: Any) -> set[str]:
    """Return the kinds of attention layer a model has, as :data:`FULL` and :data:`SLIDING`.

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
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tags: TagSet,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out every row of a batch.

    Args:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), nonzero at real tokens, or None if all are real.
        tags: the control tags.
        position_ids: (B, L) or (1, L) positions of a caller. Where they restart at 0, a new document begins: it is
            laid out by itself, and sees nothing of the others. None for one document a row.

    Returns:
        position_ids (B, L) int64 (0 at padding), segment_ids (B, L) int64 (0 at padding), visible (B, S, S) bool; on
        the device of ``input_ids``.

    Raises:
        ValueError: if positions are given that neither count up from 0 nor restart there.
    """
    layouts = lay_out_rows(input_ids, attention_mask, tags, position_ids)
    positions = torch.zeros(input_ids.shape, dtype=torch.long)
    segments = torch.zeros_like(positions)
    size = max(1, *(sum(len(layout.visible) for _, layout in parts) for parts in layouts))
    visible = torch.zeros(len(layouts), size, size, dtype=torch.bool)
    for row, parts in enumerate(layouts):
        begin = 0
        for columns, layout in parts:
            end = begin + len(layout.visible)
            positions[row, columns] = layout.position_ids
            segments[row, columns] = layout.segment_ids + begin
            visible[row, begin:end, begin:end] = layout.visible
            begin = end
    device = input_ids.device
    return positions.to(device), segments.to(device), visible.to(device)


def lay_out_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tags: TagSet,
    position_ids: torch.Tensor | None = None,
) -> list[list[tuple[torch.Tensor, Layout]]]:
    """Return for each row the columns and the layout of each document in it. Arguments as for :func:`pad_layouts`."""
    ids = input_ids.cpu()
    rows = zip(ids, split_rows(ids, attention_mask, position_ids), strict=True)
    return [[(columns, build_layout(row[columns], tags)) for columns in parts] for row, parts in rows]


def split_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[list[torch.Tensor]]:
    """Return the columns of each document in each row: one document a row, or several where positions restart.

    Args:
        input_ids, attention_mask, position_ids: as for :func:`pad_layouts`.

    Returns:
        For each row the documents in it, each as its columns, int64, on the CPU. Padding is in none.

    Raises:
        ValueError: if positions are given that neither count up from 0 nor restart there.
    """
    batch, length = input_ids.shape
    real = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    columns = [row.nonzero().flatten() for row in real]
    if position_ids is None:
        return [[row] for row in columns]
    if position_ids.ndim != 2 or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} cannot be laid out with input_ids "
            f"{(batch, length)}; leave them out"
        )
    given = position_ids.cpu().expand(batch, length)
    rows = []
    for row, (keep, positions) in enumerate(zip(columns, given, strict=True)):
        own = positions[keep]
        steps = own.diff()
        restarts = (own[1:] == 0).nonzero().flatten() + 1
        starts_well = not len(own) or own[0] == 0 or own[0] == keep[0]  # counted from the row's begin, padding too
        if not starts_well or bool(((steps != 1) & (own[1:] != 0)).any()):
            raise ValueError(
                f"row {row} holds a parallel block, and its position_ids {_shorten(own)} neither count up from 0 nor "
                "restart there for packed documents; leave position_ids out, and the model lays the row out itself"
            )
        rows.append(list(keep.tensor_split(restarts)))
    return rows


def _shorten(values: torch.Tensor) -> str:
    """Return the first values as text for an error."""
    shown = values[:12].tolist()
    return f"[{', '.join(map(str, shown))}{', ...' if len(values) > 12 else ''}]"


def dense_mask(
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    visible: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Return the mask of whole documents, (B, 1, L, L) bool, True where the row's token attends to the column's.

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
    """Return the same mask as :func:`dense_mask` as a flex_attention BlockMask, on the device of ``segment_ids``.

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
        """Return the least and greatest value at the real tokens of each tile, (B, tiles), and how many they are."""
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
        """Return for each tile of queries how many tiles of keys it meets, and which, those first."""
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
    """Return the ``attention_mask`` argument that makes a backbone follow a layout.

    Returns:
        A bool (sdpa) or float (eager) tensor (B, 1, L, L), a BlockMask (flex_attention), or chunks in the shape of a
        tensor (multiverse_sdpa, see :mod:`~.attention_chunked`). Where a model has both full and sliding layers, a
        dict of them by kind.

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
