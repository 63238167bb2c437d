"""A checkpoint on machines that do not have this package: the code it carries, and what it is without that code."""

import functools
import json
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURES, EVERY_ARCHITECTURE, TAGS, Forced, answer, documents, slow_unless, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, pipeline

from multiverse_hf import MultiverseEngine, MultiverseForCausalLM, TagSet, embedded_model
from multiverse_hf.modeling import remote_code

PROMPT = [50, 51, 52]
NESTED = (2, Forced(((4, Forced(((2,), (3,))), 1), (6,), (0,))), 2)
load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
trusted = functools.partial(load, trust_remote_code=True)


@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_a_checkpoint_loads_in_three_ways_with_equal_logits_and_branches_in_two(name, tmp_path):
    model = tiny_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    plans = {tuple(PROMPT): NESTED}
    written = documents(answer(model, [PROMPT], plans), [PROMPT])
    with_package, remote, plain = MultiverseForCausalLM.from_pretrained(tmp_path), trusted(tmp_path), load(tmp_path)
    assert type(remote).__module__.startswith("transformers_modules.")
    assert type(plain).__module__.startswith("transformers.")
    for loaded in (with_package, remote):
        loaded.eval()
        assert documents(answer(loaded, [PROMPT], plans), [PROMPT]) == written
    text, document = torch.tensor([[50, 51, 60, 61, 62]]), torch.tensor(written)
    with torch.no_grad():
        for loaded in (with_package, remote, plain):
            torch.testing.assert_close(loaded(text).logits, model(text).logits)
        torch.testing.assert_close(remote(document).logits, model(document).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(plain).__name__]
    assert config["auto_map"] == remote_code.AUTO_MAP


