"""Attention over whole documents in chunks of queries, without a mask of L x L.

torch's sdpa takes a mask of all queries and all keys, or skips the upper half where attention is plainly causal. A
document with paths needs the mask, so it pays for both halves, and for siblings that never see each other. Here a row
is read in chunks of queries that stand side by side: each meets the keys that it sees any of, under a mask of its own
size. A chunk within one segment sees a triangle at the end of its keys, and all such chunks share one.

``attn_implementation="multiverse_sdpa"`` chooses it, for training on a CPU above all. Rows without a layout, and
short ones, go to transformers' own sdpa.

Shapes: B rows, L tokens a row, S segments, C queries of a chunk, K keys of a chunk.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CHUNKED = "multiverse_sdpa"
QUERIES = 256  # the most in a chunk: more of them waste arithmetic on keys of the future, fewer make matrices small
WHOLE = 128  # tokens; shorter segments share a chunk


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries that are read at once.

    Attributes:
        row: of the batch.
        queries: their place in the row.
        keys: the parts of the row that they see any of.
        mask: (C, K) bool, what each sees; None if all of them see all keys before their first, and then a triangle.
    """

    row: int
    queries: slice
    keys: list[slice]
    mask: torch.Tensor | None

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return sum(part.stop - part.start for part in self.keys)


@dataclass(frozen=True, slots=True)
class ChunkedMask:
    """The chunks of a batch, in the order of their queries; what they leave out is padding.

    Attributes:
        shape: (B, L).
        chunks: of all rows.
        added: the masks in the form that is added to scores, by dtype: made in the first layer, used in all.
    """

    shape: tuple[int, int]
    chunks: list[Chunk]
    added: dict[torch.dtype, list[torch.Tensor]] = field(default_factory=dict)

    def masks(self, query: torch.Tensor) -> list[torch.Tensor]:
        """Return the mask of each chunk, (1, 1, C, K) in the dtype of the queries and on their device."""
        if query.dtype not in self.added:
            least = torch.zeros((), dtype=query.dtype, device=query.device)
            whole = [chunk for chunk in self.chunks if chunk.mask is None]
            width = max((chunk.num_keys for chunk in whole), default=0)
            height = max((chunk.num_queries for chunk in whole), default=0)
            triangle = torch.full((height, width), -torch.inf, dtype=query.dtype, device=query.device)
            triangle = triangle.triu_(width - height + 1)  # zero where a query sees a key
            made = []
            for chunk in self.chunks:
                if chunk.mask is None:
                    mask = triangle[height - chunk.num_queries :, width - chunk.num_keys :]
                    if query.device.type != "cpu":  # other kernels want masks that begin at round addresses
                        mask = mask.contiguous()
                else:
                    mask = torch.where(chunk.mask.to(query.device), least, -torch.inf)
                made.append(mask[None, None])
            self.added[query.dtype] = made
        return self.added[query.dtype]


def is_worthwhile(length: int) -> bool:
    """Return whether rows of so many tokens are read faster in chunks than all at once under one mask."""
    return length > QUERIES


