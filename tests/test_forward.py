"""Whoever calls ``forward``: the layout's logits, or an error. Never causal logits for a row with a complete block.

The oracle is the base class with positions and mask by definition (test_layout.Oracle).
"""

import copy
import functools
import pickle

import pytest
import torch
from helpers import NEWLINE, PAD, TAGS, answer, documents, exact_softmax, left_pad, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_layout import Block, Oracle, trees, written
from test_replay import CHAINED, FORCED, PROMPTS, WIDE
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache, StaticCache

from multiverse_hf import MultiverseEngine, labels_for
from multiverse_hf.modeling.labels import IGNORE, IMPOSSIBLE, find_forced
from multiverse_hf.modeling.layout import has_block, plain_layout

TWO = (1, Block(((2,), (3,))), 1)
NESTED = (2, Block(((3,), (1, Block(((2,), (4,))), 1), (1,))), 2)


@functools.cache
def pair(name: str = "qwen2") -> tuple:
    """A Multiverse model and the base class with the same weights, in float64."""
    model = tiny_model(name)
    base = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=torch.float64)
    base.load_state_dict(model.state_dict())
    return model, base.eval()


def expected(base, oracle: Oracle) -> torch.Tensor:
    """The oracle's logits of one document, (L, V); 0 and a great negative number where the next token is forced."""
    ids, places = torch.tensor([oracle.ids]), range(len(oracle.ids))
    mask = torch.tensor([[oracle.sees(q, k) for k in places] for q in places])
    with torch.no_grad(), exact_softmax():
        logits = base(ids, position_ids=torch.tensor([oracle.positions]), attention_mask=mask[None, None]).logits[0]
    for run in find_forced(oracle.ids, TAGS):
        for at in run:
            logits[at - 1] = -1000.0
            logits[at - 1, oracle.ids[at]] = 0.0
    return logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=1e-6, rtol=0)  # rotary angles are float32 whatever the dtype


# The property


@settings(max_examples=60)
@given(
    docs=st.lists(trees, min_size=1, max_size=3),
    positions=st.sampled_from(["none", "plain", "restarting", "shifted", "backwards"]),
    padding=st.sampled_from([None, "left", "right"]),
    cache=st.sampled_from(["none", "empty", "filled"]),
    embeds=st.booleans(),
)
def test_a_call_gives_the_layouts_logits_or_raises(docs, positions, padding, cache, embeds):
    model, base = pair()
    # without restarting positions, documents in one row are one document
    oracles = [written(tree) for tree in docs]
    if positions != "restarting":
        oracles = [whole(docs)]
    ids = [token for oracle in oracles for token in oracle.ids]
    given_positions = [at for oracle in oracles for at in range(len(oracle.ids))]
    if positions == "shifted":
        given_positions = [at + 3 for at in given_positions]
    elif positions == "backwards":
        given_positions = given_positions[::-1]
    pads = 0 if padding is None else 2
    left = pads if padding == "left" else 0
    right = pads - left
    row = torch.tensor([[PAD] * left + ids + [PAD] * right])
    call = {"use_cache": False}
    if padding is not None:
        call["attention_mask"] = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])
    if positions != "none":
        call["position_ids"] = torch.tensor([[0] * left + given_positions + [0] * right])
    if cache != "none":
        call |= {"past_key_values": DynamicCache(), "use_cache": True}
    if cache == "filled":
        model(torch.tensor([[60, 61]]), past_key_values=call["past_key_values"])
        if padding is not None:
            call["attention_mask"] = torch.cat([torch.ones(1, 2, dtype=torch.long), call["attention_mask"]], 1)
    if embeds:
        call["inputs_embeds"] = model.get_input_embeddings()(row)
    else:
        call["input_ids"] = row
    has_blocks = has_block(torch.tensor(ids), TAGS)
    if has_blocks and (cache == "filled" or (positions in ("shifted", "backwards") and len(ids) > 1)):
        with pytest.raises(ValueError, match=r"past_key_values|position_ids"):
            model(**call)
        return
    if not has_blocks:
        return  # the base class's affair: tests of loading and of the ecosystem compare it
    with torch.no_grad(), exact_softmax():
        logits = model(**call).logits[0, left : left + len(ids)]
    begin = 0
    for oracle in oracles:
        end = begin + len(oracle.ids)
        assert close(logits[begin:end], expected(base, oracle))
        begin = end
    if cache == "empty":
        with pytest.raises(ValueError, match="this cache holds a document"):
            model(torch.tensor([[60]]), past_key_values=call["past_key_values"])


