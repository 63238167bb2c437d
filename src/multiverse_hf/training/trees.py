"""Rows that begin alike as one row, in which the tokens that they share stand once.

A layout is a graph of segments, so a tree of rows has one too: each row is a chain of its segments. There it sees what
it sees alone, at the same positions. So log-probabilities and gradients are those of separate rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from multiverse_hf.modeling.labels import IGNORE, forced_mask
from multiverse_hf.modeling.layout import Layout, build_layout, plain_layout
from multiverse_hf.modeling.tags import TagSet


@dataclass(frozen=True, slots=True)
class Tree:
    """Rows as one row.

    Attributes:
        ids: (N,) int64 token ids.
        layout: of the tree.
        places: for each row, (L,) int64, where its tokens stand in the tree.
    """

    ids: torch.Tensor
    layout: Layout
    places: list[torch.Tensor]


def grow_tree(rows: Sequence[list[int]], tags: TagSet) -> Tree:
    """Return documents as one row. The last shared token stands in each of them, as each goes on differently.

    Args:
        rows: token ids of each document.
        tags: the control tags.
    """
    layouts = [build_layout(row, tags) for row in rows]
    places = [torch.empty(0, dtype=torch.long)] * len(rows)
    ids: list[int] = []
    positions: list[torch.Tensor] = []
    starts: list[int] = []  # where segments of the tree begin
    previous, before = [], places[0]
    for number in sorted(range(len(rows)), key=rows.__getitem__):  # each has most in common with the one before it
        row, layout = rows[number], layouts[number]
        pairs = zip(row, previous, strict=False)
        num_shared = max(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) - 1, 0)
        starts += before[num_shared : num_shared + 1].tolist()  # where the one before leaves this one
        changes = layout.segment_ids[num_shared:].diff().nonzero().flatten() + 1
        starts += [len(ids), *(changes + len(ids)).tolist()]
        own = torch.arange(len(ids), len(ids) + len(row) - num_shared)
        previous, before = row, torch.cat([before[:num_shared], own])
        places[number] = before
        ids += row[num_shared:]
        positions.append(layout.position_ids[num_shared:])

    segment_ids = torch.zeros(len(ids) + 1, dtype=torch.long)
    segment_ids[starts] = 1
    segment_ids = segment_ids[: len(ids)].cumsum(0) - 1
    size = int(segment_ids[-1]) + 1
    visible = torch.zeros(size, size, dtype=torch.bool)
    for place, layout in zip(places, layouts, strict=True):
        chain, counts = segment_ids[place].unique_consecutive(return_counts=True)
        alone = layout.segment_ids[counts.cumsum(0) - 1]  # the row's own segment of each in its chain
        visible[chain[:, None], chain] = layout.visible[alone[:, None], alone]
    return Tree(torch.tensor(ids), Layout(torch.cat(positions), segment_ids, visible.tril()), places)


def score_trees(
    model: Any, tags: TagSet, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_scored: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities and entropies of completions from one tree for each prompt.

    Args:
        model: a Multiverse model with TRL's fused head, which may be wrapped.
        tags: the control tags.
        input_ids: (B, L), prompts padded on the left and completions on the right.
        attention_mask: (B, L), 1 at real tokens.
        num_scored: the last columns, which hold the completions.

    Returns:
        (B, num_scored) each, 0 at padding and at forced tokens, as from separate rows. Entropies are None if the head
        computes none.
    """
    ids, real = input_ids.cpu(), attention_mask.cpu() != 0
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, is_real in enumerate(real):
        prompt = ids[row, :-num_scored][is_real[:-num_scored]]
        groups.setdefault(tuple(prompt.tolist()), []).append(row)
    trees = [grow_tree([ids[row, real[row]].tolist() for row in rows], tags) for rows in groups.values()]

    is_scored = real & ~forced_mask(ids, tags, real)
    is_scored[:, :-num_scored] = False
    layouts = [tree.layout for tree in trees]
    size, width = max(len(each.visible) for each in layouts), max(len(tree.ids) for tree in trees)
    labels = torch.full((len(trees), width), IGNORE)
    visible = torch.zeros(len(trees), size, size, dtype=torch.bool)
    sources = torch.full_like(ids, -1)  # of each scored token: which token of all trees is before it
    for number, (rows, tree) in enumerate(zip(groups.values(), trees, strict=True)):
        own = len(tree.layout.visible)
        visible[number, :own, :own] = tree.layout.visible
        for row, place in zip(rows, tree.places, strict=True):
            columns = real[row].nonzero().flatten()[1:]
            chosen = is_scored[row, columns]
            labels[number, place[:-1][chosen]] = ids[row, columns[chosen]]
            sources[row, columns[chosen]] = number * width + place[:-1][chosen]
    inputs = {
        "input_ids": pad_sequence([tree.ids for tree in trees], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(tree.ids) for tree in trees], batch_first=True),
        "position_ids": pad_sequence([each.position_ids for each in layouts], batch_first=True),
        "segment_ids": pad_sequence([each.segment_ids for each in layouts], batch_first=True),
        "visible": visible,
        "shift_labels": labels,
    }
    with plain_layout():  # the tree's layout is given; as one document it would have another
        output = model(**{name: each.to(input_ids.device) for name, each in inputs.items()}, fused_lm_head=True)
    sources = sources[:, -num_scored:].to(input_ids.device)

    def spread(scores: torch.Tensor) -> torch.Tensor:
        return torch.where(sources < 0, 0.0, scores.flatten()[sources.clamp(min=0)])

    return spread(output.log_probs), None if output.entropy is None else spread(output.entropy)


def sort_by_prompt(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return micro-batches of the same rows and sizes in which completions of one prompt stand together.

    Prompts keep the order in which they come first. TRL shuffles rows over micro-batches, which then share less.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches]).tolist()
    first: dict[tuple[int, ...], int] = {}
    ranks = [first.setdefault(tuple(prompt), len(first)) for prompt in prompts]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    sizes = [len(batch["prompt_ids"]) for batch in batches]
    ordered = [dict(batch) for batch in batches]
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            parts = torch.cat([batch[name] for batch in batches])[order].split(sizes)
            for batch, part in zip(ordered, parts, strict=True):
                batch[name] = part
    return ordered
