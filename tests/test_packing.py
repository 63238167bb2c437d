"""Several documents in one row: loss and gradients are those of each alone, and of each segment in its own context.

Three ways to the same numbers, in float64: packed rows through the collator; each document alone, laid out by the
model; and the base class run over each segment's visible tokens, with positions and mask by definition
(test_layout.Oracle).
"""

import copy
import functools

import pytest
import torch
from helpers import PAD, TAGS, exact_softmax, slow_unless, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_layout import Block, Oracle, trees, written
from test_rows import vars_of
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.rows import IGNORE, document_labels
from multiverse_hf.modeling import attention_chunked as chunked
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM

NESTED = (2, Block(((3,), (1, Block(((2,), (4,))), 1), (1,))), 2)
CHAINED = (1, Block(((5,), (2,))), 1, Block(((2,), (2,), (3,))))
DEEP = (
    Block(
        (
            (
                1,
                Block(((2, Block(((1,), (3,)))),)),
            ),
            (2,),
        )
    ),
    1,
)
PLAIN = (9,)
PACKS = [[NESTED, PLAIN, CHAINED], [DEEP], [PLAIN, PLAIN], [CHAINED, DEEP, NESTED]]


def row_of(oracle: Oracle) -> dict:
    """A training row: the first token is the prompt."""
    return {"input_ids": oracle.ids, "labels": [IGNORE, *document_labels(oracle.ids, TAGS)[1:]]}


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of all labels of rows, each from the logits before it, in the logits' own dtype."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def starcoder(attn: str, **settings) -> torch.nn.Module:
    """A model in float64 with plain layer norms; other norms round to float32 inside, on the way back too."""
    config = AutoConfig.for_model("starcoder2", **vars_of(tiny_config("qwen2", **settings)))
    torch.manual_seed(0)
    return MultiverseForCausalLM.from_config(config, TAGS, attn_implementation=attn, dtype=torch.float64)


@functools.cache
def models(attn: str, lora: bool) -> tuple:
    """The model, the base class with the same weights, and what of each is trained."""
    model = starcoder(attn)
    config = AutoConfig.for_model("starcoder2", **vars_of(tiny_config("qwen2")))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float64)
    base.load_state_dict(model.state_dict())
    if lora:
        settings = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(settings)).double()
        torch.manual_seed(1)
        base = get_peft_model(base, copy.deepcopy(settings)).double()
    return model, base


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def assert_equal(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-9, rtol=1e-9)
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) > 4
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], atol=1e-9, rtol=1e-9, msg=name)


def packed(model: torch.nn.Module, packs: list[list[tuple]], multiple: int = 1) -> tuple:
    rows = [[row_of(written(tree)) for tree in pack] for pack in packs]
    batch = DocumentCollator(TAGS, PAD, multiple=multiple)(rows)
    labels = batch.pop("labels")
    with exact_softmax():
        loss = loss_of(model(**batch).logits, labels)
        loss.backward()
    return loss.detach(), gradients(model)


def alone(model: torch.nn.Module, packs: list[list[tuple]]) -> tuple:
    total = torch.zeros((), dtype=torch.float64)
    for row in (row_of(written(tree)) for pack in packs for tree in pack):
        with exact_softmax():
            loss = loss_of(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([row["labels"]]))
            loss.backward()
        total += loss.detach()
    return total, gradients(model)


def by_segment(base: torch.nn.Module, packs: list[list[tuple]]) -> tuple:
    """Run each segment over the tokens it can see and no others."""
    total = torch.zeros((), dtype=torch.float64)
    for oracle in (written(tree) for pack in packs for tree in pack):
        row, segments = row_of(oracle), build_layout(oracle.ids, TAGS).segment_ids.tolist()
        for segment in range(max(segments) + 1):
            last = max(at for at, each in enumerate(segments) if each == segment)
            seen = [at for at in range(last + 1) if oracle.sees(last, at)]
            mask = torch.tensor([[oracle.sees(q, k) for k in seen] for q in seen])
            ids = torch.tensor([[oracle.ids[at] for at in seen]])
            positions = torch.tensor([[oracle.positions[at] for at in seen]])
            labels = torch.tensor([[row["labels"][at] if segments[at] == segment else IGNORE for at in seen]])
            if (labels[:, 1:] == IGNORE).all():
                continue
            loss = loss_of(base(ids, position_ids=positions, attention_mask=mask[None, None]).logits, labels)
            loss.backward()
            total += loss.detach()
    return total, gradients(base)