def whole(docs: list[tuple]) -> Oracle:
    oracle, position = Oracle(TAGS), 0
    for tree in docs:
        position = oracle.document((1, *tree), position, {})
    return oracle


@torch.no_grad()
def test_no_cache_with_a_laid_out_document_is_gone_on_with_unnoticed():
    model, _ = pair()
    ids = torch.tensor([written(TWO).ids])
    cache = model(ids).past_key_values  # made by the model itself
    for each in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match=r"call model\.generate"):
            model(torch.tensor([[60]]), past_key_values=each)
    step = model(ids[:, :5]).past_key_values  # before the goal closes it is ordinary text
    assert model(torch.tensor([[60]]), past_key_values=step).logits.shape == (1, 1, 96)
    with pytest.raises(ValueError, match="comes after past_key_values"):
        model(ids[:, 5:], past_key_values=step)


def test_tags_are_text_under_plain_layout_and_in_a_layout_of_one_segment():
    model, base = pair()
    ids = torch.tensor([written(NESTED).ids])
    with torch.no_grad():
        theirs = base(ids).logits
        with plain_layout():
            assert torch.equal(model(ids).logits, theirs)
        one = {"segment_ids": torch.zeros_like(ids), "visible": torch.ones(1, 1, 1, dtype=torch.bool)}
        positions = torch.arange(ids.shape[1])[None]
        assert torch.equal(model(ids, position_ids=positions, **one).logits, theirs)
        assert not torch.equal(model(ids).logits, theirs)


def test_a_stray_goal_end_leaves_a_row_to_the_base_class():
    model, base = pair()
    ids = torch.tensor([[60, TAGS.close("goal"), 61, TAGS.close("path"), 62]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "mistral"])
def test_rows_packed_by_transformers_collator_read_as_alone(name):
    model, _ = pair(name)
    oracles = [written(tree) for tree in (TWO, (4,), NESTED)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": oracle.ids} for oracle in oracles])
    with torch.no_grad(), exact_softmax():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    begin = 0
    for oracle in oracles:
        end = begin + len(oracle.ids)
        with torch.no_grad(), exact_softmax():
            alone = model(torch.tensor([oracle.ids])).logits[0]
        assert close(logits[begin:end], alone)
        begin = end


LENGTH = len(written(TWO).ids)
CAUSAL = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
ADDED = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~CAUSAL, -1e9)
ENDS = torch.tensor([0, 3, LENGTH], dtype=torch.int32)
NUMBERS = torch.tensor([[1] * 3 + [2] * (LENGTH - 3)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": CAUSAL}, "a mask of its own"),
        ({"attention_mask": CAUSAL, "position_ids": torch.arange(LENGTH)[None]}, "a mask of its own"),
        ({"attention_mask": {"full_attention": CAUSAL}}, "a mask of its own"),
        ({"attention_mask": ADDED}, "a mask of its own"),
        ({"attention_mask": NUMBERS}, "attention_mask parts it into documents"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}, "cu_seq_lens_q parts it into documents"),
        ({"seq_idx": NUMBERS}, "seq_idx parts it into documents"),
    ],
)
def test_masks_and_packings_that_the_layout_cannot_follow_are_refused_beside_a_block(call, message):
    """Where there is no block they are the base class's affair."""
    model, base = pair()
    ids = torch.tensor([written(TWO).ids])
    for forward in (model, model.model, model.model.forward):
        with pytest.raises(ValueError, match=message):
            forward(ids, **call)
    text = torch.full_like(ids, 60)
    with torch.no_grad():
        assert torch.equal(model(text, **call).logits, base(text, **call).logits)
        with plain_layout():
            assert torch.equal(model(ids, **call).logits, base(ids, **call).logits)


def test_a_mask_of_the_callers_own_with_the_layouts_positions_is_followed():
    model, base = pair()
    oracle = written(TWO)
    ids, places = torch.tensor([oracle.ids]), range(len(oracle.ids))
    mask = torch.tensor([[oracle.sees(q, k) for k in places] for q in places])[None, None]
    call = {"attention_mask": mask, "position_ids": torch.tensor([oracle.positions])}
    with torch.no_grad():
        assert torch.equal(model(ids, **call).logits, base(ids, **call).logits)


