"""Bases of any kind made ready: tags, their embeddings, LoRA on tied and untied heads, merged again."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import tiny_config
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_tags import plain_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, encode_prompt
from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.records import Form, read_record
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.modeling.tags import NPR, TagSet
from multiverse_hf.training.merging import merge_adapter, write_adapter_card
from multiverse_hf.training.models import default_attention, load_base, load_tokens, tag_phrases, trainable_tokens

BLOCK = (
    "<Parallel>\n<Goal>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Goal>\n<Path>\n1: left\n</Path>\n"
    "<Path>\n2: right\n</Path>\n<Conclusion>\nboth\n</Conclusion>\n</Parallel>"
)


def save_base(folder, name: str, vocab_size: int | None = None, **config) -> str:
    """A random base model without tags or chat template, as a plain checkpoint."""
    tokenizer = plain_tokenizer()
    settings = tiny_config(name)
    settings.vocab_size = vocab_size or len(tokenizer)
    settings.pad_token_id, settings.eos_token_id = None, tokenizer.eos_token_id
    for key, value in config.items():
        setattr(settings, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_tags_begin_as_the_words_they_name_and_all_differ(tmp_path, name, tied):
    path = save_base(tmp_path / "base", name, tie_word_embeddings=tied)
    base = load_base(path, dtype="float32")
    assert sorted(base.new_ids) == sorted(base.tags.control_ids)
    before = AutoModelForCausalLM.from_pretrained(path)
    for ours, theirs in (
        (base.model.get_input_embeddings(), before.get_input_embeddings()),
        (base.model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert ours.weight.shape[0] % 64 == 0
        assert torch.equal(ours.weight[: len(theirs.weight)], theirs.weight)
        rows = ours.weight[base.tags.control_ids]
        for tag, phrase in tag_phrases(base.tags.names).items():
            words = base.tokenizer.encode(phrase, add_special_tokens=False)
            torch.testing.assert_close(ours.weight[base.tags.ids[tag]], theirs.weight[words].mean(0))
        assert torch.cdist(rows, rows).fill_diagonal_(math.inf).min() > 1e-4
    same = base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    assert same == tied
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = MultiverseForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.tags == base.tags
    assert loaded.config.eos_token_id == base.tokenizer.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert "User:\nhi" in tokenizer.decode(encode_prompt(tokenizer, "hi"))


def test_embeddings_with_room_keep_their_size_and_a_tagged_base_keeps_its_rows(tmp_path):
    path = save_base(tmp_path / "roomy", "qwen2", vocab_size=400)
    base = load_base(path, dtype="float32")
    assert base.model.config.vocab_size == 400
    assert base.model.get_input_embeddings().weight.shape[0] == 400
    base.model.save_pretrained(tmp_path / "tagged")
    base.tokenizer.save_pretrained(tmp_path / "tagged")
    again = load_base(str(tmp_path / "tagged"), dtype="float32")
    assert again.new_ids == []
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, base.model.state_dict()[name]), name


@pytest.mark.parametrize("written", [None, "# Model Card for Model ID", "Mine."], ids=["none", "empty", "own"])
def test_an_adapter_has_a_card_that_names_its_base_and_how_to_merge_it(tmp_path, written):
    path = save_base(tmp_path / "base", "llama")
    model = get_peft_model(load_base(path, dtype="float32").model, LoraConfig(r=3, target_modules="all-linear"))
    if written:
        (tmp_path / "README.md").write_text(written)
    write_adapter_card(tmp_path, model)
    text = (tmp_path / "README.md").read_text()
    if written == "Mine.":
        assert text == written
        return
    assert "An adapter (LORA, rank 3) of `base`" in text
    assert "multiverse merge --adapter" in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model is None
    model.active_peft_config.base_model_name_or_path = "Qwen/Qwen2.5-7B"
    (tmp_path / "README.md").unlink()
    write_adapter_card(tmp_path, model)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "Qwen/Qwen2.5-7B"


ZERO3 = """
import sys
import deepspeed
import torch
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from multiverse_hf.training.models import load_base

torch.distributed.init_process_group("gloo")
keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
base = load_base(sys.argv[1], dtype="float32")
layers = [base.model.get_input_embeddings(), base.model.get_output_embeddings()]
was_parted = hasattr(layers[0].weight, "ds_shape")
with deepspeed.zero.GatheredParameters([layer.weight for layer in layers]):
    weights = [layer.weight.detach().clone() for layer in layers]
