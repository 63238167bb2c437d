"""Replay equality: one pass over a returned document gives the logits its tokens were chosen from.

The library's first test in spirit. It holds for every architecture and attention implementation, for nested, chained,
batched and cut-off documents, and for prompts that contain blocks or end inside one.
"""

import functools

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    EOS,
    FIRST_TEXT,
    TAGS,
    Forced,
    answer,
    documents,
    left_pad,
    replay_error,
    tiny_config,
)
from helpers import tiny_model as new_tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from multiverse_hf.modeling import generation
from multiverse_hf.modeling.cache import SCRATCH
from multiverse_hf.modeling.engine import Engine, document_entries
from multiverse_hf.modeling.layout import build_layout

PROMPT = [50, 51, 52]
tiny_model = functools.cache(new_tiny_model)

# Free tokens, blocks, and an end token in the last place of a path.
lengths = st.integers(0, 4)


def blocks(inner: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    return st.builds(Forced, st.lists(inner, min_size=1, max_size=most).map(tuple), st.booleans())


def plan_of(items: st.SearchStrategy) -> st.SearchStrategy:
    ended = st.builds(lambda items, end: (*items, *end), st.lists(items, max_size=3), st.sampled_from([(), ("eos",)]))
    return ended


flat = plan_of(lengths)
nested = plan_of(st.one_of(lengths, blocks(flat)))
plans = st.lists(st.one_of(lengths, blocks(nested)), min_size=1, max_size=3).map(tuple)

NESTED = (2, Forced(((4, Forced(((2,), (3,))), 1), (6, "eos"), (0,))), 2)
CHAINED = (1, Forced(((5,), (1,))), 1, Forced(((2,), (2,)), labelled=False), Forced(((3,),)))
WIDE = (Forced(tuple((n,) for n in range(8))), 2)
DEEP = (Forced((1, (Forced((2, (Forced(((3,), (1,))),), 2)[1:2]),))[1:]), 1)
PLANS = {"nested": NESTED, "chained": CHAINED, "wide": WIDE, "deep": DEEP, "sequential": (7,)}


def assert_replays(model, prompts: list[list[int]], tolerance: float = 1e-9, plans=None, **options):
    """Generate, and check that one pass over the documents gives the logits the tokens were chosen from."""
    output = answer(model, prompts, plans, **options)
    _, mask = left_pad(prompts)
    copies = len(output.stats) // len(prompts)
    error = replay_error(model, output, mask.shape[1], mask.repeat_interleave(copies, 0))
    assert error < tolerance, f"replay differs by {error}"
    return output


# Every architecture and attention implementation


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3_moe"])
@settings(max_examples=4)
@given(plans=st.lists(plans, min_size=4, max_size=4), longer=st.permutations(range(4)))
def test_random_plans_replay_exactly_alone_and_in_a_left_padded_batch(name, attn, plans, longer):
    model = tiny_model(name, attn)
    # eager attention in transformers rounds its softmax to float32 whatever the dtype
    tolerance = 1e-9 if attn == "sdpa" else 1e-5
    prompts = [[50 + row] * (1 + 3 * extra) for row, extra in enumerate(longer)]
    forced = {tuple(prompt): plan for prompt, plan in zip(prompts, plans, strict=True)}
    together = assert_replays(model, prompts, tolerance, forced)
    alone = assert_replays(model, prompts[:1], tolerance, forced)
    if attn == "sdpa":
        assert documents(together, prompts)[0] == documents(alone, prompts[:1])[0]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plans_replay_in_float32(name, attn):
    model = tiny_model(name, attn, torch.float32)
    prompts = [[50] * (1 + 2 * row) + [60 + row] for row in range(len(PLANS))]
    forced = {tuple(prompt): plan for prompt, plan in zip(prompts, PLANS.values(), strict=True)}
    output = assert_replays(model, prompts, 1e-4, forced)
    assert [stats.num_forks for stats in output.stats] == [2, 3, 1, 3, 0]


@pytest.mark.slow
def test_flex_attention_follows_the_layout_in_a_forward_pass():
    dense, flex = (new_tiny_model("qwen2", attn, torch.float32) for attn in ("sdpa", "flex_attention"))
    ids = torch.tensor(documents(answer(dense, [PROMPT], NESTED_PLAN), [PROMPT]))
    with torch.no_grad():
        torch.testing.assert_close(flex(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


NESTED_PLAN = {tuple(PROMPT): NESTED}


# The engine's own log against the layout


@settings(max_examples=20)
@given(plan=plans)
@example(plan=NESTED)
@example(plan=WIDE)
def test_the_engine_used_the_positions_and_visibility_that_the_layout_gives_its_document(plan):
    model, engines, forwards = tiny_model("qwen2"), [], []

    class Watched(Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    def watch(module, args, kwargs):
        if kwargs.get("past_key_values") is not None:
            forwards.append((kwargs["position_ids"][0].tolist(), kwargs["attention_mask"][0, 0]))

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    original, generation.Engine = generation.Engine, Watched
    try:
        answer(model, [PROMPT], {tuple(PROMPT): plan})
    finally:
        generation.Engine = original
        handle.remove()
    (sequence,) = engines[0].sequences
    order = document_entries(sequence.root)
    document = [sequence.ids[entry] for entry in order]
    layout = build_layout(document, TAGS)
    assert sorted(order) == list(range(len(sequence.ids))), "every log entry is in the document once"
    assert [int(sequence.positions[entry]) for entry in order] == layout.position_ids.tolist()
    read = [(position, row) for positions, mask in forwards for position, row in zip(positions, mask, strict=True)]
    # the last token of all need not be read
    place = {entry: at for at, entry in enumerate(order)}
    dense = layout.mask()
    for entry, (position, row) in enumerate(read):
        assert position == int(layout.position_ids[place[entry]])
        seen = {place[column - SCRATCH] for column in row.nonzero().flatten().tolist()}
        assert seen == set(dense[place[entry]].nonzero().flatten().tolist())


# Cut off by limits


class StopAt(StoppingCriteria):
    """Stops a branch when its own ids end in a token of a set."""

    def __init__(self, stops: set[int]) -> None:
        self.stops = stops

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row[-1] in self.stops for row in input_ids.tolist()])


limits = st.one_of(
    st.integers(1, 60).map(lambda n: {"max_new_tokens": n}),
    st.integers(1, 120).map(lambda n: {"max_total_tokens": n}),
    st.integers(1, 40).map(lambda n: {"max_path_tokens": n}),
    st.tuples(st.integers(5, 60), st.integers(5, 120), st.integers(5, 40)).map(
        lambda n: {"max_new_tokens": n[0], "max_total_tokens": n[1], "max_path_tokens": n[2]}
    ),
    st.sampled_from([0.0, 1e-4, 0.02]).map(lambda seconds: {"max_time": seconds}),
    st.sets(st.integers(FIRST_TEXT, 95), min_size=8, max_size=24).map(
        lambda stops: {"stopping_criteria": StoppingCriteriaList([StopAt(stops)])}
    ),
    st.just({"max_depth": 1}),
    st.just({"max_paths": 2}),
)


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
@settings(max_examples=60)
@given(plan=plans, other=plans, limit=limits)
def test_documents_that_a_limit_cut_off_replay_exactly(name, plan, other, limit):
    prompts = [PROMPT, [60, 61, 62, 63, 64]]
    assert_replays(tiny_model(name), prompts, plans={tuple(PROMPT): plan, tuple(prompts[1]): other}, **limit)


@pytest.mark.parametrize("max_new_tokens", range(1, 60, 3))
def test_a_wide_nested_block_replays_at_every_budget(max_new_tokens):
    plan = (1, Forced(((3, Forced(((6,), (1,)))), (12,), (2,))), 4)
    output = assert_replays(tiny_model("qwen2"), [PROMPT], plans={tuple(PROMPT): plan}, max_new_tokens=max_new_tokens)
    assert output.stats[0].length <= max_new_tokens


# Prompts that contain blocks, or end inside one


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_document_cut_at_any_token_is_continued_to_the_same_document(plan):
    plan = tuple(item for item in plan if item != "eos")
    if plan == NESTED:  # an end token's closing tag is no part of a prompt's plan: see the test below
        plan = (2, Forced(((4, Forced(((2,), (3,))), 1), (6,), (0,))), 2)
    model, forced = tiny_model("qwen3"), {tuple(PROMPT): plan}
    (document,) = documents(assert_replays(model, [PROMPT], plans=forced), [PROMPT])
    assert document[-1] == EOS
    prompts = [document[:cut] for cut in range(len(PROMPT), len(document))]
    for begin in range(0, len(prompts), 40):
        some = prompts[begin : begin + 40]
        output = assert_replays(model, some, plans=forced)
        for prompt, continued in zip(some, documents(output, some), strict=True):
            assert continued == document, f"cut after {len(prompt)} tokens, at {prompt[-4:]}"


@settings(max_examples=10)
@given(plan=plans, limit=st.one_of(st.just({}), limits))
def test_a_document_with_end_tokens_and_limits_cut_at_any_token_still_replays(plan, limit):
    model, forced = tiny_model("qwen2"), {tuple(PROMPT): plan}
    (document,) = documents(answer(model, [PROMPT], forced, max_new_tokens=60), [PROMPT])
    prompts = [document[:cut] for cut in range(len(PROMPT), len(document))]
    if prompts:
        prompts = prompts[:: 1 + len(prompts) // 24]
        assert_replays(model, prompts, plans=forced, **{"max_new_tokens": 40, **limit})


soup = st.lists(st.one_of(st.sampled_from(TAGS.control_ids), st.integers(0, 60)), min_size=1, max_size=25)


@pytest.mark.parametrize("structure", ["guided", "lenient"])
@settings(max_examples=40)
@given(prompts=st.lists(soup, min_size=1, max_size=3))
def test_any_prompt_at_all_is_continued_and_replays(structure, prompts):
    assert_replays(tiny_model("qwen2"), prompts, structure=structure, max_new_tokens=40)


# Left to the model


@pytest.mark.parametrize("structure", ["guided", "lenient", "off"])
@pytest.mark.parametrize("seed", range(4))
def test_what_a_random_model_writes_by_itself_replays(structure, seed):
    model = new_tiny_model("qwen3", seed=seed)
    prompts = [[50, 51], [60, TAGS.open("parallel")], [TAGS.open("think"), 70, 71, 72]]
    sampling = {"do_sample": True, "temperature": 3.0, "seed": seed, "num_return_sequences": 3}
    for options in ({}, sampling):
        assert_replays(model, prompts, structure=structure, max_new_tokens=80, **options)


@settings(max_examples=10)
@given(plan=plans, seed=st.integers(0, 2**40))
def test_sampled_plans_replay_in_several_copies(plan, seed):
    output = assert_replays(
        tiny_model("llama"),
        [PROMPT, [60]],
        plans={tuple(PROMPT): plan, (60,): (3,)},
        do_sample=True,
        temperature=2.0,
        num_return_sequences=2,
        seed=seed,
    )
    assert len(output.stats) == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_structure_off_writes_what_the_base_class_writes_token_for_token(name):
    dtype = torch.float32 if name == "qwen3_moe" else torch.float64
    model = new_tiny_model(name, dtype=dtype)
    base = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=dtype).eval()
    base.load_state_dict(model.state_dict())
    prompts = [[50, 51, 52, 53, 54], [60], [TAGS.open("parallel"), TAGS.open("goal")]]
    ids, mask = left_pad(prompts)
    theirs = base.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, structure="off")
    assert ours.tolist() == theirs.tolist()