def chunk_rows(
    position_ids: torch.Tensor,
    segment_ids: torch.Tensor,
    visible: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
) -> ChunkedMask:
    """Cut rows into chunks; takes what :func:`~.attention.dense_mask` takes, and means the same at real tokens."""
    real = torch.ones_like(segment_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    chunks: list[Chunk] = []
    rows = zip(position_ids.cpu(), segment_ids.cpu(), visible.cpu(), real.cpu(), strict=True)
    for row, (positions, segments, sees, keep) in enumerate(rows):
        for begin, end, is_whole in _spans(segments, keep):
            own = segments[begin:end]
            seen = sees[own[0]] if is_whole else sees[own.unique()].any(0)
            near = seen[segments[:end]] & keep[:end]
            if window is not None:
                near &= positions[:end] > positions[begin:end].min() - window
            mask = None
            if window is not None or not is_whole:
                at = near.nonzero().flatten()
                mask = sees[own][:, segments[at]] & (at <= torch.arange(begin, end)[:, None])
                if window is not None:
                    mask &= positions[begin:end, None] - positions[at] < window
            chunks.append(Chunk(row, slice(begin, end), _runs(near), mask))
    return ChunkedMask(tuple(segment_ids.shape), chunks)


def _runs(where: torch.Tensor) -> list[slice]:
    """Return the runs of True in a (N,) bool tensor."""
    edges = torch.nn.functional.pad(where.to(torch.int8), (1, 1)).diff().nonzero().flatten().tolist()
    return [slice(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _spans(segments: torch.Tensor, real: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Cut a row's real tokens into spans of queries; of each say whether it lies in one segment.

    Long segments are cut into equal parts, so that their masks are the one triangle; short ones that follow each other
    are joined, as a kernel takes longer to start than to read them.
    """
    spans: list[tuple[int, int, bool]] = []
    changes = (segments.diff() != 0) | real.diff()
    edges = [0, *(changes.nonzero().flatten() + 1).tolist(), len(segments)]
    can_join = False
    for begin, end in pairwise(edges):
        length = end - begin
        if length == 0 or not real[begin]:
            can_join = False
        elif length < WHOLE and can_join and end - spans[-1][0] <= QUERIES:
            spans[-1] = (spans[-1][0], end, False)
        else:
            parts = -(-length // QUERIES)
            cuts = [begin + length * part // parts for part in range(parts + 1)]
            spans += [(*cut, True) for cut in pairwise(cuts)]
            can_join = length < WHOLE
    return spans


def carry(mask: ChunkedMask, device: torch.device) -> torch.Tensor:
    """Return a mask the form in which a model of transformers hands it on unread: a tensor of four dimensions.

    It has no elements, so that nothing else than :func:`chunked_attention` can take it for a mask.
    """
    tensor = torch.empty(mask.shape[0], 1, 0, 0, dtype=torch.bool, device=device)
    tensor.multiverse_chunks = mask
    return tensor


def chunked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend chunk by chunk where the mask is one of :func:`carry`, else as transformers' own sdpa.

    Args:
        module: the attention layer.
        query: (B, heads, L, head_dim).
        key, value: (B, kv_heads, L, head_dim).
        attention_mask: of chunks, or what sdpa takes.

    Returns:
        (B, L, heads, head_dim), zero at padding, and no weights.

    Raises:
        ValueError: if the layer asks for something that sdpa cannot do, or the keys are not those of the documents.
    """
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={CHUNKED!r} does not support {name}; use 'eager'")
    mask: ChunkedMask | None = getattr(attention_mask, "multiverse_chunks", None)
    if mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, length = mask.shape
    if key.shape[2] != length or query.shape[2] != length:
        raise ValueError(
            f"a layout of {length} tokens cannot mask {query.shape[2]} queries and {key.shape[2]} keys; give the "
            "whole document in one pass, without a cache that holds tokens"
        )
    # torch's kernel for a CPU reads the keys of a group of heads in place; others refuse to, where there is a mask
    has_groups = key.shape[1] != query.shape[1]
    if has_groups and query.device.type != "cpu":
        groups = query.shape[1] // key.shape[1]
        key, value, has_groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    ends = [0] * batch
    for chunk, added in zip(mask.chunks, mask.masks(query), strict=True):
        own = slice(chunk.row, chunk.row + 1)
        keys, values = (torch.cat([s[own, :, part] for part in chunk.keys], dim=2) for s in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query[own, :, chunk.queries], keys, values, added, dropout, scale=scaling, enable_gqa=has_groups
        )
        if gap := chunk.queries.start - ends[chunk.row]:
            rows[chunk.row].append(_nothing(output, gap))
        rows[chunk.row].append(output.transpose(1, 2))
        ends[chunk.row] = chunk.queries.stop
    for row, end in zip(rows, ends, strict=True):
        if end < length:
            row.append(_nothing(query, length - end))
    outputs = [torch.cat(row, dim=1) for row in rows]
    return (outputs[0] if batch == 1 else torch.cat(outputs)), None


def _nothing(like: torch.Tensor, length: int) -> torch.Tensor:
    """Return what padding reads: (1, length, heads, head_dim) of zeros."""
    return like.new_zeros(1, length, like.shape[1], like.shape[3])


AttentionInterface.register(CHUNKED, chunked_attention)
# Rows without a layout: transformers makes the mask of sdpa, or none where a row is plainly causal.
AttentionMaskInterface.register(CHUNKED, sdpa_mask)
