"""What a call of ``forward`` brings that the layout depends on: rows to lay out, or an error for what cannot be.

A row with a fork is never let through as causal text.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_chunked import CHUNKED
from .layout import build_layout, has_block, is_plain
from .tags import TagSet

# What models call the cache among their arguments: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_PACKING = ("cu_seq_lens_q", "seq_idx")  # tell documents apart to kernels that this version of sdpa is not
_ROUNDING = 0.01  # of a vector's length: an adapter's share of it, rounded to bf16, depends on the shape of the batch
MARK = "_multiverse_laid_out"  # attribute of a cache that was filled with laid-out rows


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, the cache by the name that this version of transformers has for it."""
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if CACHE != "past_key_values" and "past_key_values" in kwargs:
        kwargs.setdefault(CACHE, kwargs.pop("past_key_values"))
    return kwargs


@dataclass(frozen=True, slots=True)
class Rows:
    """What a call brings that the layout depends on.

    Attributes:
        ids: (B, L) int64 token ids. Rows that came as embeddings have the ids of tags and of forced text, else 0.
        attention_mask: (B, L), or None.
        position_ids: (B, L) or (1, L), or None.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


def brings_mask(kwargs: dict[str, Any]) -> bool:
    """Return whether a call brings a mask of its own: not one of padding, (B, L)."""
    mask = kwargs.get("attention_mask")
    return mask is not None and getattr(mask, "ndim", None) != 2


def read_rows(module: Any, kwargs: dict[str, Any], tags: TagSet) -> Rows | None:
    """Return the rows of a call if the layout has to be applied to them, None if they go through untouched.

    Args:
        module: the backbone or the causal LM.
        kwargs: of its forward.
        tags: the control tags.

    Raises:
        ValueError: if a row with a block comes with a mask, packing or cache that the layout cannot follow, or a cache
            with laid-out rows is continued.
    """
    mask, cache, positions = kwargs.get("attention_mask"), kwargs.get(CACHE), kwargs.get("position_ids")
    if getattr(cache, "is_log", False) or kwargs.get("segment_ids") is not None:  # the engine, or a layout as given
        return None
    if is_plain():  # last, as a tracer cannot read a context variable
        return None
    if getattr(cache, MARK, False):
        raise ValueError(
            "this cache holds a document with parallel paths, which only the engine can go on from; call "
            "model.generate, or pass the whole text without past_key_values"
        )
    ids = kwargs.get("input_ids")
    if ids is None:
        embeds = kwargs.get("inputs_embeds")
        ids = None if embeds is None else recover_ids(module, embeds, tags)
    if ids is None or not bool((ids == tags.trigger).any()):
        return None
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"{tags.names.trigger} comes after past_key_values, whose text the layout cannot see; pass the "
            "whole text as input_ids, or call model.generate. Prefix tuning brings such a cache: use LoRA or prompt "
            "tuning"
        )
    own_mask = brings_mask(kwargs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or own_mask else mask != 0
    if not any(has_block(row[keep], tags) for row, keep in zip(ids, real, strict=True)):
        return None
    if own_mask:
        _check_own_layout(ids, positions, tags)
        return None
    _check_packing(kwargs)
    check_cache(cache)
    return Rows(ids, mask, positions)


def _check_own_layout(ids: torch.Tensor, positions: torch.Tensor | None, tags: TagSet) -> None:
    """Check that a caller who brings a mask has laid the rows out: that the positions are those of the layout.

    Raises:
        ValueError: if they are not, since the mask is then one of causal text.
    """
    if positions is not None and positions.shape[-1] == ids.shape[1]:
        own = torch.stack([build_layout(row, tags).position_ids for row in ids])
        if torch.equal(positions.cpu().expand_as(own), own):
            return
    raise ValueError(
        "a row holds a parallel block, and the call brings a mask of its own without the layout's position_ids; pass "
        "attention_mask of shape (batch, length), with position_ids that restart at 0 for packed documents. To read "
        "tags as text, call the model inside multiverse_hf.modeling.layout.plain_layout()"
    )


def _check_packing(kwargs: dict[str, Any]) -> None:
    """Raise where documents are told apart by anything but positions: the base class would see one document."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None:
        return
    numbers = mask is not None and bool(((mask != 0) & (mask != 1)).any())
    found = [name for name in _PACKING if kwargs.get(name) is not None] + ["attention_mask"] * numbers
    if found:
        raise ValueError(
            f"a row holds a parallel block, and {found[0]} parts it into documents; pass position_ids that restart at "
            "0 where a document begins, and an attention_mask of 0 and 1 or none"
        )