if torch.distributed.get_rank() == 0:
    torch.save((torch.distributed.get_world_size(), was_parted, weights), sys.argv[2])
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.parametrize("vocab_size", [None, 400], ids=["enlarged", "roomy"])
def test_embeddings_parted_by_deepspeed_zero3_become_what_they_become_whole(tmp_path, vocab_size):
    pytest.importorskip("deepspeed", reason="needs pip install deepspeed")
    path = save_base(tmp_path / "base", "qwen2", vocab_size=vocab_size, tie_word_embeddings=False)
    (tmp_path / "zero3.py").write_text(ZERO3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "zero3.py"), path, str(tmp_path / "weights.pt")]
    done = subprocess.run(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    processes, was_parted, weights = torch.load(tmp_path / "weights.pt")
    assert processes == 2
    assert was_parted == (vocab_size is not None)  # DeepSpeed parts those that were enlarged when the training begins
    whole = load_base(path, dtype="float32")
    before = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().num_embeddings
    rows = [*range(before), *whole.new_ids]  # what else is added is random
    layers = whole.model.get_input_embeddings(), whole.model.get_output_embeddings()
    for ours, layer in zip(weights, layers, strict=True):
        assert ours.shape == layer.weight.shape
        torch.testing.assert_close(ours[rows], layer.weight[rows])


@pytest.mark.parametrize("keeps_apart", [True, False])
@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_attention_by_default_is_never_one_that_takes_a_mask_of_all_pairs(device, keeps_apart):
    chosen = default_attention(device, keeps_apart)
    assert chosen == ("multiverse_sdpa" if device != "cuda" else "flex_attention" if keeps_apart else "sdpa")


def test_another_family_of_tags_is_added_by_its_name(tmp_path):
    path = save_base(tmp_path / "base", "llama")
    base = load_base(path, tokens=load_tokens(path, names="npr"))
    assert base.tags.names == NPR
    assert TagSet.from_tokenizer(base.tokenizer).names == NPR
    with pytest.raises(ValueError, match="choose one of multiverse, npr"):
        load_tokens(path, names="nope")


def test_what_training_needs_of_a_tokenizer_is_asked_for(tmp_path):
    path = save_base(tmp_path / "base", "llama")
    with pytest.raises(ValueError, match="'<stop>' is no token"):
        load_tokens(path, eos_token="<stop>")
    settings = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(ValueError, match="no end token"):
        load_base(path)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    base = load_tokens(path, eos_token="<end>", chat_template=template)
    assert base.tokenizer.decode(encode_prompt(base.tokenizer, "hi")) == "[hi]"


def step(model, batch, lr: float = 0.5) -> None:
    """One plain gradient step, through the fused loss that TRL's trainer uses."""
    model.train()
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_trains_the_tags_where_they_are_read_and_written_and_merges_exactly(tmp_path, tied):
    path = save_base(tmp_path / "base", "qwen3", tie_word_embeddings=tied)
    base = load_base(path, dtype="float32")
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        trainable_token_indices=trainable_tokens(base.model, base.new_ids),
    )
    plain = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    model = get_peft_model(base.model, config)
    row = RowEncoder(base.tokenizer, base.tags).encode(
        read_record({"prompt": "Where?", "document": BLOCK}), Form.PARALLEL
    )
    batch = DocumentCollator(base.tags, base.tokenizer.pad_token_id)([row])
    batch.pop("kinds")
    ids_read = row["input_ids"]
    for _ in range(3):
        step(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 200_000

    merged, tokenizer = merge_adapter(tmp_path / "adapter", dtype="float32")
    head = merged.get_output_embeddings().weight
    embedded = merged.get_input_embeddings().weight
    assert (head is embedded) == tied
    for weight, name in ((embedded, "model.embed_tokens.weight"), (head, "lm_head.weight")):
        changed = (weight - plain.get(name, plain["model.embed_tokens.weight"])).abs().sum(1) > 0
        rows = set(changed[: len(tokenizer)].nonzero().flatten().tolist())
        # each is written against all others; read are those that the document has
        assert rows == (set(base.new_ids) if tied or name == "lm_head.weight" else set(base.new_ids) & set(ids_read))
    model.eval(), merged.eval()
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    again = MultiverseForCausalLM.from_pretrained(tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = encode_prompt(tokenizer, "Where?", return_tensors="pt")
    assert again.generate(ids, max_new_tokens=30).tolist() == merged.generate(ids, max_new_tokens=30).tolist()


def test_an_adapter_that_is_not_whole_is_refused(tmp_path):
    path = save_base(tmp_path / "base", "llama")
    base = load_base(path, dtype="float32")
    get_peft_model(base.model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if "layers.1" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks \d+ weights .*layers\.1"):
        merge_adapter(tmp_path / "adapter")
    save_file(weights, file)
    with pytest.raises(ValueError, match="name it with --base"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "gone"))
    (tmp_path / "adapter/run.json").write_text(json.dumps({"model": {"model_type": "qwen3"}}))
    with pytest.raises(ValueError, match=r"trained on a qwen3, and .* is a llama"):
        merge_adapter(tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        merge_adapter(tmp_path)