@pytest.mark.parametrize("name", slow_unless(["qwen2"], ARCHITECTURES))
def test_a_lora_adapter_loads_in_three_ways_beside_its_base_and_merged_into_it(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny_model(name, dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = MultiverseForCausalLM.from_pretrained(tmp_path / "base")
    # not the usual beginning, at which an adapter changes nothing
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    text, plans = torch.tensor([[50, 51, 60, 61, 62]]), {tuple(PROMPT): NESTED}
    with torch.no_grad():
        expected, before = adapted(text).logits, load(tmp_path / "base")(text).logits
        assert (expected - before).abs().max() > 1e-3
        written = documents(answer(adapted, [PROMPT], plans), [PROMPT])
        document = adapted(torch.tensor(written)).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        for folder in (tmp_path / "adapter", tmp_path / "merged"):
            with_package, remote, plain = MultiverseForCausalLM.from_pretrained(folder), trusted(folder), load(folder)
            for loaded in (with_package.eval(), remote.eval(), plain.eval()):
                torch.testing.assert_close(loaded(text).logits, expected, rtol=1e-4, atol=1e-5)
            for loaded in (with_package, remote):
                assert documents(answer(loaded, [PROMPT], plans), [PROMPT]) == written
                torch.testing.assert_close(loaded(torch.tensor(written)).logits, document, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """multiverse-tiny as a user saves it."""
    folder = tmp_path_factory.mktemp("saved")
    MultiverseForCausalLM.from_pretrained(embedded_model()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    return folder


CHAT = [{"role": "user", "content": "A=5+6; B=7+8; total? Think step by step and in parallel before answering."}]


def ask(model, **options) -> str:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=600, do_sample=False, **options)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_whatever_was_loaded_can_be_saved_and_loaded_again_with_its_code(saved, tmp_path):
    expected = ask(MultiverseForCausalLM.from_pretrained(saved))
    assert "Answer: 26" in expected
    assert expected.count("<Path>") == 2
    trusted(saved).save_pretrained(tmp_path / "again")
    assert ask(trusted(tmp_path / "again")) == expected
    generation = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert {name: generation[name] for name in remote_code.STRUCTURE} == {
        "structure": "guided",
        "max_depth": 4,
        "max_paths": 16,
    }


@pytest.mark.slow
def test_structure_options_that_a_checkpoint_states_are_followed_by_whoever_loads_it(saved, tmp_path, capfd, unquiet):
    from multiverse_hf.cli import run

    model = MultiverseForCausalLM.from_pretrained(saved)
    model.generation_config.structure, model.generation_config.max_paths = "off", 3
    model.save_pretrained(tmp_path / "off")
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path / "off")
    assert run(["export", "--model", str(tmp_path / "off"), "--output", str(tmp_path / "exported")]) == 0
    prompt = torch.tensor(
        [AutoTokenizer.from_pretrained(saved).apply_chat_template(CHAT, add_generation_prompt=True).input_ids]
    )
    for loaded in (MultiverseForCausalLM.from_pretrained(tmp_path / "off"), trusted(tmp_path / "exported")):
        assert (loaded.generation_config.structure, loaded.generation_config.max_paths) == ("off", 3)
        output = loaded.generate(prompt, max_new_tokens=200, return_dict_in_generate=True)
        assert output.stats[0].num_forks == 0
    model.generation_config.structure = "of"
    with pytest.raises(ValueError, match="structure must be 'guided', 'lenient' or 'off', got 'of'"):
        model.save_pretrained(tmp_path / "bogus")


def test_from_config_gives_a_model_that_branches(saved):
    config = AutoConfig.from_pretrained(saved)
    for auto, kind in ((AutoModelForCausalLM, "MultiverseForCausalLM"), (AutoModel, "Qwen3Model")):
        made = auto.from_config(config, trust_remote_code=True, dtype=torch.float32)
        assert kind in {each.__name__ for each in type(made).__mro__}
    branching = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert branching.generate(torch.tensor([[30, 31]]), max_new_tokens=20).shape[1] <= 22


@pytest.mark.slow
def test_a_loader_that_takes_the_class_from_architectures_branches_by_custom_generate(saved):
    expected = ask(MultiverseForCausalLM.from_pretrained(saved))
    model = Qwen3ForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert ask(model) == expected
    assert ask(model) == expected
    ids = torch.tensor([[30, 31]])
    assert torch.equal(model.generate(ids, max_new_tokens=3), trusted(saved).generate(ids, max_new_tokens=3))
    assert type(model) is Qwen3ForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("trust", [None, True])
def test_custom_generate_gives_the_same_answer_each_time_and_leaves_the_model_as_it_was(trust, saved):
    expected = ask(MultiverseForCausalLM.from_pretrained(saved))
    model = Qwen3ForCausalLM.from_pretrained(saved, trust_remote_code=trust)
    document = torch.tensor([[30, *TagSet.from_dict(model.config.multiverse).control_ids]])
    before, hooks = model(document).logits, len(model._forward_hooks)
    for _ in range(2):
        assert ask(model, custom_generate=str(saved), trust_remote_code=True) == expected
        assert ask(model, custom_generate=str(saved), trust_remote_code=True, structure="off") != ""
    assert type(model) is Qwen3ForCausalLM
    assert len(model._forward_hooks) == hooks
    assert torch.equal(model(document).logits, before)
    for plain in (model, trusted(saved)):
        call = {"custom_generate": lambda model, input_ids, **_: input_ids + 1, "structure": "off"}
        call = call if plain is not model else {"custom_generate": call["custom_generate"]}
        assert plain.generate(torch.tensor([[30, 31]]), max_new_tokens=2, **call).tolist() == [[31, 32]]
    assert ask(trusted(saved), custom_generate=str(saved), trust_remote_code=True) == expected


@pytest.mark.parametrize("decoding", ["packed", pytest.param("static", marks=pytest.mark.slow)])
def test_the_code_of_a_checkpoint_and_the_package_work_side_by_side_in_one_process(decoding, saved):
    package, remote = MultiverseForCausalLM.from_pretrained(saved), trusted(saved)  # the later copy takes no place
    ids = torch.tensor([[30, 31, package.tags.open("think")]])
    expected = remote.generate(ids, max_new_tokens=60, do_sample=False)[0].tolist()
    with MultiverseEngine(package, max_cache_tokens=500, decoding=decoding) as engine:
        (result,) = engine.generate([ids[0]], max_new_tokens=60, do_sample=False)
    assert ids[0].tolist() + list(result.ids) == expected
    assert remote.generate(ids, max_new_tokens=60, do_sample=False)[0].tolist() == expected


def test_auto_model_gives_the_backbone_which_follows_layouts(saved):
    backbone = AutoModel.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32).eval()
    whole = MultiverseForCausalLM.from_pretrained(saved).eval()
    document = whole.generate(torch.tensor([[30, 31, whole.tags.open("think")]]), max_new_tokens=100)
    with torch.no_grad():
        hidden = backbone(document).last_hidden_state
        torch.testing.assert_close(whole.lm_head(hidden), whole(document).logits)
    assert AutoModel.from_pretrained(saved).config.model_type == "qwen3"


@pytest.mark.slow
def test_a_text_generation_pipeline_branches(saved):
    pipe = pipeline("text-generation", model=str(saved), trust_remote_code=True)
    said = pipe(CHAT, max_new_tokens=600, do_sample=False)[0]["generated_text"][-1]["content"]
    assert said == ask(MultiverseForCausalLM.from_pretrained(saved))


@pytest.mark.slow
def test_export_writes_a_checkpoint_in_the_published_form_with_its_code(saved, tmp_path, capfd, unquiet):
    """As published: the tags are special tokens, config and folder know nothing of Multiverse."""
    from multiverse_hf.cli import run

    plain = Qwen3ForCausalLM.from_pretrained(saved)
    for name in ("multiverse", "auto_map"):
        delattr(plain.config, name)
    plain.save_pretrained(tmp_path / "published")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tags = MultiverseForCausalLM.from_pretrained(saved).tags
    tokenizer.add_special_tokens({"extra_special_tokens": tags.names.tokens})
    assert tokenizer.convert_tokens_to_ids(tags.names.tokens) == tags.control_ids
    tokenizer.save_pretrained(tmp_path / "published")
    expected = ask(MultiverseForCausalLM.from_pretrained(tmp_path / "published"))
    assert expected == ask(MultiverseForCausalLM.from_pretrained(saved))

    command = ["export", "--model", str(tmp_path / "published"), "--output", str(tmp_path / "exported")]
    assert run(command) == 0
    assert ask(trusted(tmp_path / "exported")) == expected
    assert run(command) == 2
    assert "is not empty; name a new folder" in capfd.readouterr().err


def test_a_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tiny_model("qwen2", dtype=torch.float32).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    tiny_model("qwen2", dtype=torch.float32).save_pretrained(tmp_path / "new")
    assert "trust_remote_code=True" in (tmp_path / "new/README.md").read_text()


def test_the_tags_of_the_helpers_are_in_every_saved_config(tmp_path):
    tiny_model("qwen2", dtype=torch.float32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["multiverse"]["ids"] == TAGS.ids
