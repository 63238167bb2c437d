"""multiverse_sdpa: attention in chunks of queries is sdpa with the dense mask, forward and back, without that mask."""

from unittest.mock import patch

import pytest
import torch
from helpers import (
    FIRST_TEXT,
    TAGS,
    Forced,
    answer,
    exact_softmax,
    left_pad,
    replay_error,
    slow_unless,
    tiny_config,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st
from test_layout import Block, trees, written
from test_mask_memory import LargestTensor
from transformers import AttentionInterface

from multiverse_hf.modeling import attention_chunked as chunked
from multiverse_hf.modeling.attention_chunked import CHUNKED, chunk_rows, chunked_attention
from multiverse_hf.modeling.masks import dense_mask, document_masks, pad_layouts
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM

NESTED = (2, Block(((9,), (1, Block(((2,), (4,))), 1), (1,))), 30)
CHAINED = (1, Block(((5,), (2,))), 1, Block(((2,), (21,), (3,))))
DOCUMENTS = [NESTED, CHAINED, (9,)]


@pytest.fixture(autouse=True)
def _own_attention():
    """A copy of the code that came with a checkpoint, in another test, has put its own in the place of ours."""
    AttentionInterface.register(CHUNKED, chunked_attention)


def padded(documents: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if left:
        return left_pad(documents)
    ids, mask = left_pad([document[::-1] for document in documents])
    return ids.flip(1), mask.flip(1)


def expanded(mask: chunked.ChunkedMask) -> torch.Tensor:
    """What each query sees, (B, 1, L, L) bool, from the masks that are added to scores."""
    batch, length = mask.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for chunk, added in zip(mask.chunks, mask.masks(torch.zeros(1, dtype=torch.float64)), strict=True):
        columns = torch.cat([torch.arange(length)[part] for part in chunk.keys])
        assert added.shape == (1, 1, chunk.num_queries, chunk.num_keys)
        assert set(added.unique().tolist()) <= {0.0, -torch.inf}
        rows = torch.arange(length)[chunk.queries]
        assert not seen[chunk.row, 0, rows].any(), "each query is in one chunk"
        seen[chunk.row, 0, rows[:, None], columns] = added[0, 0] == 0
    return seen


@pytest.mark.parametrize("window", [None, 5])
@given(
    rows=st.lists(trees, min_size=1, max_size=3),
    left=st.booleans(),
    size=st.sampled_from([(1, 1), (2, 2), (5, 3), (8, 8), (256, 128)]),
)
def test_chunks_hold_the_dense_mask(window: int | None, rows: list[tuple], left: bool, size: tuple[int, int]):
    ids, real = padded([written(tree).ids for tree in rows], left)
    arguments = (*pad_layouts(ids, real, TAGS), real, window)
    with patch.object(chunked, "QUERIES", size[0]), patch.object(chunked, "WHOLE", size[1]):
        mask = chunk_rows(*arguments)
    assert all(chunk.num_queries <= size[0] for chunk in mask.chunks)
    queries = real[:, None, :, None] != 0  # padding is in no chunk
    assert torch.equal(expanded(mask), dense_mask(*arguments) & queries)


def test_long_segments_are_cut_evenly_and_share_one_triangle():
    ids = torch.tensor([written((700, Block(((300,), (200,))), 10)).ids])
    mask = chunk_rows(*pad_layouts(ids, None, TAGS))
    sizes = [chunk.num_queries for chunk in mask.chunks]
    assert sum(sizes) == ids.shape[1]
    assert min(sizes[:-1]) > chunked.WHOLE  # no crumbs between parts
    masks = mask.masks(torch.zeros(1))
    storages = {each.untyped_storage().data_ptr() for each in masks}
    assert len(storages) == 1
    siblings = [chunk for chunk in mask.chunks if len(chunk.keys) > 1]
    assert siblings, "the second path's chunks leave the first out"
    assert mask.masks(torch.zeros(1)) is masks, "the layers share them"


def run(model: torch.nn.Module, ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits at real tokens, and gradients of a sum over them that weighs each differently."""
    with exact_softmax():
        logits = model(ids, attention_mask=real).logits[real != 0]
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        (logits.log_softmax(-1) * weights).sum().backward()
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), taken


@pytest.mark.parametrize("size", [(4, 2), (16, 9)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", slow_unless(["gemma3_text"], ["starcoder2", "qwen3", "gemma3_text", "mistral"]))
def test_logits_and_gradients_are_those_of_the_dense_mask(monkeypatch, name, left, size):
    if name == "starcoder2":  # plain layer norms; the others round to float32 inside, on the way back too
        from test_packing import models

        model, tolerance = models("sdpa", False)[0].train(), 1e-9
    else:
        model, tolerance = tiny_model(name).train(), 1e-4
    monkeypatch.setattr(chunked, "QUERIES", size[0])
    monkeypatch.setattr(chunked, "WHOLE", size[1])
    ids, real = padded([written(tree).ids for tree in DOCUMENTS], left)
    theirs = run(model, ids, real)
    try:
        model.set_attn_implementation(CHUNKED)
        with patch.object(chunked, "sdpa_attention_forward", side_effect=AssertionError("a mask was made")):
            ours = run(model, ids, real)
            model.activation_checkpointing_enable()
            again = run(model, ids, real)
    finally:
        model.activation_checkpointing_disable()
        model.set_attn_implementation("sdpa")
    for logits, gradients in (ours, again):
        assert gradients.keys() == theirs[1].keys()
        torch.testing.assert_close(logits, theirs[0], atol=tolerance, rtol=tolerance)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, theirs[1][key], atol=tolerance, rtol=tolerance, msg=key)


def test_plain_rows_and_short_ones_go_to_the_sdpa_of_transformers():
    model = tiny_model("qwen2", CHUNKED)
    plain = torch.full((1, 300), FIRST_TEXT)
    short = torch.tensor([written(CHAINED).ids])
    long = torch.tensor([written((300, *CHAINED)).ids])
    with (
        torch.no_grad(),
        patch.object(chunked, "sdpa_attention_forward", wraps=chunked.sdpa_attention_forward) as called,
    ):
        for ids, masks in ((plain, [None]), (short, [(1, 1, short.shape[1], short.shape[1])]), (long, [])):
            called.reset_mock()
            model(ids)
            seen = {None if call.args[4] is None else tuple(call.args[4].shape) for call in called.call_args_list}
            assert seen == set(masks)


def test_no_tensor_of_all_queries_and_all_keys_is_made_in_a_training_step():
    ids = torch.tensor([written((400, Block(((300,), (60,), (400,))), 60, Block(((300,), (200,))), 130)).ids])
    model = tiny_model("qwen2", CHUNKED, torch.float32).train()
    with LargestTensor() as meter:
        model(ids, labels=ids).loss.backward()
    assert meter.numel <= chunked.QUERIES * ids.shape[1] < ids.shape[1] ** 2 / 7
    model.set_attn_implementation("sdpa")
    with LargestTensor() as meter:
        model(ids, labels=ids).loss.backward()
    assert meter.numel >= ids.shape[1] ** 2


def test_a_model_loaded_with_it_generates_and_replays(tmp_path):
    prompts = [[FIRST_TEXT + 1, FIRST_TEXT + 2], [FIRST_TEXT] * 5]
    plans = {tuple(prompts[0]): (3, Forced(((6,), (9,))), 2, "eos"), tuple(prompts[1]): (4, "eos")}
    tiny_model("qwen2").save_pretrained(tmp_path)
    model = MultiverseForCausalLM.from_pretrained(tmp_path, attn_implementation=CHUNKED)
    assert model.config._attn_implementation == CHUNKED
    theirs = MultiverseForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    ours = answer(model, prompts, plans)
    assert torch.equal(ours.sequences, answer(theirs, prompts, plans).sequences)
    with patch.object(chunked, "QUERIES", 4), patch.object(chunked, "WHOLE", 2):
        assert replay_error(model, ours, 5, left_pad(prompts)[1]) < 1e-9
    model.save_pretrained(tmp_path / "again")
    assert CHUNKED not in (tmp_path / "again/config.json").read_text()


def test_what_sdpa_cannot_do_is_refused():
    config = tiny_config("qwen2")
    with patch.object(type(tiny_model("qwen2")), "_supports_sdpa", False), pytest.raises(ValueError, match="eager"):
        MultiverseForCausalLM.from_config(config, TAGS, attn_implementation=CHUNKED)
    ids = torch.tensor([written((300, *CHAINED)).ids])
    config._attn_implementation = CHUNKED
    mask = document_masks(config, torch.float32, *pad_layouts(ids, None, TAGS))
    scores = torch.zeros(1, 2, ids.shape[1], 8)
    with pytest.raises(ValueError, match="s_aux"):
        chunked_attention(torch.nn.Module(), scores, scores, scores, mask, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="without a cache"):
        chunked_attention(torch.nn.Module(), scores[:, :, :1], scores, scores, mask)
    with pytest.raises(RuntimeError):  # nothing but our own function takes the carrier for a mask
        torch.nn.functional.scaled_dot_product_attention(scores, scores, scores, mask)