@torch.no_grad()
def test_a_cache_of_fixed_size_is_refused_beside_a_block():
    model, base = pair()
    ids = torch.tensor([written(TWO).ids])
    for each in (model, base):
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert each(torch.full_like(ids, 60), past_key_values=cache).logits.shape[1] == LENGTH
    with pytest.raises(ValueError, match="StaticCache has a fixed size"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_embeddings_with_noise_are_refused_where_the_goal_ends(name):
    """NEFTune's noise, at the strength that its authors use, hides the tags."""
    model, _ = pair(name)
    ids = torch.tensor([written(TWO).ids])
    embeds = model.get_input_embeddings()(ids).detach()
    torch.manual_seed(0)
    size = embeds.std() * 5 / (embeds.shape[1] * embeds.shape[2]) ** 0.5
    noise = torch.empty_like(embeds).uniform_(-1, 1) * size
    with pytest.raises(ValueError, match="almost the one of </Goal>"):
        model(inputs_embeds=embeds + noise)
    text = model.get_input_embeddings()(torch.full_like(ids, 60)).detach()
    assert model(inputs_embeds=text + noise).logits.shape[1] == LENGTH
    model = copy.deepcopy(model).train()  # noise that the trainer's hook adds inside the model does not hide them
    model.get_input_embeddings().register_forward_hook(lambda _, __, out: out + noise)
    with torch.no_grad():
        noisy = model(ids).logits
    assert (noisy == IMPOSSIBLE).any(-1).sum() == sum(len(run) for run in find_forced(ids[0].tolist(), TAGS))


@torch.no_grad()
def test_embeddings_of_an_adapted_table_are_found_though_they_round_in_another_way():
    """An adapter's share of a vector depends on the shape of the batch. Here it is large, so all vectors are near."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, lora_alpha=64)
    model = get_peft_model(tiny_model("qwen2", dtype=torch.bfloat16), config).eval()
    ids = torch.tensor([written(NESTED).ids, written(NESTED).ids])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    shifted = embeds + embeds[0, 0] * 1e-4  # rounding, which is exaggerated
    assert (model(inputs_embeds=shifted.float().bfloat16()).logits == IMPOSSIBLE).any()
    assert model(inputs_embeds=embeds[:, :3]).logits.shape == (2, 3, 96)


@torch.no_grad()
def test_a_backbone_follows_the_layout_however_it_is_called_copied_and_wrapped():
    model, _ = pair()
    ids = torch.tensor([written(NESTED).ids])
    want = model.model(ids).last_hidden_state
    with plain_layout():
        assert not torch.equal(model.model(ids).last_hidden_state, want)
    copies = [copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model)), copy.deepcopy(model).get_decoder()]
    for backbone in (model.model, *copies):
        assert torch.equal(backbone.forward(ids)[0], want)
        assert torch.equal(backbone(input_ids=ids, return_dict=False)[0], want)
    config = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules="all-linear")
    assert torch.equal(get_peft_model(copies[0], config)(input_ids=ids).last_hidden_state, want)
    states = model.model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 1 + model.config.num_hidden_layers
    assert torch.equal(states[-1], want)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_replica_of_data_parallel_follows_the_layout(attn):
    def replicate(module):
        """As torch.nn.parallel.replicate does, which needs devices: weights are attributes, not parameters."""
        replica = module._replicate_for_data_parallel()
        for name, weight in module._parameters.items():
            setattr(replica, name, None if weight is None else weight.detach())
        replica._modules = {name: replicate(child) for name, child in module._modules.items()}
        return replica

    model = tiny_model("qwen2", attn)
    ids = torch.tensor([written(NESTED).ids])
    replica = replicate(model)
    assert not list(replica.parameters())
    assert torch.equal(replica(ids).logits, model(ids).logits)


# Forced tokens


def generated() -> tuple:
    """Answers of a random model with nested and chained blocks, their ids and mask, padded on the left."""
    model, _ = pair()
    # an end token inside a path becomes </Path>, which a log-probability counts: the plans have none
    plans = {(60,): CHAINED, (61, 62): WIDE}
    output = answer(model, [list(prompt) for prompt in plans], plans)
    ids, mask = left_pad(documents(output, [list(prompt) for prompt in plans]))
    return model, output, ids, mask


def test_the_stock_logprob_of_answers_is_that_of_the_tokens_the_model_chose():
    model, output, ids, mask = generated()
    with torch.no_grad(), exact_softmax():
        logprobs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    stock = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    width = output.sequences.shape[1] - len(output.logits)
    for row, stats in enumerate(output.stats):
        chosen = 0.0
        for column in range(width, width + stats.num_tokens):
            if output.sampled_mask[row, column]:
                logits = output.logits[column - width][row]
                chosen += logits.log_softmax(-1)[output.sequences[row, column]].item()
        assert stock[row, -stats.num_tokens :].sum().item() == pytest.approx(chosen, abs=1e-6)
        assert not output.sampled_mask[row].all()


def test_labels_are_ignored_at_forced_tokens_in_the_models_own_loss():
    model, _, ids, mask = generated()
    labels = labels_for(ids, model, mask)
    assert (labels == labels_for(ids, TAGS, mask)).all()
    assert ((labels == IGNORE) | (labels == ids)).all()
    assert (labels[mask == 0] == IGNORE).all()
    chosen = labels[:, 1:] != IGNORE
    with torch.no_grad():
        raw = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE))
        assert raw.loss == model(ids, attention_mask=mask, labels=labels).loss
        logits = raw.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        assert raw.loss.item() == pytest.approx(-logits[chosen].mean().item(), rel=1e-5)
        next_labels = torch.nn.functional.pad(ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORE), (0, 1), value=IGNORE)
        shifted = model(ids, attention_mask=mask, labels=ids, shift_labels=next_labels)
        assert shifted.loss.item() == pytest.approx(raw.loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_computed_of_forced_tokens_is_ever_nan(dtype):
    model = tiny_model("qwen2", dtype=dtype)
    ids = torch.tensor([written(NESTED).ids])
    logits = model(ids).logits
    for temperature in (0.1, 1.0, 2.0):
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        divergence = torch.nn.functional.kl_div(logprobs, logprobs, log_target=True, reduction="none")
        chosen = logprobs[:, :-1].gather(-1, ids[:, 1:, None])
        for value in (logprobs, entropy, divergence):
            assert value.isfinite().all()
        forced = [at - 1 for run in find_forced(ids[0].tolist(), TAGS) for at in run]
        assert (chosen[0, forced] == 0).all()
        assert (entropy[0, forced] == 0).all()
    chosen.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_networks_own_logits_are_there_for_who_asks():
    model, base = pair()
    oracle = written(TWO)
    ids, places = torch.tensor([oracle.ids]), range(len(oracle.ids))
    mask = torch.tensor([[oracle.sees(q, k) for k in places] for q in places])[None, None]
    positions = torch.tensor([oracle.positions])
    model = copy.deepcopy(model)
    model.raw_forced_logits = True
    with torch.no_grad(), exact_softmax():
        assert close(model(ids).logits, base(ids, position_ids=positions, attention_mask=mask).logits)


@pytest.mark.parametrize("keep", [1, 7, torch.tensor([2, 12, 13])])
def test_kept_logits_are_those_of_the_whole(keep):
    model, _ = pair()
    ids = torch.tensor([written(TWO).ids, written((1, Block(((3,), (2,))), 1)).ids])
    columns = torch.arange(ids.shape[1])[-keep:] if isinstance(keep, int) else keep
    with torch.no_grad():
        kept = model(ids, logits_to_keep=keep)
        assert close(kept.logits, model(ids).logits[:, columns])
        assert torch.equal(model(ids, logits_to_keep=keep, return_dict=False)[0], kept.logits)


# Adapters that bring embeddings or keys of their own


def test_prompt_tuning_is_laid_out_behind_its_virtual_tokens():
    base = tiny_model("qwen2")
    torch.manual_seed(0)
    tuned = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval().double()
    oracle = Oracle(TAGS)
    oracle.tokens([60] * 3, 0, {})  # they stand for the virtual tokens
    oracle.document((1, *NESTED), 3, {})
    ids, places = torch.tensor([oracle.ids]), range(len(oracle.ids))
    mask = torch.tensor([[oracle.sees(q, k) for k in places] for q in places])[None, None]
    embeds = base.get_input_embeddings()(ids)
    embeds[:, :3] = tuned.get_prompt(1)
    with torch.no_grad(), exact_softmax():
        theirs = base(inputs_embeds=embeds, attention_mask=mask, position_ids=torch.tensor([oracle.positions])).logits
        ours = tuned(input_ids=ids[:, 3:], attention_mask=torch.ones_like(ids[:, 3:])).logits
    chosen = [at for at in places if not any(at + 1 in run for run in find_forced(oracle.ids, TAGS))]
    assert close(ours[0, chosen], theirs[0, chosen])


def test_prefix_tuning_is_refused_by_name_where_a_block_is_read():
    tuned = get_peft_model(tiny_model("qwen2"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned = tuned.eval().double()
    text = torch.tensor([[60, 61, 62]])
    assert tuned(input_ids=text, attention_mask=torch.ones_like(text)).logits.shape[:2] == (1, 3)
    ids = torch.tensor([written(TWO).ids])
    with pytest.raises(ValueError, match="Prefix tuning"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_lora_sees_the_layout_and_its_labels():
    base = tiny_model("qwen2")
    ids = torch.tensor([written(NESTED).ids])
    with torch.no_grad():
        theirs = base(ids, labels=ids)
        ours = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))(ids, labels=ids)
    assert close(ours.logits, theirs.logits)
    assert ours.loss == theirs.loss


# The state a trainer leaves a model in


@pytest.mark.slow
def test_answers_while_training_are_those_of_evaluation():
    settings = {"attention_dropout": 0.5}
    model = tiny_model("qwen2", **settings)
    want = answer(model, PROMPTS, FORCED).sequences
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
        model.gradient_checkpointing_enable()
    )
    model.train()
    assert torch.equal(answer(model, PROMPTS, FORCED).sequences, want)
    assert all(module.training for module in model.modules())
    with MultiverseEngine(model, None, max_cache_tokens=2048) as engine:
        result = engine.submit([50, 51, 52], max_new_tokens=20, structure="off").result()
    assert (
        result.ids
        == model.eval().generate(torch.tensor([[50, 51, 52]]), max_new_tokens=20, structure="off")[0, 3:].tolist()
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_reads_and_writes_as_on_its_device(how, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model = tiny_model("qwen2")
    ids = torch.tensor([written(NESTED).ids])
    with torch.no_grad():
        logits, want = model(ids).logits, answer(model, PROMPTS, FORCED).sequences
        device = torch.device("cpu")
        if how == "cpu":
            cpu_offload(model, execution_device=device)
        else:
            disk_offload(model, tmp_path, execution_device=device)
        assert next(model.parameters()).device.type == "meta"
        assert model.device == device
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(answer(model, PROMPTS, FORCED).sequences, want)


@pytest.mark.slow
def test_a_compiled_forward_is_left_out_of_the_engines_steps(monkeypatch):
    model = tiny_model("qwen2")
    want = answer(model, PROMPTS, FORCED).sequences
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(answer(model, PROMPTS, FORCED).sequences, want)
    assert not compiled
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_one_graph_follows_the_layout(name, attn):
    model = tiny_model(name, attn, torch.float32)
    text = torch.tensor([[60, 61, 62, NEWLINE, 63]])
    with torch.no_grad():
        for ids in (*(torch.tensor([written(tree).ids]) for tree in (TWO, NESTED)), text):
            theirs = model(ids, labels=ids)
            for call in ({}, {"attention_mask": torch.ones_like(ids)}, {"use_cache": False}):
                torch._dynamo.reset()  # torch stops after eight graphs of one function
                whole = torch.compile(model, fullgraph=True, backend="aot_eager")
                ours = whole(ids, labels=ids, **call)
                torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(ours.loss, theirs.loss)
        torch._dynamo.reset()
        assert torch.allclose(whole(text).logits, model(text).logits, atol=1e-4)
        cache = whole(torch.tensor([written(TWO).ids])).past_key_values
        with pytest.raises(ValueError, match="parallel paths cannot go on"):
            whole(torch.tensor([[60]]), past_key_values=cache)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_follows_the_layout(strict):
    model = tiny_model("qwen2", dtype=torch.float32)
    ids, other = (torch.tensor([written(tree).ids]) for tree in (TWO, (1, Block(((4,), (1,))), 1)))
    assert ids.shape == other.shape
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=strict)
        for each in (ids, other, torch.full_like(ids, 60)):
            ours = program.module()(each, use_cache=False).logits
            torch.testing.assert_close(ours, model(each, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
