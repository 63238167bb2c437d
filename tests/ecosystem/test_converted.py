"""Folders that other tools wrote from a Multiverse checkpoint: they load, and a line says what is lost."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt

PROMPT = "A=9+7; B=8+5; total? Think step by step and in parallel before answering."


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "saved"
    MultiverseForCausalLM.from_pretrained(embedded_model()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    return folder


def answer(model) -> list[int]:
    ids = encode_prompt(AutoTokenizer.from_pretrained(embedded_model()), PROMPT, return_tensors="pt")
    return model.generate(ids, max_new_tokens=100)[0].tolist()


def test_a_folder_as_mergekit_writes_it_loads_without_the_code_and_is_exported_with_it(
    saved, tmp_path, caplog, unquiet
):
    """mergekit saves config, weights and tokenizer; neither the code nor the generation config."""
    from multiverse_hf.cli import run

    merged = tmp_path / "merged"
    AutoConfig.from_pretrained(saved).save_pretrained(merged)
    (merged / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    AutoTokenizer.from_pretrained(saved).save_pretrained(merged)
    model = MultiverseForCausalLM.from_pretrained(merged)
    assert "configuration_multiverse.py, which is not there" in caplog.text
    assert answer(model) == answer(MultiverseForCausalLM.from_pretrained(saved))
    assert run(["export", "--model", str(merged), "--output", str(tmp_path / "exported")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert answer(again) == answer(model)


@pytest.mark.slow
def test_a_gguf_file_loads_with_the_tags_of_the_tokenizer_in_it(saved, tmp_path, caplog, unquiet):
    pytest.importorskip("gguf")
    from gguf_writer import write_gguf

    tokenizer, plain = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    write_gguf(plain, tokenizer, tmp_path / "tiny.gguf")
    with pytest.raises(OSError, match=r"no config\.json but a GGUF file; pass gguf_file='tiny\.gguf'"):
        MultiverseForCausalLM.from_pretrained(tmp_path)
    # transformers reads no width of heads from such a file: it goes to the config
    model = MultiverseForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", head_dim=32)
    assert "the config holds no control tags; they are those of the tokenizer" in caplog.text
    expected = MultiverseForCausalLM.from_pretrained(saved)
    assert model.tags == expected.tags
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert answer(model) == answer(expected)
