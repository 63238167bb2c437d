"""Tree training: completions of one prompt as one row give what they give as rows of their own."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import trl.trainer.utils
from helpers import EOS, FIRST_TEXT, PAD, TAGS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grpo import make_trainer
from test_layout import Block, expanded, trees, written

from multiverse_hf.modeling import attention_chunked, masks
from multiverse_hf.modeling.labels import forced_mask
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.training import trees as tree_module
from multiverse_hf.training.trees import grow_tree, sort_by_prompt

STYLES = 3  # documents of one style have the same text at the same place


def spell(tree: tuple, style: int, cut: int) -> list[int]:
    ids = [FIRST_TEXT + style * n % 50 if token == FIRST_TEXT else token for n, token in enumerate(written(tree).ids)]
    return [*ids, EOS][:cut]  # some are truncated


BLOCK = spell((1, Block(((2,), (1,)))), 0, 60)[:-1]
texts = st.builds(spell, trees, st.integers(0, STYLES - 1), st.integers(1, 90))
groups = st.lists(
    st.tuples(texts.filter(bool), st.lists(texts, min_size=1, max_size=5)), min_size=1, max_size=2, unique_by=str
)


@given(group=st.tuples(texts, st.lists(texts, min_size=1, max_size=6)))
def test_in_a_tree_each_row_sees_what_it_sees_alone_and_a_shared_token_stands_once(group):
    prompt, completions = group
    rows = [prompt + completion for completion in completions]
    tree = grow_tree(rows, TAGS)
    mask, used = tree.layout.mask(), set()
    for row, place in zip(rows, tree.places, strict=True):
        alone = build_layout(row, TAGS)
        assert tree.ids[place].tolist() == row
        assert tree.layout.position_ids[place].tolist() == alone.position_ids.tolist()
        assert torch.equal(mask[place][:, place], alone.mask())
        others = torch.ones(len(tree.ids), dtype=torch.bool)
        others[place] = False
        assert not mask[place][:, others].any(), "a row sees nothing of another's"
        used.update(place.tolist())
    assert used == set(range(len(tree.ids)))
    # one token for each prefix that rows have, and a copy of the last shared one where a row leaves another
    prefixes = {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    assert len(tree.ids) == len(prefixes) + len(rows) - 1


@pytest.mark.slow
@settings(max_examples=15)
@given(prompt=texts, completions=st.lists(texts, min_size=2, max_size=4), tile=st.sampled_from([4, 8]))
def test_flex_attention_sees_of_a_tree_what_a_dense_mask_shows(prompt, completions, tile):
    layout = grow_tree([prompt + completion for completion in completions], TAGS).layout
    with patch.object(masks, "_TILE", tile):
        mask = masks.block_mask(layout.position_ids[None], layout.segment_ids[None], layout.visible[None])
    assert torch.equal(expanded(mask)[0, 0], layout.mask())


def test_micro_batches_keep_their_rows_and_have_completions_of_a_prompt_together():
    def batch(*rows: tuple[int, int]) -> dict:
        prompts, completions = zip(*rows, strict=True)
        return {
            "prompt_ids": torch.tensor(prompts)[:, None],
            "completion_ids": torch.tensor(completions),
            "num_items_in_batch": torch.tensor(7),
        }

    found = sort_by_prompt([batch((2, 10), (1, 11), (2, 12)), batch((1, 13), (2, 14), (1, 15))])
    assert [batch["prompt_ids"].flatten().tolist() for batch in found] == [[2, 2, 2], [1, 1, 1]]
    assert [batch["completion_ids"].tolist() for batch in found] == [[10, 12, 14], [11, 13, 15]]
    assert [int(batch["num_items_in_batch"]) for batch in found] == [7, 7]


class ExactHead:
    """TRL's fused head in the dtype of the model: its own kernel computes in float32."""

    @staticmethod
    def apply(hidden, weight, bias, labels, *settings):
        logps = (hidden @ weight.T).log_softmax(-1)
        return logps.gather(-1, labels[:, None])[:, 0], torch.special.entr(logps.exp()).sum(-1), None, None, None


