"""PEFT as its users call it: adapters of every kind made, saved, loaded in each way there is, and merged."""

import os

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt, labels_for
from multiverse_hf.modeling.integrations import multiverse_model
from multiverse_hf.modeling.labels import IGNORE
from multiverse_hf.training.merging import merge_adapter

DOCUMENT = (
    "<Parallel>\n<Goal><Outline>1: A</Outline><Outline>2: B</Outline></Goal>\n<Path>\n1: 5+6=11\n</Path>\n"
    "<Path>\n2: 7+8=15\n</Path>\n<Conclusion>\n"
)
LINEAR, CAUSAL = {"target_modules": ["q_proj", "v_proj"]}, {"task_type": "CAUSAL_LM"}
LORA = {"r": 4, "init_lora_weights": False} | LINEAR
KINDS = {
    "lora": LoraConfig(**LORA, **CAUSAL),
    "no task type": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True, **CAUSAL),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        **CAUSAL,
    ),
}
RARER = {
    "rslora": LoraConfig(**LORA, use_rslora=True, **CAUSAL),
    "trained tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6], **CAUSAL),
    "saved head": LoraConfig(**LORA, modules_to_save=["lm_head"], **CAUSAL),
    "loha": LoHaConfig(r=4, init_weights=False, **LINEAR, **CAUSAL),
    "lokr": LoKrConfig(r=4, init_weights=False, **LINEAR, **CAUSAL),
    "adalora": AdaLoraConfig(total_step=10, **LORA, **CAUSAL),
    "oft": OFTConfig(r=0, oft_block_size=4, init_weights=False, **LINEAR, **CAUSAL),
    "boft": BOFTConfig(boft_block_size=4, init_weights=False, **LINEAR, **CAUSAL),
    "hra": HRAConfig(r=4, init_weights=False, **LINEAR, **CAUSAL),
    "norms": LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL),
    "vera": VeraConfig(r=4, init_weights=False, **LINEAR, **CAUSAL),
}
ALL = KINDS | RARER
NAMES = [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in RARER)]


