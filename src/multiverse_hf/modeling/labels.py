"""Forced tokens: what the engine writes itself, so that a model neither learns nor is judged by it.

At a fork the engine begins each path with ``\\n<Path>\\n1:``, and at a reduce it writes ``\\n<Conclusion>\\n``. No
model chose these tokens. The first token of a path, and of what follows the paths, is among them: in document order
the token before it belongs to another path, so nothing predicts it. One definition serves training, log-probabilities
and evaluation (paper, section on training; docs/decisions.md, "Forced tokens").
"""

from collections.abc import Sequence
from typing import Any

import torch

from .grammar import Event, Structure
from .masks import split_rows
from .tags import TagSet

IGNORE = -100  # label of a token that is not learnt, as everywhere in transformers
IMPOSSIBLE = -1e3  # logit beside a forced token's 0: its probability is 0, and stays finite under any temperature


def find_forced(ids: Sequence[int], tags: TagSet) -> list[range]:
    """Return where a document holds forced tokens.

    Args:
        ids: (L,) token ids of one document, paths one after the other.
        tags: the control tags.

    Returns:
        A range of indices after each fork and after each path, in ascending order. It covers as much of the engine's
        text as the document has, and one token at least.
    """
    structure, forced = Structure(tags), []
    for index, token in enumerate(ids):
        event = structure.feed(token)
        if event is Event.TEXT:
            continue
        at = index + 1
        if event is Event.REDUCE:
            prefix = tags.reduce_prefix
        else:
            prefix = structure.path_prefix(structure.open_blocks[-1].path)
        length = 1
        while length < len(prefix) and list(ids[at : at + length + 1]) == prefix[: length + 1]:
            length += 1
        if at < len(ids):
            forced.append(range(at, min(at + length, len(ids))))
    return forced


def forced_mask(
    input_ids: torch.Tensor,
    tags: TagSet,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return where a batch holds forced tokens.

    Args:
        input_ids: (B, L) token ids.
        tags: the control tags.
        attention_mask: (B, L), nonzero at real tokens, or None if all are real.
        position_ids: (B, L), 0 where a packed document begins; None for one document a row.
        segment_ids: (B, L), of a layout that ``position_ids`` are of, too. Only what it lays out has forced tokens.

    Returns:
        (B, L) bool, on the device of ``input_ids``.

    Raises:
        ValueError: if positions are given that neither count up from 0 nor restart there.
    """
    ids = input_ids.cpu()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    if segment_ids is not None:  # a layout's positions: from 0 on they count the tokens of a document
        column = torch.arange(ids.shape[1])
        begins = torch.where(position_ids.cpu() == 0, column, 0).cummax(-1).values
        position_ids, segment_ids = column - begins, segment_ids.cpu()
    for row, parts in enumerate(split_rows(ids, attention_mask, position_ids)):
        for columns in parts:
            for run in find_forced(ids[row, columns].tolist(), tags):
                own = columns[run.start : run.stop]
                if segment_ids is None or segment_ids[row, own[0]] != segment_ids[row, columns[run.start - 1]]:
                    mask[row, own] = True
    return mask.to(input_ids.device)


def labels_for(
    input_ids: torch.Tensor,
    tags: Any,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return labels for a training loop of one's own: the ids, and -100 at padding and at forced tokens.

    Args:
        input_ids: (B, L) token ids.
        tags: the control tags, a :class:`~.tags.TagSet`, or a Multiverse model, which holds them.
        attention_mask: as the model is given it, or None.
        position_ids: as the model is given them, or None.

    Returns:
        (B, L) int64, on the device of ``input_ids``.
    """
    tags = getattr(tags, "tags", tags)
    labels = input_ids.masked_fill(forced_mask(input_ids, tags, attention_mask, position_ids), IGNORE)
    return labels if attention_mask is None else labels.masked_fill(attention_mask == 0, IGNORE)
