"""transformers' own generation modes with ``structure="off"``: those of the base class, on three architectures.

The modes are those that transformers' generation tests go through for a decoder-only model, on text without tags.
"""

import copy
import functools

import pytest
import torch
from helpers import EOS, left_pad, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, LogitsProcessor, StoppingCriteria

ONE, TWO = [50, 51, 52], [60]


@functools.cache
def pair(name: str) -> tuple:
    """A Multiverse model and the base class with the same weights, in float32."""
    model = tiny_model(name, dtype=torch.float32)
    base = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=torch.float32)
    base.load_state_dict(model.state_dict())
    return model, base.eval()


class Never(LogitsProcessor):
    """Keeps count of its calls, and forbids a token more at each."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        scores[:, 40 : 40 + self.num_calls] = -torch.inf
        return scores


class AfterFive(StoppingCriteria):
    """Ends the rows of its batch after five calls, the first row after three."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.num_calls += 1
        return torch.tensor([self.num_calls >= (3 if row == 0 else 5) for row in range(len(input_ids))])


MODES = {
    "greedy": {},
    "greedy with all outputs": {
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
    },
    "sampling": {"do_sample": True, "temperature": 2.0, "output_scores": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "output_scores": True},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "scores": {"output_scores": True, "output_logits": True},
    "states": {"output_hidden_states": True, "output_attentions": True},
    "beams that sample": {"num_beams": 2, "do_sample": True, "output_scores": True},
    "an early end of beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "no cache": {"use_cache": False},
    "no cache and beams": {"use_cache": False, "num_beams": 2},
    "an offloaded static cache": {"cache_implementation": "static", "num_beams": 2},
    "chunks of the prompt": {"prefill_chunk_size": 2},
    "a state in a processor": {"logits_processor": Never},
    "a state in a criterion": {"stopping_criteria": AfterFive},
    "a static cache": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "an n-gram ban": {"no_repeat_ngram_size": 2, "num_beams": 2},
    "guidance": {"guidance_scale": 1.5},
    "a forced end": {"forced_eos_token_id": EOS},
    "several prefixes": {"prefix_allowed_tokens_fn": lambda batch, ids: [60 + batch, 61 + batch]},
    "kept logits": {"logits_to_keep": 1},
    "positions": {"position_ids": torch.tensor([[0, 1, 2], [0, 0, 0]])},
}


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text"])
@pytest.mark.parametrize("mode", MODES)
def test_off_does_what_the_base_class_does(mode, name):
    model, base = pair(name)
    ids, mask = left_pad([ONE, TWO])
    if mode == "lookup":
        ids, mask = ids[:1], mask[:1]
    shared = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}

    def call(generate, **options):
        made = {key: [value()] if isinstance(value, type) else value for key, value in MODES[mode].items()}
        torch.manual_seed(0)
        return generate(ids, **{**shared, **made, **options})

    theirs = call(base.generate, labels=None)
    sampled_by_the_engine = mode in ("sampling", "several samples")
    for options in ({"structure": "off"}, {"generation_config": GenerationConfig(structure="off")}):
        ours = call(model.generate, **options)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert set(theirs.keys()) - {"past_key_values"} <= set(ours.keys())
        for field in ("scores", "logits"):
            for one, other in zip(getattr(ours, field) or (), getattr(theirs, field) or (), strict=True):
                torch.testing.assert_close(one, other)
        if "num_beams" not in MODES[mode]:
            assert [stats.num_tokens for stats in ours.stats] == ours.sampled_mask.sum(-1).tolist()
    assert not sampled_by_the_engine or ours.scores is not None


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text"])
def test_off_goes_on_from_embeddings_caches_and_assistants(name):
    model, base = pair(name)
    ids, call = torch.tensor([ONE]), {"max_new_tokens": 6, "do_sample": False}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, structure="off", **call), base.generate(inputs_embeds=embeds, **call)
    )
    beginning = {"bos_token_id": 3, "pad_token_id": 0, "structure": "off"}
    assert torch.equal(model.generate(**beginning, **call), base.generate(bos_token_id=3, pad_token_id=0, **call))
    want = base.generate(ids, **call)
    helper = copy.deepcopy(model)
    assert torch.equal(model.generate(ids, assistant_model=helper, structure="off", **call), want)
    kept = model.generate(ids, structure="off", output_scores=True, return_dict_in_generate=True, **call)
    more = {"max_new_tokens": 4, "do_sample": False}
    again = model.generate(kept.sequences, structure="off", past_key_values=kept.past_key_values, **more)
    assert torch.equal(again, base.generate(want, **more))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text"])
def test_off_compiles_its_steps_in_one_graph_as_the_base_class_does(name):
    model, base = pair(name)
    ids, mask = left_pad([ONE, TWO])
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU alone by itself
    call = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    want = base.generate(ids, attention_mask=mask, **call)
    assert torch.equal(model.generate(ids, attention_mask=mask, structure="off", **call), want)
    assert hasattr(model, "_compiled_call")