def norm_exactly(model) -> None:
    """Have the model's norms compute in its dtype: those of transformers round to float32, their gradients too."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            eps = getattr(module, "variance_epsilon", None) or module.eps
            one = float(type(module).__name__.startswith("Gemma"))
            module.forward = lambda x, own=module, eps=eps, one=one: (
                (one + own.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            )


def make_batch(groups: list, seed: int) -> dict[str, torch.Tensor]:
    """Make a batch of TRL's, with random advantages and log-probabilities of the engine."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    torch.manual_seed(seed)
    order = torch.randperm(len(rows)).tolist()
    prompts, completions = zip(*(rows[n] for n in order), strict=True)
    if len(groups) > 1:  # without a block the base model counts padding as positions, whose angles are float32
        completions = [BLOCK + completions[0], *completions[1:]]
    wide, long = max(map(len, prompts)), max(map(len, completions))
    masks = (
        [[0] * (wide - len(ids)) + [1] * len(ids) for ids in prompts],
        [[1] * len(ids) + [0] * (long - len(ids)) for ids in completions],
    )
    batch = {
        "prompt_ids": torch.tensor([[PAD] * (wide - len(ids)) + ids for ids in prompts]),
        "prompt_mask": torch.tensor(masks[0]),
        "completion_ids": torch.tensor([ids + [PAD] * (long - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor(masks[1]),
        "advantages": torch.randn(len(rows), dtype=torch.float64),
        "num_items_in_batch": torch.tensor(float(sum(map(len, completions)))),
    }
    if seed % 3 == 0:  # as mask_truncated_completions masks one
        batch["completion_mask"][-1] = 0
    whole = [torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask")]
    chosen = ~forced_mask(whole[0], TAGS, whole[1])[:, -long:] & (torch.rand(len(rows), long) < 0.9)
    batch["tool_mask"] = chosen.long() * batch["completion_mask"]
    batch["sampling_per_token_logps"] = -3 * torch.rand(len(rows), long, dtype=torch.float64)
    batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
    return batch


def outcome(trainer, batch: dict[str, torch.Tensor], share_prompt: bool) -> list[torch.Tensor]:
    """Return loss, log-probabilities and the gradient of each weight."""
    trainer.share_prompt = share_prompt
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return [loss.detach(), trainer._logps, *(weight.grad.clone() for weight in trainer.model.parameters())]


def worst(trainer, batch: dict[str, torch.Tensor]) -> float:
    pairs = zip(outcome(trainer, batch, True), outcome(trainer, batch, False), strict=True)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.fixture(scope="module", params=["qwen3-sdpa", "gemma3_text-sdpa", "qwen3-multiverse_sdpa"])
def trainer(request, tmp_path_factory):
    name, attention = request.param.split("-")
    model = tiny_model(name, attention)
    norm_exactly(model)
    made = make_trainer(tmp_path_factory.mktemp("tree"), model)
    made.current_gradient_accumulation_steps = 1
    with (
        patch.object(trl.trainer.utils, "_ChunkedLogProbFunction", ExactHead),
        patch.object(attention_chunked, "QUERIES", 16),  # so that short rows have several chunks
        patch.object(attention_chunked, "WHOLE", 8),
    ):
        yield made


@pytest.mark.slow
@settings(max_examples=15)
@given(groups=groups, seed=st.integers(0, 99))
def test_a_tree_gives_log_probabilities_loss_and_gradients_of_separate_rows(trainer, groups, seed):
    assert worst(trainer, make_batch(groups, seed)) < 1e-9


@pytest.mark.slow
def test_a_wrong_layout_of_the_tree_changes_log_probabilities_and_gradients(trainer, monkeypatch):
    batch = make_batch([([FIRST_TEXT] * 5, [spell((3, Block(((4,), (5,))), 3), style, 60) for style in range(3)])], 1)
    assert worst(trainer, batch) < 1e-9

    def all_visible(rows, tags):
        tree = grow_tree(rows, tags)
        return replace(tree, layout=replace(tree.layout, visible=torch.ones_like(tree.layout.visible).tril()))

    def in_line(rows, tags):
        tree = grow_tree(rows, tags)
        return replace(tree, layout=replace(tree.layout, position_ids=torch.arange(len(tree.ids))))

    for wrong in (all_visible, in_line):
        monkeypatch.setattr(tree_module, "grow_tree", wrong)
        assert worst(trainer, batch) > 1e-3
