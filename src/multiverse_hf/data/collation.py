"""Batches of rows with their layout, so that the model does not compute it again on the device."""

from dataclasses import dataclass
from typing import Any

import torch

from multiverse_hf.data.rows import IGNORE
from multiverse_hf.modeling.layout import Layout, build_layout
from multiverse_hf.modeling.tags import TagSet


@dataclass
class DocumentCollator:
    """Pad rows on the right and lay each one out.

    Args:
        tags: the control tags.
        pad_token_id: what padding is made of.

    Calling it with B rows of :func:`~multiverse_hf.data.rows.encode_row` gives ``input_ids``, ``labels``,
    ``attention_mask``, ``position_ids`` and ``segment_ids`` (B, L) int64, and ``visible`` (B, S, S) bool; the last two
    only if a row has a block. A row marked ``plain`` is one segment: ordinary causal text, whatever tags it holds.
    """

    tags: TagSet
    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        layouts = [self._layout(row) for row in rows]
        if all(len(layout.visible) == 1 for layout in layouts):
            return self._plain_batch(rows)
        length = max(len(row["input_ids"]) for row in rows)
        size = max(len(layout.visible) for layout in layouts)
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "segment_ids": torch.zeros(shape, dtype=torch.long),
            "visible": torch.zeros(len(rows), size, size, dtype=torch.bool),
        }
        for index, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
            end = len(row["input_ids"])
            batch["input_ids"][index, :end] = torch.tensor(row["input_ids"])
            batch["labels"][index, :end] = torch.tensor(row["labels"])
            batch["attention_mask"][index, :end] = 1
            batch["position_ids"][index, :end] = layout.position_ids
            batch["segment_ids"][index, :end] = layout.segment_ids
            batch["visible"][index, : len(layout.visible), : len(layout.visible)] = layout.visible
        return batch

    def _plain_batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows without a block.

        No real token sees padding on its right, so no mask is needed: it is all ones, and transformers then takes the
        causal kernel, at half the price.
        """
        length = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [self.pad_token_id] * (length - len(row["input_ids"])) for row in rows]
        labels = [row["labels"] + [IGNORE] * (length - len(row["labels"])) for row in rows]
        input_ids = torch.tensor(ids)
        # positions are given, so that tags in a plain row are not laid out
        position_ids = torch.arange(length).expand(len(rows), length).contiguous()
        return {
            "input_ids": input_ids,
            "labels": torch.tensor(labels),
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": position_ids,
        }

    def _layout(self, row: dict[str, Any]) -> Layout:
        if row.get("plain"):
            length = len(row["input_ids"])
            one = torch.ones(1, 1, dtype=torch.bool)
            return Layout(torch.arange(length), torch.zeros(length, dtype=torch.long), one)
        return build_layout(row["input_ids"], self.tags)
