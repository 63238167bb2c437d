"""Weights of fewer bits by torchao and bitsandbytes on a CPU, as their users ask for them."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt

pytestmark = pytest.mark.slow
ASKED = "A=5+6; B=7+8; total? Think step by step and in parallel before answering."
TEXT = "A=5+6; B=7+8; total? 5+6: 5+0+6=5+6=11"


def check(model, plain, tokenizer, tolerance: float) -> None:
    """Check that a model branches, that one forward gives what it chose from, and that text has the base's logits.

    Args:
        tolerance: of logits, where a kernel rounds by the shape of its input.
    """
    text = tokenizer(TEXT, return_tensors="pt").input_ids
    prompt = encode_prompt(tokenizer, ASKED, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(text).logits, plain(text).logits)
        written = model.generate(prompt, max_new_tokens=300, return_dict_in_generate=True, output_logits=True)
        assert written.stats[0].num_forks == 1
        chosen = written.sampled_mask[0][prompt.shape[1] :]
        again = model(written.sequences[:, :-1]).logits[0, prompt.shape[1] - 1 :]
        causal = plain(written.sequences[:, :-1]).logits[0, prompt.shape[1] - 1 :]
    logits = torch.stack(written.logits)[:, 0]
    assert (again - logits)[chosen].abs().max() < tolerance
    assert (causal - logits)[chosen].abs().max() > 2, "the layout was followed"


def torchao_configs() -> list:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig

    return [
        Int8WeightOnlyConfig(),
        IntxWeightOnlyConfig(weight_dtype=torch.int4),
        Int8DynamicActivationInt8WeightConfig(),
    ]


@pytest.mark.parametrize("number", range(3), ids=["int8", "int4", "int8 activations"])
def test_torchao_quantizes_a_model_in_place(model, plain, tokenizer, number):
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    ours, theirs = copy.deepcopy(model), copy.deepcopy(plain)
    for each in (ours, theirs):
        quantize_(each, torchao_configs()[number])
    check(ours, theirs, tokenizer, 1e-3 if number < 2 else 0.5)


BITS = {"8 bits": {"load_in_8bit": True}, "4 bits": {"load_in_4bit": True}}


@pytest.mark.parametrize("kind", ["class", "remote code"])
@pytest.mark.parametrize("bits", [*BITS, "torchao"])
def test_a_quantization_config_loads_a_model_that_branches(folder, tokenizer, kind, bits):
    if bits == "torchao":
        pytest.importorskip("torchao")
        from transformers import TorchAoConfig

        config = TorchAoConfig(torchao_configs()[0])
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(**BITS[bits])
    options = {"quantization_config": config, "device_map": "cpu"}
    theirs = AutoModelForCausalLM.from_pretrained(embedded_model(), **options)
    if kind == "class":
        ours = MultiverseForCausalLM.from_pretrained(embedded_model(), **options)
    else:
        ours = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    check(ours, theirs, tokenizer, 1e-3 if bits == "torchao" else 0.5)
