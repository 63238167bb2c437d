"""The checkpoint: what is saved, what loads, and what is refused."""

import copy
import functools
import io
import json
import pickle

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    COLON,
    DIGITS,
    PAD,
    TAGS,
    Forced,
    answer,
    documents,
    left_pad,
    tiny_config,
)
from helpers import tiny_model as new_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_tags import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from multiverse_hf.modeling.layout import plain_layout
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM, base_class, multiverse_class
from multiverse_hf.modeling.tags import NPR, TagSet

PROMPT = [50, 51, 52]
NESTED = (2, Forced(((4, Forced(((2,), (3,))), 1), (6,), (0,))), 2)


@functools.cache
def a_document() -> torch.Tensor:
    """Ids of a document with nested blocks."""
    model = new_tiny_model("qwen3", dtype=torch.float32)
    return torch.tensor([documents(answer(model, [PROMPT], {tuple(PROMPT): NESTED}), [PROMPT])[0]])


# Saved and loaded


def test_a_saved_checkpoint_is_one_of_its_base_architecture_and_loads_back(tmp_path):
    model, ids = new_tiny_model("qwen3", dtype=torch.float32), a_document()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    again = MultiverseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.tags == model.tags
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again(ids).logits, logits)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert type(base).__module__.startswith("transformers.")
        assert torch.equal(base(ids[:, :4]).logits, model(ids[:, :4]).logits)
        assert not torch.allclose(base(ids).logits, logits), "the plain model does not know of paths"
    assert torch.equal(type(model).from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads_back_with_no_weight_missing(name, tmp_path):
    model, ids = new_tiny_model(name, dtype=torch.float32), a_document()
    model.save_pretrained(tmp_path)
    again = MultiverseForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


# The class


def test_a_model_is_a_multiverse_model_and_one_of_its_base_and_bears_the_bases_name():
    model = new_tiny_model("qwen3")
    assert isinstance(model, MultiverseForCausalLM)
    assert issubclass(type(model), MultiverseForCausalLM)
    assert isinstance(model, Qwen3ForCausalLM)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert type(model) is multiverse_class(Qwen3ForCausalLM) is not Qwen3ForCausalLM
    assert not isinstance(new_tiny_model("llama"), type(model))


def test_a_mixture_of_experts_runs_as_in_its_base_class_also_where_no_model_of_that_was_made_before(monkeypatch):
    config = tiny_config("qwen3_moe", experts_implementation=None)
    base = multiverse_class(base_class(config))._base_class
    monkeypatch.delattr(base, "_can_set_experts_implementation_cached_value", raising=False)  # what a model leaves
    model = MultiverseForCausalLM.from_config(config, TAGS)
    assert model.config._experts_implementation == base._from_config(config).config._experts_implementation
    assert model.config._experts_implementation == "grouped_mm"


def test_the_door_itself_is_not_made():
    with pytest.raises(OSError, match="from_pretrained"):
        MultiverseForCausalLM()


def test_a_config_without_tags_is_told_also_by_the_made_class():
    with pytest.raises(ValueError, match="not a tag set"):
        multiverse_class(Qwen3ForCausalLM)(tiny_config("qwen3"))


class Mine(multiverse_class(Qwen3ForCausalLM)):
    """Somebody's own subclass."""


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("own_class", [False, True])
def test_a_model_survives_being_copied_whole(how, own_class):
    model, ids = new_tiny_model("qwen3", dtype=torch.float32), a_document()
    if own_class:
        model.__class__ = Mine
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert twin.lm_head.weight is not model.lm_head.weight
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_a_models_state_goes_into_another_model():
    model, ids = new_tiny_model("qwen3", dtype=torch.float32), a_document()
    fresh = new_tiny_model("qwen3", dtype=torch.float32, seed=1)
    fresh.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert pickle.loads(pickle.dumps(model.tags)) == model.tags


# What is refused


@pytest.mark.parametrize("made", [False, True], ids=["door", "made class"])
def test_what_the_config_has_a_place_for_goes_there_as_in_transformers(made, tmp_path):
    new_tiny_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    door = multiverse_class(Qwen3ForCausalLM) if made else MultiverseForCausalLM
    overrides = {"use_cache": False, "attention_dropout": 0.25, "rms_norm_eps": 1e-3, "output_hidden_states": True}
    model = door.from_pretrained(
        pretrained_model_name_or_path=tmp_path, **overrides, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert {name: getattr(model.config, name) for name in overrides} == overrides
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert (model.config._attn_implementation, model.dtype) == ("eager", torch.bfloat16)
    with pytest.raises(TypeError, match="no_such_option"):
        door.from_pretrained(tmp_path, no_such_option=1)


def test_a_config_may_be_named_by_its_place_and_weights_be_handed_over(tmp_path):
    model = new_tiny_model("qwen3", dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "model")
    named = MultiverseForCausalLM.from_pretrained(tmp_path / "model", config=str(tmp_path / "config"), use_cache=False)
    assert not named.config.use_cache
    handed = MultiverseForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(handed.lm_head.weight, model.lm_head.weight)
    with pytest.raises(TypeError, match="got None"):
        MultiverseForCausalLM.from_pretrained(None, state_dict=model.state_dict())


def test_a_checkpoint_is_recognized_by_its_config_or_its_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    config = tiny_config("qwen3", vocab_size=len(tokenizer))
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "published")
    assert not MultiverseForCausalLM.recognizes(tmp_path / "published")
    tokenizer.save_pretrained(tmp_path / "published")
    assert MultiverseForCausalLM.recognizes(tmp_path / "published")
    config.vocab_size -= 1  # the last tag has no embedding
    config.save_pretrained(tmp_path / "published")
    assert not MultiverseForCausalLM.recognizes(tmp_path / "published")
    new_tiny_model("qwen3").save_pretrained(tmp_path / "saved")
    assert MultiverseForCausalLM.recognizes(tmp_path / "saved")
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert not MultiverseForCausalLM.recognizes(tmp_path / "gpt2")
    assert not MultiverseForCausalLM.recognizes(tmp_path / "gone")


def test_an_architecture_that_transformers_does_not_know_is_named(tmp_path):
    new_tiny_model("qwen3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen99"}))
    with pytest.raises(ValueError, match=r"model type `qwen99` .* upgrade transformers"):
        MultiverseForCausalLM.from_pretrained(tmp_path)