def check_cache(cache: Any) -> None:
    """Raise for a cache of fixed size, which no mask of whole documents fits."""
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"{type(cache).__name__} has a fixed size, and a row holds a parallel block; pass a DynamicCache, or none"
        )


def recover_ids(module: Any, embeds: torch.Tensor, tags: TagSet) -> torch.Tensor | None:
    """Return the ids that a layout needs from rows that came as embeddings, None if nothing opens paths in them.

    Args:
        module: has ``get_input_embeddings``.
        embeds: (B, L, H), made by that module; others, such as a tuned prompt, may stand beside them.
        tags: the control tags.

    Returns:
        (B, L) int64; 0 where the token is none that the layout or a forced text needs.

    Raises:
        ValueError: if a vector is almost that of the tag that opens paths, as noise makes it.
    """
    table = module.get_input_embeddings()
    trigger = tags.trigger
    texts = [*tags.newline, *tags.colon, *(token for ids in tags.digits.values() for token in ids)]
    tokens = list(dict.fromkeys([trigger, *tags.control_ids, *texts, *tags.label_pieces]))

    with torch.no_grad():
        vectors = table(torch.tensor(tokens, device=embeds.device))
        distances = _distances(embeds, vectors)
        distance, nearest = distances.min(-1)
        size = vectors.norm(dim=-1)
        found = distance <= size[nearest] * _ROUNDING
        near = embeds[~found & (distances[..., 0] < size[0] / 2)]
        for begin in range(0, module.config.vocab_size if len(near) else 0, 4096):  # other tokens may be near as well
            others = torch.arange(begin, min(begin + 4096, module.config.vocab_size), device=embeds.device)
            near = near[_distances(near[None], table(others))[0].amin(-1) > size[0] * _ROUNDING]
            if not len(near):
                break
        if len(near):
            raise ValueError(
                f"inputs_embeds hold a vector that is almost the one of {tags.names.trigger}: noise was added, "
                "or the table has changed; pass input_ids, and let the model embed them"
            )
        if not bool((found & (nearest == 0)).any()):
            return None
        other = next(token for token in range(len(tokens) + 1) if token not in tokens)
        ids = torch.where(found, torch.tensor(tokens, device=embeds.device)[nearest], other)
    return ids


def _distances(embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return (B, L, N) the distances of embeddings (B, L, H) to vectors (N, H), in float32 at least."""
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    vectors = vectors.to(dtype).expand(len(embeds), -1, -1)
    return torch.cdist(embeds.to(dtype), vectors, compute_mode="donot_use_mm_for_euclid_dist")


def is_traced(module: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a tracer reads this call and the operators of :mod:`~.traced` can serve it."""
    if not torch.compiler.is_compiling():
        return False
    has_own = kwargs.get("segment_ids") is not None or brings_mask(kwargs)
    has_kernel = module.config._attn_implementation in ("sdpa", "eager", CHUNKED)
    return has_kernel and not has_own and kwargs.get("input_ids") is not None


def refuses_traced(kwargs: dict[str, Any]) -> bool:
    """Return whether a tracer reads ids beside a mask of the caller's own: they may hold no block then."""
    is_others = not getattr(kwargs.get(CACHE), "is_log", False) and kwargs.get("segment_ids") is None
    return torch.compiler.is_compiling() and is_others and brings_mask(kwargs) and kwargs.get("input_ids") is not None