@pytest.fixture(scope="module")
def ids():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    prompt = encode_prompt(tokenizer, "A=5+6; B=7+8; total?")
    return torch.tensor([prompt + tokenizer.encode(DOCUMENT, add_special_tokens=False)])


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    multiverse_model(model).raw_forced_logits = True
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", NAMES)
def test_an_adapter_gives_the_same_logits_however_it_is_loaded_and_merged(kind, ids, tmp_path):
    torch.manual_seed(0)
    base = MultiverseForCausalLM.from_pretrained(embedded_model())
    before = logits(base, ids)
    adapted = get_peft_model(base, ALL[kind])
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "ranknum" not in name:
            weight.data += 0.02 * torch.randn_like(weight)
    expected = logits(adapted, ids)
    assert (expected - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    assert not os.path.exists(tmp_path / "tokenizer_config.json"), "the folder is PEFT's own"

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert multiverse_model(loaded) is not None
    assert torch.equal(logits(loaded, ids), expected)
    again = PeftModel.from_pretrained(MultiverseForCausalLM.from_pretrained(embedded_model()), tmp_path)
    assert torch.equal(logits(again, ids), expected)
    if kind == "vera":
        with pytest.raises(ValueError, match=r"cannot load by itself .* use peft.AutoPeftModelForCausalLM"):
            MultiverseForCausalLM.from_pretrained(tmp_path)
    else:
        assert torch.equal(logits(MultiverseForCausalLM.from_pretrained(tmp_path), ids), expected)
    merged, tokenizer = merge_adapter(tmp_path)
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-3, rtol=1e-3)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(embedded_model()).get_vocab()


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_a_loss_leaves_out_forced_tokens_even_where_forward_is_called_by_name(kind, ids):
    adapted = get_peft_model(MultiverseForCausalLM.from_pretrained(embedded_model()), ALL[kind]).eval()
    whole, chosen = (adapted(ids, labels=labels).loss for labels in (ids, labels_for(ids, multiverse_model(adapted))))
    orth = adapted.base_model.model(ids, labels=ids).loss
    assert abs(whole - chosen) < 1e-6
    assert abs(orth - multiverse_model(adapted).forward(ids, labels=ids).loss) < 1e-6
    logprobs = adapted(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert (logprobs[labels_for(ids, multiverse_model(adapted))[0, 1:] == IGNORE] == 0).any()


def test_weights_that_an_adapter_lacks_are_told_also_of_dora(tmp_path):
    from safetensors.torch import load_file, save_file

    get_peft_model(MultiverseForCausalLM.from_pretrained(embedded_model()), ALL["dora"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "0.self_attn.v_proj.lora_mag" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.0\.self_attn\.v_proj\.lora_magnitude_vector"):
        MultiverseForCausalLM.from_pretrained(tmp_path)


def test_a_base_that_is_no_multiverse_checkpoint_stays_plain_in_auto_peft(tmp_path):
    from helpers import tiny_config

    AutoModelForCausalLM.from_config(tiny_config("qwen3")).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(plain, ALL["lora"]).save_pretrained(tmp_path / "adapter")
    assert multiverse_model(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")) is None
    with pytest.raises(ValueError, match=r"adapter holds no tokenizer, and that of its base .*base lacks <Think>"):
        merge_adapter(tmp_path / "adapter")


def test_an_adapter_whose_training_added_the_tags_makes_its_base_a_multiverse_model(tmp_path):
    from test_training import load_base, save_base, trainable_tokens

    base = load_base(save_base(tmp_path / "base", "qwen3", tie_word_embeddings=False), dtype="float32")
    tokens = trainable_tokens(base.model, base.new_ids)
    adapted = get_peft_model(base.model, LoraConfig(**LORA, trainable_token_indices=tokens, **CAUSAL))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert multiverse_model(loaded).tags == base.tags
    ids = base.tokenizer.encode("Where?" + DOCUMENT, add_special_tokens=False, return_tensors="pt")
    known = slice(len(base.tokenizer))  # beyond are rows that make the embeddings' size round
    torch.testing.assert_close(logits(loaded, ids)[..., known], logits(adapted, ids)[..., known])


def test_an_adapter_of_the_prompt_is_refused_by_merge_and_from_pretrained(tmp_path):
    adapted = get_peft_model(
        MultiverseForCausalLM.from_pretrained(embedded_model()), PromptTuningConfig(num_virtual_tokens=4, **CAUSAL)
    )
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, which adds to the prompt and nothing to the weights"):
        merge_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"use peft.AutoPeftModelForCausalLM"):
        MultiverseForCausalLM.from_pretrained(tmp_path)
    assert multiverse_model(AutoPeftModelForCausalLM.from_pretrained(tmp_path)) is not None


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=4, **CAUSAL), PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL)],
    ids=["prompt", "prefix"],
)
def test_a_tuned_prompt_generates_with_structure_off_as_the_base_class_does_and_is_refused_with_branches(config):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    prompt = encode_prompt(tokenizer, "A=5+6; B=7+8; total?", return_tensors="pt")
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    answers = []
    for load in (AutoModelForCausalLM, MultiverseForCausalLM):
        torch.manual_seed(0)
        model = get_peft_model(load.from_pretrained(embedded_model()), config).eval()
        torch.nn.init.normal_(next(model.prompt_encoder.parameters()), 0, 10.0)
        if load is MultiverseForCausalLM:
            with pytest.raises(ValueError, match=r"_TUNING brings vectors .* structure='off', or train LoRA"):
                model.generate(**asked)
            asked["structure"] = "off"
        answers.append(model.generate(**asked).tolist())
    assert answers[0] == answers[1]
    untuned = model.get_base_model().generate(**asked).tolist()
    assert untuned != answers[1], "the prompt says something"


@torch.no_grad()
def test_a_tuned_prompt_is_read_as_the_tokens_whose_embeddings_it_holds(ids):
    adapted = get_peft_model(
        MultiverseForCausalLM.from_pretrained(embedded_model()), PromptTuningConfig(num_virtual_tokens=3, **CAUSAL)
    ).eval()
    model = adapted.get_base_model()
    begin = torch.tensor([[300, 301, 302]])
    adapted.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(begin)[0])
    expected = model(torch.cat([begin, ids], 1)).logits[:, 3:]
    assert torch.allclose(
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 3:], expected, atol=1e-5
    )


def test_a_base_without_tags_and_an_adapter_without_tokenizer_are_told_what_is_missing(tmp_path):
    from helpers import tiny_config
    from test_tags import plain_tokenizer

    tokenizer = plain_tokenizer()
    config = tiny_config("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(plain, ALL["lora"]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"adapter holds no tokenizer, and that of its base .*base lacks <Think>; copy"
    ):
        merge_adapter(tmp_path / "adapter")