@pytest.fixture(autouse=True)
def _chunks_are_small(monkeypatch):
    """Have multiverse_sdpa cut documents as short as these."""
    monkeypatch.setattr(chunked, "QUERIES", 5)
    monkeypatch.setattr(chunked, "WHOLE", 3)


@pytest.mark.parametrize("checkpointing", slow_unless([False], [False, True]), ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", slow_unless([False], [False, True]), ids=["full", "lora"])
@pytest.mark.parametrize("attn", ["sdpa", "eager", "multiverse_sdpa"])
def test_packed_rows_train_as_their_documents_alone_and_as_each_segment_alone(attn, lora, checkpointing):
    model, base = models(attn, lora)
    model.train(), base.train()
    inner = model.get_base_model() if lora else model
    try:
        if checkpointing:
            inner.activation_checkpointing_enable()
            inner.enable_input_require_grads()
        together = packed(model, PACKS)
        assert_equal(together, packed(model, PACKS, multiple=32))
        assert_equal(together, alone(model, PACKS))
    finally:
        inner.activation_checkpointing_disable()
        inner.disable_input_require_grads() if checkpointing else None
    assert_equal(together, by_segment(base, PACKS))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
def test_flex_attention_trains_packed_rows_as_sdpa_does_up_to_rounding(checkpointing):
    exact = starcoder("sdpa", head_dim=16)  # flex_attention on a GPU takes no fewer
    loss, truth = packed(exact.train(), PACKS)
    found = {}
    for attn in ("sdpa", "flex_attention"):
        model = MultiverseForCausalLM.from_config(
            exact.config, TAGS, attn_implementation=attn, dtype=torch.float32
        ).cuda()
        model.load_state_dict(exact.state_dict())
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = DocumentCollator(TAGS, PAD, multiple=128)([[row_of(written(tree)) for tree in pack] for pack in PACKS])
        batch = {name: value.cuda() for name, value in batch.items()}
        labels = batch.pop("labels")
        ours = loss_of(model(**batch).logits, labels)
        ours.backward()
        gaps = [(gradient.cpu().double() - truth[name]).norm() for name, gradient in gradients(model).items()]
        found[attn] = [abs(ours.item() - loss.item()) / loss.item(), torch.stack(gaps).norm().item()]
    scale = torch.stack([gradient.norm() for gradient in truth.values()]).norm().item()
    # what float32 costs sdpa is the measure; flex uses other kernels in another order
    assert found["flex_attention"][0] < 4 * found["sdpa"][0] + 1e-5
    assert found["flex_attention"][1] < 4 * found["sdpa"][1] + 1e-4 * scale


@settings(max_examples=15)
@given(packs=st.lists(st.lists(trees, min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_documents_train_packed_as_alone(packs):
    model, _ = models("sdpa", False)
    loss, ours = packed(model, packs)
    total, theirs = alone(model, packs)
    torch.testing.assert_close(loss, total, atol=1e-9, rtol=1e-9)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("attn", ["sdpa", "eager", "multiverse_sdpa"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "mistral"])
def test_windows_count_positions_within_each_packed_document(name, attn):
    from helpers import tiny_model

    model = tiny_model(name, attn)
    batch = DocumentCollator(TAGS, PAD)([[row_of(written(tree)) for tree in PACKS[0]]])
    with torch.no_grad(), exact_softmax():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
        begin = 0
        for tree in PACKS[0]:
            ids = written(tree).ids
            own = {} if len(build_layout(ids, TAGS).visible) > 1 else {"position_ids": torch.arange(len(ids))[None]}
            theirs = model(torch.tensor([ids]), **own).logits[0]
            torch.testing.assert_close(logits[begin : begin + len(ids)], theirs, atol=1e-6, rtol=0)
            begin += len(ids)


def test_flash_attention_gets_documents_in_the_form_transformers_has_for_it():
    trees = [PLAIN, (4,), (6,)]
    rows = [row_of(written(tree)) for tree in trees]
    ours = DocumentCollator(TAGS, PAD, flatten=True)([rows[:2], rows[2:]])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    )
    for name in ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    assert (ours["max_length_q"], ours["max_length_k"]) == (theirs["max_length_q"], theirs["max_length_k"])
    with pytest.raises(ValueError, match="cannot mask sibling paths"):
        DocumentCollator(TAGS, PAD, flatten=True)([row_of(written(NESTED))])


def test_shapes_are_rounded_so_that_compiled_kernels_meet_few():
    batch = DocumentCollator(TAGS, PAD, multiple=128)([[row_of(written(tree)) for tree in PACKS[3]]])
    assert batch["input_ids"].shape[1] % 128 == 0
    size = batch["visible"].shape[1]
    assert size & (size - 1) == 0
