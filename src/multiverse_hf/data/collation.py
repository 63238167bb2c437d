"""Batches of rows with their layout, so that the model does not compute it again on the device.

A row may hold several documents. Each document keeps its own positions and sees no other document. One mask, the
layout's ``visible``, separates both documents and sibling paths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from multiverse_hf.data.rows import IGNORE
from multiverse_hf.modeling.layout import Layout, build_layout
from multiverse_hf.modeling.tags import TagSet

EncodedRow = dict[str, Any]


@dataclass
class DocumentCollator:
    """Lay rows out and pad them on the right.

    Args:
        tags: the control tags.
        pad_token_id: id of the padding token.
        multiple: pad to a multiple of this many tokens, and ``visible`` to a power of two of segments. Kernels
            compiled for a shape then meet few shapes.
        flatten: concatenate rows without a block, without padding. transformers' flash attention then separates
            documents by ``cu_seq_lens_q`` and its like. Rows with a block are refused.

    A call takes B rows of :class:`~multiverse_hf.data.rows.RowEncoder`, or B lists of rows to pack. It returns
    ``input_ids``, ``labels``, ``attention_mask`` and ``position_ids`` (B, L) int64. If a mask is needed, it also
    returns ``segment_ids`` (B, L) int64 and ``visible`` (B, S, S) bool; if the rows have kinds, ``kinds`` (B, L) int8.
    A row marked ``plain`` is one segment of causal text, whatever tags it holds.
    """

    tags: TagSet
    pad_token_id: int
    multiple: int = 1
    flatten: bool = False

    def __call__(self, rows: Sequence[EncodedRow | Sequence[EncodedRow]]) -> dict[str, torch.Tensor]:
        packs = [[row] if isinstance(row, dict) else list(row) for row in rows]
        layouts = [[row_layout(row, self.tags) for row in pack] for pack in packs]
        has_blocks = any(len(layout.visible) > 1 for pack in layouts for layout in pack)
        if self.flatten:
            if has_blocks:
                raise ValueError("flash attention cannot mask sibling paths; use sdpa or flex_attention")
            return self._flat_batch([row for pack in packs for row in pack])
        batch = self._padded(packs)
        if not has_blocks and all(len(pack) == 1 for pack in packs):
            # Tokens do not see padding on their right, so the mask is all ones. transformers then takes the causal
            # kernel, at half the cost. A layout of one segment marks tags in a plain row as text.
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(len(packs), 1)
            return batch | self._one_segment(packs, batch["input_ids"])
        size = max(sum(len(layout.visible) for layout in pack) for pack in layouts)
        if self.multiple > 1:
            size = 1 << (size - 1).bit_length()
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        batch["segment_ids"] = torch.zeros_like(batch["input_ids"])
        batch["visible"] = torch.zeros(len(packs), size, size, dtype=torch.bool)
        for row, pack in enumerate(layouts):
            begin, segment = 0, 0
            for layout in pack:
                end, last = begin + len(layout.position_ids), segment + len(layout.visible)
                batch["position_ids"][row, begin:end] = layout.position_ids
                batch["segment_ids"][row, begin:end] = layout.segment_ids + segment
                batch["visible"][row, segment:last, segment:last] = layout.visible
                begin, segment = end, last
        return batch

    def _one_segment(self, packs: list[list[EncodedRow]], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a layout of one segment if the model would find a block in plain text, else nothing."""
        trigger = self.tags.trigger
        if not any(row.get("plain") and trigger in row["input_ids"] for pack in packs for row in pack):
            return {}
        return {
            "segment_ids": torch.zeros_like(ids),
            "visible": torch.ones(len(ids), 1, 1, dtype=torch.bool),
        }

    def _padded(self, packs: list[list[EncodedRow]]) -> dict[str, torch.Tensor]:
        """Join the rows of each pack and pad them."""
        joined = [_joined(pack) for pack in packs]
        length = max(len(row["input_ids"]) for row in joined)
        length = -(-length // self.multiple) * self.multiple
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "kinds": 0}
        batch = {
            name: torch.tensor(
                [row[name] + [fill[name]] * (length - len(row[name])) for row in joined],
                dtype=torch.int8 if name == "kinds" else torch.long,
            )
            for name in joined[0]
        }
        ends = torch.tensor([len(row["input_ids"]) for row in joined])
        batch["attention_mask"] = (torch.arange(length) < ends[:, None]).long()
        return batch

    def _flat_batch(self, rows: list[EncodedRow]) -> dict[str, Any]:
        """Concatenate rows, for kernels that take the offsets of documents."""
        joined = _joined(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        batch = {name: torch.tensor([values]) for name, values in joined.items()}
        if "kinds" in batch:
            batch["kinds"] = batch["kinds"].to(torch.int8)
        return (
            batch
            | self._one_segment([rows], batch["input_ids"])
            | {
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
                "cu_seq_lens_q": begins,
                "cu_seq_lens_k": begins,
                "max_length_q": max(lengths),
                "max_length_k": max(lengths),
            }
        )


def row_layout(row: EncodedRow, tags: TagSet) -> Layout:
    """Return the layout of a row; a row marked ``plain`` is a single segment."""
    if row.get("plain"):
        length = len(row["input_ids"])
        one = torch.ones(1, 1, dtype=torch.bool)
        return Layout(torch.arange(length), torch.zeros(length, dtype=torch.long), one)
    return build_layout(row["input_ids"], tags)


def _joined(rows: Sequence[EncodedRow]) -> dict[str, list[int]]:
    """Concatenate rows. The first token of each has no predecessor, so it has no label."""
    names = [name for name in ("input_ids", "labels", "kinds") if name in rows[0]]
    joined: dict[str, list[int]] = {name: [] for name in names}
    for row in rows:
        for name in names:
            values = list(row[name])
            joined[name] += [IGNORE, *values[1:]] if name == "labels" else values
    return joined