def test_a_made_class_takes_tags_as_the_door_does(tmp_path):
    plain = Qwen3ForCausalLM(tiny_config("qwen3"))
    plain.save_pretrained(tmp_path)
    made = multiverse_class(Qwen3ForCausalLM)
    with pytest.raises(ValueError, match="is not a tag set"):
        made.from_pretrained(tmp_path)
    model = made.from_pretrained(tmp_path, tags=TAGS)
    assert type(model) is made
    assert model.tags == TAGS
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)


def test_a_model_that_branches_already_is_adopted_as_it_is():
    model = new_tiny_model("qwen3")
    hooks = len(model.base_model._forward_pre_hooks)
    assert MultiverseForCausalLM.adopt(model) is model
    assert len(model.base_model._forward_pre_hooks) == hooks


def test_whatever_has_a_plain_backbone_is_adopted():
    """A backbone, a head for scores, and an adapter around a causal LM keep their classes and follow the layout."""
    ids = a_document()
    config = tiny_config("qwen3", num_labels=1)
    config.multiverse = TAGS.to_dict()
    heads = [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM]
    for head in heads:
        model = head.from_config(config).eval()
        name, twin = type(model).__name__, copy.deepcopy(model)
        if head is AutoModelForCausalLM:
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        assert MultiverseForCausalLM.adopt(model) is model
        assert MultiverseForCausalLM.adopt(model) is model, "once more changes nothing"
        inner = model.get_base_model() if head is AutoModelForCausalLM else model
        assert type(inner).__name__ == name
        assert isinstance(inner, type(twin))
        with torch.no_grad():
            theirs = twin.base_model(ids).last_hidden_state
            ours = inner.base_model(ids).last_hidden_state
            assert not torch.allclose(ours, theirs)
            with plain_layout():
                assert torch.equal(inner.base_model(ids).last_hidden_state, theirs)
                assert torch.equal(model(ids)[0], twin(ids)[0])
    del config.multiverse
    with pytest.raises(ValueError, match="tag"):
        MultiverseForCausalLM.adopt(AutoModel.from_config(config))


