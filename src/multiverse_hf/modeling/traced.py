"""The layout as one operator, for ``torch.compile`` and ``torch.export``.

Reading tags is host code that a tracer cannot follow. To the tracer it is an operator with outputs of known shapes.
The operator cannot know beforehand whether a row has a block, so a compiled model always gets positions and a mask.
"""

import functools
import json
import zlib

import torch

from .labels import forced_mask
from .layout import has_block, is_plain
from .masks import dense_mask, pad_layouts
from .tags import TagSet

# Several copies of this code may be in a process, as they come with checkpoints; each needs names of its own.
_NAMESPACE = f"multiverse_{zlib.crc32(__name__.encode()):08x}"


@functools.lru_cache(maxsize=8)
def _read_tags(text: str) -> TagSet:
    return TagSet.from_dict(json.loads(text))


@torch.library.custom_op(f"{_NAMESPACE}::lay_out", mutates_args=())
def lay_out(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, tags: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the hooks need of a batch.

    Args:
        input_ids: (B, L) token ids.
        attention_mask: (B, L), or None.
        position_ids: (B, L) or (1, L), or None.
        tags: a tag set as JSON.

    Returns:
        position_ids (B, L) int64; mask (B, 1, L, L) bool, without a window; forced (B, L) bool; whether there is a
        block, () bool.

    Raises:
        ValueError: if a row has a block and positions are given that do not suit it.
    """
    names = _read_tags(tags)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    found = not is_plain() and any(has_block(row[keep], names) for row, keep in zip(input_ids, real, strict=True))
    column = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    given = column if position_ids is None else position_ids.expand(input_ids.shape)
    is_packed = attention_mask is None and bool((given.diff(dim=1) != 1).any())  # as transformers tells
    forced = torch.zeros_like(input_ids, dtype=torch.bool)
    if found:
        forced = forced_mask(input_ids, names, attention_mask, position_ids)
    if found or is_packed:
        layout = pad_layouts(input_ids, attention_mask, names, position_ids)
    else:
        one = torch.ones(len(input_ids), 1, 1, dtype=torch.bool, device=input_ids.device)
        layout = given.clone(), torch.zeros_like(input_ids), one
    mask = dense_mask(*layout, attention_mask)
    return layout[0].contiguous(), mask, forced, torch.tensor(found, device=input_ids.device)


@lay_out.register_fake
def _(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, tags: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length = input_ids.shape
    return (
        torch.empty_like(input_ids, dtype=torch.long),
        input_ids.new_empty((batch, 1, length, length), dtype=torch.bool),
        torch.empty_like(input_ids, dtype=torch.bool),
        input_ids.new_empty((), dtype=torch.bool),
    )


@torch.library.custom_op(f"{_NAMESPACE}::refuse_blocks", mutates_args=())
def refuse_blocks(input_ids: torch.Tensor, laid_out: torch.Tensor, trigger: int) -> torch.Tensor:
    """Return a copy of ids that go on from a cache.

    Raises:
        ValueError: if the cache holds a laid-out document, or the ids hold the tag that opens paths.
    """
    if not is_plain() and bool(laid_out | (input_ids == trigger).any()):
        raise ValueError(
            "a document with parallel paths cannot go on from past_key_values; call model.generate, or pass the whole "
            "text as input_ids"
        )
    return input_ids.clone()


@refuse_blocks.register_fake
def _(input_ids: torch.Tensor, laid_out: torch.Tensor, trigger: int) -> torch.Tensor:
    return torch.empty_like(input_ids)
