"""Folders that other tools wrote from a Multiverse checkpoint: they load, and a line says what is lost."""

import json
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


def write_gguf(folder: Path, file: Path) -> None:
    """Write weights, sizes and vocabulary as llama.cpp's convert_hf_to_gguf does, which knows no other keys."""
    import gguf

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    config, added = model.config, tokenizer.added_tokens_decoder
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = [
        gguf.TokenType.NORMAL
        if number not in added
        else gguf.TokenType.CONTROL
        if added[number].special
        else gguf.TokenType.USER_DEFINED
        for _, number in vocab
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(kinds)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_loads_with_the_tags_of_the_tokenizer_in_it(saved, tmp_path, caplog):
    pytest.importorskip("gguf")
    write_gguf(saved, tmp_path / "tiny.gguf")
    with pytest.raises(OSError, match=r"no config\.json but a GGUF file; pass gguf_file='tiny\.gguf'"):
        MultiverseForCausalLM.from_pretrained(tmp_path)
    # transformers reads no width of heads from such a file: it goes to the config
    model = MultiverseForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", head_dim=32)
    assert "the config holds no control tags; they are those of the tokenizer" in caplog.text
    expected = MultiverseForCausalLM.from_pretrained(saved)
    assert model.tags == expected.tags
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert answer(model) == answer(expected)
