"""What ``generate`` takes: every option of transformers is done, without effect there too, or refused."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from helpers import EOS, PAD, Forced, answer, tiny_config
from helpers import tiny_model as new_tiny_model
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    MinPLogitsWarper,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from multiverse_hf.modeling import arguments

PROMPT = [50, 51, 52]
IDS = torch.tensor([PROMPT])
tiny_model = functools.cache(new_tiny_model)


def generate(ids=IDS, model=None, **options):
    """An answer of the tiny model, short by default."""
    if options.get("generation_config") is None and not options.keys() & {"max_new_tokens", "max_length"}:
        options["max_new_tokens"] = 6
    return (model or tiny_model("qwen2")).generate(ids, **options)


# Options


def test_every_option_of_transformers_is_in_one_table():
    tables = [arguments.HONOURED, arguments.HARMLESS, arguments.REFUSED, arguments.REFUSED_IN_A_CALL]
    assert sorted(vars(GenerationConfig())) == sorted(name for table in tables for name in table)


def test_the_defaults_of_transformers_are_refused_nowhere():
    defaults = GenerationConfig._get_default_generation_params()
    del defaults["max_length"], defaults["return_dict_in_generate"]
    plain = generate()
    assert torch.equal(generate(**defaults), plain)
    unsaid = dict.fromkeys(vars(GenerationConfig()).keys() - {"max_new_tokens", "max_length"})
    assert torch.equal(generate(**unsaid), plain)
    nothing = {"cache_implementation": "dynamic", "synced_gpus": False, "token_type_ids": torch.zeros_like(IDS)}
    nothing |= {"tokenizer": None, "assistant_model": None, "pixel_values": None, "trust_remote_code": False}
    assert torch.equal(generate(**nothing), plain)


REFUSED = {
    "num_beams": (2, "beam search"),
    "num_beam_groups": (2, "do_sample"),
    "diversity_penalty": (0.5, "do_sample"),
    "constraints": ([1], "do_sample"),
    "force_words_ids": ([[60]], "do_sample"),
    "penalty_alpha": (0.6, "do_sample"),
    "dola_layers": ("high", "do_sample"),
    "low_memory": (True, "do_sample"),
    "use_mtp": (True, "assisted decoding"),
    "prompt_lookup_num_tokens": (3, "assisted decoding"),
    "assistant_early_exit": (1, "assisted decoding"),
    "is_assistant": (True, "assisted decoding"),
    "guidance_scale": (2.0, "second prompt"),
    "encoder_repetition_penalty": (1.5, "repetition_penalty"),
    "encoder_no_repeat_ngram_size": (2, "no_repeat_ngram_size"),
    "forced_eos_token_id": (EOS, "max_new_tokens"),
    "token_healing": (True, "prompt"),
    "output_scores": (True, "output_logits"),
    "output_attentions": (True, "output_logits"),
    "output_hidden_states": (True, "output_logits"),
    "cache_implementation": ("static", "cache of its own"),
    "cache_config": ({"nbits": 4}, "cache of its own"),
    "max_cache_len": (64, "cache of its own"),
    "prefill_chunk_size": (8, "one pass"),
    "compile_config": (CompileConfig(), "not compiled"),
    "continuous_batching_config": ({}, "batches the branches"),
    "assistant_model": ("anything", "assisted decoding"),
    "assistant_tokenizer": ("anything", "assisted decoding"),
    "negative_prompt_ids": (IDS, "second prompt"),
    "negative_prompt_attention_mask": (torch.ones_like(IDS), "second prompt"),
    "custom_generate": (print, "base class"),
    "synced_gpus": (True, "gather the weights"),
    "past_key_values": ((), "input_ids"),
    "cache": ((), "input_ids"),
    "inputs_embeds": (torch.zeros(1, 3, 32), "input_ids"),
    "logits_to_keep": (1, "leave it out"),
    "position_ids": (torch.arange(3)[None], "attention_mask"),
    "token_type_ids": (torch.ones_like(IDS), "leave them out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_branches_cannot_do_is_refused_by_name_with_the_way_out(name):
    value, way_out = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name}.* does not work with branches; .*{way_out}"):
        generate(**{name: value})


def test_transformers_own_continuous_batching_is_refused_rather_than_written_without_branches():
    with pytest.raises(ValueError, match="continuous batching does not work with branches; use MultiverseEngine"):
        tiny_model("qwen2").generate_batch(IDS.tolist(), generation_config=GenerationConfig(max_new_tokens=2))


def test_refused_options_are_all_tested():
    assert REFUSED.keys() == {
        *arguments.REFUSED, *arguments.REFUSED_IN_A_CALL, *arguments.REFUSED_ARGUMENTS, "token_type_ids"
    }  # fmt: skip


@pytest.mark.parametrize("name", [*arguments.REFUSED, *arguments.REFUSED_IN_A_CALL])
def test_it_is_refused_in_a_generation_config_too(name):
    config = GenerationConfig(max_new_tokens=6)
    setattr(config, name, REFUSED[name][0])
    with pytest.raises(ValueError, match=rf"{name}.* does not work with branches"):
        generate(generation_config=config)


def test_a_watermark_that_keeps_a_state_for_every_row_is_refused():
    config = SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=2)
    with pytest.raises(ValueError, match="SynthID"):
        generate(watermarking_config=config)


def test_an_option_of_a_later_transformers_is_refused_once_it_is_set(monkeypatch):
    monkeypatch.delitem(arguments.HARMLESS, "early_stopping")
    generate()
    with pytest.raises(ValueError, match=r"early_stopping=True .* does not know it"):
        generate(early_stopping=True)


def test_a_checkpoint_may_hold_what_only_concerns_its_cost():
    model = copy.deepcopy(tiny_model("qwen2"))
    plain = generate(model=model)
    model.generation_config.use_cache = False
    model.generation_config.cache_implementation = "offloaded"
    assert torch.equal(generate(model=model), plain)
    own = copy.deepcopy(model.generation_config)  # as pipelines do
    own.max_new_tokens = 6
    assert torch.equal(generate(model=model, generation_config=own), plain)


def test_honoured_processors_do_what_they_do_in_transformers():
    """Token for token, where there is nothing to fork: an answer of the base class."""
    model = new_tiny_model("qwen2", dtype=torch.float32)
    base = AutoModelForCausalLM.from_config(tiny_config("qwen2"), dtype=torch.float32).eval()
    base.load_state_dict(model.state_dict())
    plain = base.generate(IDS, max_new_tokens=24, do_sample=False)
    first, second = plain[0, 3:5].tolist()
    options = [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[first, second]]},
        {"suppress_tokens": [second]},
        {"begin_suppress_tokens": [first]},
        {"sequence_bias": {(second,): -50.0}},
        {"forced_bos_token_id": 77},
        {"exponential_decay_length_penalty": (2, 4.0), "eos_token_id": second},
        {"min_new_tokens": 9, "eos_token_id": second},
        {"min_length": 9, "eos_token_id": second},
        {"eos_token_id": second},
        {"max_length": 9},
        {"watermarking_config": WatermarkingConfig(bias=20.0)},
    ]
    for option in options:
        ids = IDS[:, :1] if "forced_bos_token_id" in option else IDS
        common = {"max_new_tokens": 24} if "max_length" not in option else {}
        theirs = base.generate(ids, do_sample=False, **common, **option)
        ours = model.generate(ids, do_sample=False, structure="off", **common, **option)
        assert ours.tolist() == theirs.tolist(), option
        assert ours.tolist() != plain.tolist(), f"{option} changes nothing here"


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}, {"top_h": 1e-4},
        {"epsilon_cutoff": 0.999},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_honoured_warpers_at_their_limit_leave_the_greedy_choice(option):
    sampled = generate(do_sample=True, seed=1, **({"top_k": 0, "temperature": 1.0} | option))
    assert torch.equal(sampled, generate())
    assert not torch.equal(generate(do_sample=True, seed=1, top_k=0, temperature=9.0), generate())


# Structure options


def test_structure_options_of_the_call_win_over_a_config_and_none_is_the_default():
    model = copy.deepcopy(tiny_model("qwen2"))
    plan = {tuple(PROMPT): (Forced(((1,), (1,), (1,)), labelled=False),)}

    def width(**options) -> int:
        return answer(model, [PROMPT], plan, **options).stats[0].max_width

    assert width() == 3
    model.generation_config.max_paths = 2
    assert width() == 2
    assert width(max_paths=None) == 3
    assert width(max_paths=1) == 1
    assert width(generation_config=GenerationConfig(max_paths=1)) == 1
    assert width(generation_config=GenerationConfig(max_paths=None)) == 2
    assert width(generation_config=GenerationConfig(max_paths=1), max_paths=None) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_path_token": 3}, ValueError, "did you mean max_path_tokens"),
        ({"max_new_token": 3}, ValueError, "did you mean max_new_tokens"),
        ({"strukture": "off"}, ValueError, "did you mean structure"),
        ({"generation_config": GenerationConfig(strukture="off")}, ValueError, "did you mean structure"),
        ({"structure": "sometimes"}, ValueError, "'guided', 'lenient' or 'off'"),
        ({"max_paths": 0}, ValueError, "max_paths must be an integer of at least 1"),
        ({"max_paths": 2.5}, ValueError, "max_paths must be an integer"),
        ({"max_paths": True}, ValueError, "max_paths must be an integer"),
        ({"max_depth": -1}, ValueError, "max_depth must be an integer of at least 0"),
        ({"max_total_tokens": 0}, ValueError, "max_total_tokens must be an integer of at least 1"),
        ({"max_path_tokens": "many"}, ValueError, "max_path_tokens must be an integer"),
        # counts and times
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an integer, got True"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ({"max_new_tokens": "many"}, TypeError, "max_new_tokens must be an integer, got 'many'"),
        ({"generation_config": GenerationConfig(max_new_tokens=True)}, TypeError, "got True"),
        ({"max_length": 3}, ValueError, "no room for new tokens: the prompt has 3"),
        ({"max_length": 2.5}, TypeError, "max_length must be an integer"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be at least 0"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1"),
        ({"num_return_sequences": "2"}, TypeError, "num_return_sequences must be an integer"),
        ({"max_time": float("nan")}, ValueError, "max_time must be at least 0, got nan"),
        ({"max_time": -1.0}, ValueError, "max_time must be at least 0"),
        ({"max_time": "1"}, TypeError, "max_time must be a number"),
        ({"max_time": True}, TypeError, "max_time must be a number"),
        # tokens and flags
        ({"eos_token_id": "<end>"}, TypeError, "eos_token_id must be an integer, got '<end>'"),
        ({"eos_token_id": [1, 2.5]}, TypeError, "eos_token_id must be an integer"),
        ({"pad_token_id": "<pad>"}, TypeError, "pad_token_id must be an integer, got '<pad>'"),
        ({"do_sample": "False"}, TypeError, "do_sample must be True or False, got 'False'"),
        # masks
        ({"attention_mask": torch.ones(1, 5)}, ValueError, "must have one shape"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "prompt 0 is empty"),
        ({"attention_mask": [[1, 1, 1]]}, TypeError, "attention_mask must be a tensor, got list"),
        ({"attention_mask": torch.tensor([[0, 1, 2]])}, ValueError, "1 at tokens and 0 at padding, got 2"),
        ({"attention_mask": torch.tensor([[-torch.inf, 0, 0]])}, ValueError, "0 at padding, got -inf"),
        # objects
        ({"input_ids": IDS}, ValueError, "input_ids too; pass the prompts once"),
        ({"generation_config": {"max_new_tokens": 3}}, TypeError, r"got dict; make it one with GenerationConfig"),
        ({"logits_processor": print}, TypeError, r"logits_processor must be a list, got .*; put it in one"),
        ({"logits_processor": [1]}, TypeError, "logits_processor must hold objects that can be called .* got 1"),
        ({"logits_processor": [MinPLogitsWarper]}, TypeError, "logits_processor must hold objects"),
        ({"stopping_criteria": print}, TypeError, "stopping_criteria must be a list"),
        ({"stopping_criteria": [None]}, TypeError, "stopping_criteria must hold objects"),
        ({"prefix_allowed_tokens_fn": [60]}, TypeError, "prefix_allowed_tokens_fn must be a function"),
        ({"streamer": print}, TypeError, "a streamer has the methods put and end, or on_event"),
        ({"stop_strings": ["a"]}, ValueError, "tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_option_is_refused_with_the_way_out(options, error, message):
    with pytest.raises(error, match=message) as info:
        generate(**options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "prompt 0 is empty"),
        (torch.zeros(0, 3, dtype=torch.long), ValueError, "the batch is empty"),
        (torch.tensor(PROMPT), ValueError, "shape"),
        ([PROMPT], ValueError, "return_tensors"),
        ({"input_ids": IDS}, ValueError, r"generate\(\*\*batch\)"),
        (torch.tensor([[1.0, 2.0]]), TypeError, "integers"),
        (torch.tensor([[True]]), TypeError, "integers"),
        (torch.tensor([[50, 96]]), ValueError, "token id 96 is outside the vocabulary of 96"),
        (torch.tensor([[50, -1]]), ValueError, "token id -1 is outside"),
        (torch.full((1, 2048), 60), ValueError, "context"),
        (torch.full((1, 5000), 60), ValueError, "context"),
        (None, ValueError, "input_ids"),
    ],
    ids=[
        "empty", "empty batch", "one dimension", "a list", "a dict", "floats", "bools", "over the vocabulary",
        "negative", "fills the context", "over the context", "none",
    ],
)  # fmt: skip
def test_a_bad_prompt_is_refused_with_the_way_out(ids, error, message):
    with pytest.raises(error, match=message):
        tiny_model("qwen2").generate(ids, max_new_tokens=3)


# What is taken


def test_embeddings_that_were_cut_below_the_tags_are_refused():
    model = new_tiny_model("qwen2")
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"tags go up to id \d+ and the embeddings to 19"):
        model.generate(torch.tensor([[5]]), max_new_tokens=5)


@pytest.mark.parametrize("value", [np.int64(5), torch.tensor(5)], ids=["numpy", "torch"])
def test_integers_of_other_libraries_are_integers(value):
    assert torch.equal(generate(max_new_tokens=value), generate(max_new_tokens=5))


@pytest.mark.parametrize("eos", [55, [55, 1], torch.tensor(55), torch.tensor([55, 1]), [], -1], ids=str)
def test_end_tokens_come_in_any_form_that_transformers_takes(eos):
    ends = generate(eos_token_id=eos)[0].tolist()
    plain = generate()[0].tolist()
    assert ends == (plain[:8] if 55 in np.ravel(eos) else plain)


@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.int32, None], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_padding_whichever_side_it_stands_on(side, mask):
    before, after = {"left": (2, 0), "right": (0, 2), "both": (1, 1)}[side]
    row = [PAD] * before + PROMPT + [PAD] * after
    ids = torch.tensor([row, [60, 61, 62, 63, 64]])
    options = {} if mask is None else {"attention_mask": (ids != PAD).to(mask)}
    padded = generate(ids, **options)
    assert padded[0, 5:].tolist() == generate()[0, 3:].tolist()
    assert padded[1].tolist() == generate(ids[1:])[0].tolist()


def test_a_pad_token_inside_a_prompt_is_a_token():
    ids = torch.tensor([[50, PAD, 52]])
    assert torch.equal(generate(ids), generate(ids, attention_mask=torch.ones_like(ids)))


@pytest.mark.parametrize("criterion", ["length", "end token"])
def test_a_callers_own_criterion_of_a_class_that_transformers_uses_itself_is_asked(criterion):
    plain = generate()[0].tolist()
    at = 7
    assert plain[at] not in plain[:at]
    criterion = MaxLengthCriteria(at + 1) if criterion == "length" else EosTokenCriteria(plain[at])
    assert generate(stopping_criteria=[criterion])[0].tolist() == plain[: at + 1]


def test_nothing_said_closes_the_answer_after_twenty_positions_with_a_warning_as_in_transformers():
    prompt = {tuple(PROMPT): (60,)}
    with pytest.warns(UserWarning, match="closed after 20 positions; set max_new_tokens"):
        output = answer(tiny_model("qwen2"), [PROMPT], prompt, max_new_tokens=None)
    assert output.stats[0].length == 20


def test_a_least_length_out_of_reach_is_warned_of():
    with pytest.warns(UserWarning, match="min_new_tokens=9 cannot be reached"):
        generate(max_new_tokens=5, min_new_tokens=9)


def test_min_new_tokens_takes_precedence_over_min_length():
    def prefer_the_end(ids, scores):
        scores = scores.clone()
        scores[:, EOS] += 1e4
        return scores

    output = answer(tiny_model("qwen2"), [PROMPT], min_new_tokens=2, min_length=30, logits_processor=[prefer_the_end])
    assert output.stats[0].num_tokens == 3


def test_a_call_that_says_all_it_should_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(max_new_tokens=5, min_new_tokens=2, do_sample=True, temperature=0.9, top_p=0.9, seed=0)