def test_what_a_tool_lost_on_its_way_is_said(tmp_path, caplog):
    """As tools that merge or convert write a folder: the config without the code, or without the tags."""
    tokenizer = tiny_tokenizer()
    tags = TagSet.from_tokenizer(tokenizer)
    config = tiny_config("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model = MultiverseForCausalLM.from_config(config, tags)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    MultiverseForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    for code in tmp_path.glob("*.py"):
        code.unlink()
    MultiverseForCausalLM.from_pretrained(tmp_path)
    assert "the config names configuration_multiverse.py, which is not there" in caplog.text
    caplog.clear()
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["multiverse"], stored["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert MultiverseForCausalLM.from_pretrained(tmp_path).tags == tags
    assert "the config holds no control tags; they are those of the tokenizer" in caplog.text


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "no-such/model", "a/b/c"])
def test_a_checkpoint_that_is_not_there_is_told_by_name_in_one_line(path):
    with pytest.raises(OSError, match=f"no checkpoint '{path}': there is no such folder") as info:
        MultiverseForCausalLM.from_pretrained(path)
    assert "\n" not in str(info.value)


def test_a_path_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="a folder or a repository id, got None"):
        MultiverseForCausalLM.from_pretrained(None)


def saved_with_tokenizer(folder, tags=None) -> PreTrainedTokenizerFast:
    """A checkpoint and the tokenizer beside it; by default its own tags."""
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(**(tiny_config("qwen3").to_dict() | {"vocab_size": len(tokenizer)}))
    model = MultiverseForCausalLM.from_config(config, tags or TagSet.from_tokenizer(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_tokenizer_with_other_ids_for_the_tags_than_the_config_is_told(tmp_path):
    tokenizer = saved_with_tokenizer(tmp_path, TAGS)
    tags = TagSet.from_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=rf"<Think> is token {tags.open('think')} of the tokenizer and 16 in config"):
        MultiverseForCausalLM.from_pretrained(tmp_path)
    assert MultiverseForCausalLM.from_pretrained(tmp_path, tags=tags).tags == tags


def test_a_family_that_is_not_the_checkpoints_is_told(tmp_path):
    saved_with_tokenizer(tmp_path)
    MultiverseForCausalLM.from_pretrained(tmp_path, family="multiverse")
    for family in ("npr", NPR):
        with pytest.raises(ValueError, match=r"the checkpoint's tags are <Think>, .* leave family out"):
            MultiverseForCausalLM.from_pretrained(tmp_path, family=family)


def test_missing_weights_are_refused_by_name_unless_the_caller_asks_for_the_report(tmp_path):
    new_tiny_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of Qwen3ForCausalLM, model.layers.1.mlp.up_proj.weight"):
        MultiverseForCausalLM.from_pretrained(tmp_path)
    model, info = MultiverseForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, MultiverseForCausalLM)
    assert len(info["missing_keys"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("mamba", "mamba2", "qwen3_next", "jamba", "bamba", "falcon_h1", "rwkv", "recurrent_gemma"),
        *("t5", "gpt2", "opt", "bloom", "mpt", "bert"),
    ],
)
def test_an_architecture_that_cannot_branch_is_refused_with_the_reason(name, tmp_path):
    config = AutoConfig.for_model(name)
    with pytest.raises(ValueError, match=r"recurrent state|layers; Multiverse|encoder-decoder|rotary") as from_config:
        MultiverseForCausalLM.from_config(config, TAGS)
    assert name in str(from_config.value)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"recurrent state|layers; Multiverse|encoder-decoder|rotary"):
        MultiverseForCausalLM.from_pretrained(tmp_path)


def test_a_rotary_architecture_that_is_set_to_alibi_is_refused():
    config = AutoConfig.for_model("falcon", alibi=True, num_hidden_layers=1, hidden_size=64, num_attention_heads=2)
    config.vocab_size = 96
    with pytest.raises(ValueError, match="rotary"):
        MultiverseForCausalLM.from_config(config, TAGS)


def test_a_config_without_tags_is_refused():
    with pytest.raises(ValueError, match="no tag set"):
        MultiverseForCausalLM.from_config(tiny_config("qwen3"))


def test_flash_attention_is_refused_for_a_document_with_paths():
    model = new_tiny_model("qwen2", dtype=torch.float32)
    (document,) = documents(answer(model, [PROMPT], {tuple(PROMPT): NESTED}), [PROMPT])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cannot mask sibling paths"):
        model(torch.tensor([document]))


def test_left_pad_and_digits_of_the_helpers_agree_with_the_tags():
    ids, mask = left_pad([[1], [2, 3]])
    assert ids.tolist() == [[PAD, 1], [2, 3]]
    assert mask.tolist() == [[0, 1], [1, 1]]
    assert TAGS.ordinal(12) == [DIGITS["1"], DIGITS["2"], COLON]
