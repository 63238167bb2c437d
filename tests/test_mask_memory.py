"""No tensor of L x L entries is made on the way from a row's ids to its masks: the largest tensor is metered."""

from typing import Any

import pytest
import torch
from helpers import PAD, TAGS
from test_layout import Block, written
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.masks import block_mask, dense_mask

LENGTH = 16_384


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation of torch gives while it is on."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return output


def row(length: int) -> list[int]:
    """A document of blocks, nested ones among them, of so many tokens."""
    block = (50, Block(((200,), (150, Block(((80,), (120,))), 20), (300,))), 40)
    per_block = len(written(block).ids)
    ids = written(block * (length // per_block)).ids
    return (ids + ids)[:length]


def batch_of(length: int) -> dict[str, torch.Tensor]:
    ids = row(length - 100)  # so that there is padding too
    return DocumentCollator(TAGS, PAD, multiple=128)([{"input_ids": ids, "labels": ids}])


def arguments(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return batch["position_ids"], batch["segment_ids"], batch["visible"], batch["attention_mask"]


def test_a_long_row_is_laid_out_and_masked_without_a_tensor_of_all_pairs_of_tokens():
    with LargestTensor() as meter:
        layout = build_layout(row(LENGTH), TAGS)
        batch = batch_of(LENGTH)
        for window in (None, 4096):
            mask = block_mask(*arguments(batch), window)
    assert batch["input_ids"].shape[1] == LENGTH == mask.seq_lengths[0]
    assert len(layout.visible) > 50
    # the tables of tiles, (L / 128)^2, are the largest
    assert LENGTH <= meter.numel < 8 * LENGTH


def test_the_meter_sees_the_dense_mask():
    batch = batch_of(2048)
    with LargestTensor() as meter:
        dense_mask(*arguments(batch))
    assert meter.numel >= 2048**2


@pytest.mark.slow
def test_flex_attention_stays_compiled_when_training_evaluates():
    """Where torch has compiled too many kernels it computes all scores instead; here that is an error."""

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        return flex_attention(*args, **kwargs)  # kernels of other tests are not counted with it

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    small, large = batch_of(1500), batch_of(2000)
    with torch._dynamo.config.patch(recompile_limit=8):
        for rows in (1, 2):
            for is_training in (True, False):
                for window in (None, 64):
                    for batch in (small, large):
                        mask = block_mask(*(tensor.repeat_interleave(rows, 0) for tensor in arguments(batch)), window)
                        states = torch.randn(rows, 1, batch["input_ids"].shape[1], 8)
                        with torch.set_grad_enabled(is_training):
                            compiled(states, states, states, block_mask=mask)
    assert counter.frame_count > 8
