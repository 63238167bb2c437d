"""Replay equality: one pass over a returned document gives the logits its tokens were chosen from.

The library's first test in spirit. It holds for every architecture and attention implementation, for nested, chained,
batched and cut-off documents, and for prompts that contain blocks or end inside one; to 1e-9 in float64, with the
one softmax that transformers rounds to float32 kept exact.
"""

import functools

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    EOS,
    EVERY_ARCHITECTURE,
    FIRST_TEXT,
    TAGS,
    Forced,
    answer,
    documents,
    exact_softmax,
    left_pad,
    longest_path,
    replay_error,
    slow_unless,
    text_of,
    tiny_config,
)
from helpers import tiny_model as new_tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.integrations import flex_attention as transformers_flex

from multiverse_hf.documents import parse_document
from multiverse_hf.modeling import generation
from multiverse_hf.modeling.budget import empty_path_length
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.state import document_entries

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


LONG = (2, Forced(((30,), (3, Forced(((20,), (9, "eos"), (2,)))), (1,))), 5, Forced(((12,), (25,))), 3)
PROMPTS = [PROMPT, [60], [61] * 9, [62] * 4]  # of one batch
FORCED = dict(zip(map(tuple, PROMPTS), (LONG, CHAINED, NESTED, WIDE), strict=True))


def assert_replays(model, prompts: list[list[int]], tolerance: float = 1e-9, plans=None, **options):
    """Generate, and check that one pass over the documents gives the logits the tokens were chosen from."""
    _, mask = left_pad(prompts)
    with exact_softmax():
        output = answer(model, prompts, plans, **options)
        copies = len(output.stats) // len(prompts)
        error = replay_error(model, output, mask.shape[1], mask.repeat_interleave(copies, 0))
    assert error < tolerance, f"replay differs by {error}"
    return output


# Every architecture and attention implementation


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_unless(["qwen2", "gemma3_text"], ARCHITECTURES))
@settings(max_examples=3)
@given(plans=st.lists(plans, min_size=4, max_size=4), longer=st.permutations(range(4)))
def test_random_plans_replay_exactly_alone_and_in_a_left_padded_batch(name, attn, plans, longer):
    model = tiny_model(name, attn)
    prompts = [[50 + row] * (1 + 3 * extra) for row, extra in enumerate(longer)]
    forced = {tuple(prompt): plan for prompt, plan in zip(prompts, plans, strict=True)}
    together = assert_replays(model, prompts, plans=forced)
    alone = assert_replays(model, prompts[:1], plans=forced)
    assert documents(together, prompts)[0] == documents(alone, prompts[:1])[0]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EVERY_ARCHITECTURE)
def test_plans_replay_in_float32(name, attn):
    model = tiny_model(name, attn, torch.float32)
    prompts = [[50] * (1 + 2 * row) + [60 + row] for row in range(len(PLANS))]
    forced = {tuple(prompt): plan for prompt, plan in zip(prompts, PLANS.values(), strict=True)}
    output = assert_replays(model, prompts, 1e-4, forced)
    assert [stats.num_forks for stats in output.stats] == [2, 3, 1, 3, 0]


@pytest.fixture
def plain_flex(monkeypatch) -> list:
    """flex_attention without compiling it: slower than what it is for, exact in float64. Gives the calls."""
    calls = []

    def plain(query, key, value, training=False, **kwargs):
        calls.append(kwargs["block_mask"])
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", plain)
    return calls


def flex_and_dense(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a left-padded batch of documents, by flex_attention and by sdpa."""
    dense, flex = (tiny_model(name, attn, dtype) for attn in ("sdpa", "flex_attention"))
    ids, mask = left_pad(documents(answer(tiny_model("qwen2"), PROMPTS, FORCED), PROMPTS))
    assert ids.shape[1] > 128, "more than one block of a BlockMask"
    with torch.no_grad():
        return tuple(model(input_ids=ids, attention_mask=mask).logits[mask != 0] for model in (flex, dense))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flex_attention_follows_the_layout(name, plain_flex):
    flex, dense = flex_and_dense(name, torch.float64)
    assert (flex - dense).abs().max() < 1e-9
    assert len(plain_flex) == 2, "once a layer"
    assert_replays(tiny_model(name, "flex_attention"), PROMPTS, plans=FORCED)
    assert len(plain_flex) == 4, "the replay went through it"


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma3_text"])
def test_compiled_flex_attention_follows_the_layout(name):
    torch._dynamo.reset()  # kernels of another model's shapes are not to be made to fit
    flex, dense = flex_and_dense(name, torch.float32)
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)


# The engine's own log against the layout


@settings(max_examples=10)
@given(plan=plans)
@example(plan=NESTED)
@example(plan=WIDE)
def test_the_engine_used_the_positions_and_visibility_that_the_layout_gives_its_document(plan):
    model, sequences, forwards = tiny_model("qwen2"), [], []

    class Watched(Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, decoding="simple", **kwargs)

        def add(self, request):
            sequences.append(super().add(request))
            return sequences[-1]

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
    (sequence,) = sequences
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
        seen = {place[column] for column in row.nonzero().flatten().tolist()}
        assert seen == set(dense[place[entry]].nonzero().flatten().tolist())


# Cut off by limits


class StopAt(StoppingCriteria):
    """Stops a branch when its own ids end in a token of a set."""

    def __init__(self, stops: set[int]) -> None:
        self.stops = stops

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row[-1] in self.stops for row in input_ids.tolist()])


LEAST_PATH = empty_path_length(TAGS)
limits = st.one_of(
    st.integers(1, 60).map(lambda n: {"max_new_tokens": n}),
    st.integers(1, 120).map(lambda n: {"max_total_tokens": n}),
    st.integers(LEAST_PATH, 40).map(lambda n: {"max_path_tokens": n}),
    st.tuples(st.integers(5, 60), st.integers(5, 120), st.integers(LEAST_PATH, 40)).map(
        lambda n: {"max_new_tokens": n[0], "max_total_tokens": n[1], "max_path_tokens": n[2]}
    ),
    st.sampled_from([0.0, 1e-4, 0.02]).map(lambda seconds: {"max_time": seconds}),
    st.sets(st.integers(FIRST_TEXT, 95), min_size=8, max_size=24).map(
        lambda stops: {"stopping_criteria": StoppingCriteriaList([StopAt(stops)])}
    ),
    st.just({"max_depth": 1}),
    st.just({"max_paths": 2}),
)


def assert_within(output, prompts: list[list[int]], limit: dict) -> None:
    """Check that documents are well formed and within their limits."""
    for document, stats in zip(documents(output, prompts), output.stats, strict=True):
        parsed = parse_document(text_of(document))
        assert parsed.render() == text_of(document)
        assert stats.malformed == 0
        found = {
            "max_new_tokens": stats.length,
            "max_total_tokens": stats.num_tokens,
            "max_path_tokens": longest_path(document),
            "max_depth": parsed.depth,
            "max_paths": max((len(block.paths) for block, _ in parsed.blocks()), default=0),
        }
        assert {name: found[name] for name in limit if name in found and found[name] > limit[name]} == {}


@pytest.mark.parametrize(
    "limit",
    [
        {"max_new_tokens": 50},
        {"max_total_tokens": 120},
        {"max_path_tokens": 30},
        pytest.param({"max_depth": 1}, marks=pytest.mark.slow),
        {"max_paths": 2},
        {"max_new_tokens": 70, "max_total_tokens": 130, "max_path_tokens": 36, "max_depth": 2, "max_paths": 2},
    ],
    ids=lambda limit: "all" if len(limit) > 1 else next(iter(limit)),
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    slow_unless(["qwen2"], ["qwen2", "gemma3_text", "mistral", "qwen3_moe"]),
)
def test_what_each_limit_cuts_off_is_well_formed_and_replays_alone_and_in_a_batch(name, limit):
    model = tiny_model(name)
    together = assert_replays(model, PROMPTS, plans=FORCED, **limit)
    alone = assert_replays(model, PROMPTS[:1], plans=FORCED, **limit)
    assert_within(together, PROMPTS, limit)
    (document,) = documents(alone, PROMPTS[:1])
    assert document == documents(together, PROMPTS)[0]
    assert document != documents(answer(model, PROMPTS[:1], FORCED), PROMPTS[:1])[0], "the limit is felt"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "mistral"])
@settings(max_examples=40)
@given(plan=plans, other=plans, limit=limits)
def test_what_any_limit_cuts_off_is_well_formed_and_replays(name, plan, other, limit):
    prompts = [PROMPT, [60, 61, 62, 63, 64]]
    output = assert_replays(tiny_model(name), prompts, plans={tuple(PROMPT): plan, tuple(prompts[1]): other}, **limit)
    assert_within(output, prompts, limit)


@pytest.mark.parametrize("max_new_tokens", range(1, 60, 3))
def test_a_wide_nested_block_replays_at_every_budget(max_new_tokens):
    plan = (1, Forced(((3, Forced(((6,), (1,)))), (12,), (2,))), 4)
    output = assert_replays(tiny_model("qwen2"), [PROMPT], plans={tuple(PROMPT): plan}, max_new_tokens=max_new_tokens)
    assert output.stats[0].length <= max_new_tokens


# Prompts that contain blocks, or end inside one


@pytest.mark.parametrize(
    "plan",
    [pytest.param(plan, marks=[pytest.mark.slow] * (name != "sequential"), id=name) for name, plan in PLANS.items()],
)
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
@settings(max_examples=8)
@given(prompts=st.lists(soup, min_size=1, max_size=3))
def test_any_prompt_at_all_that_can_be_closed_is_continued_and_replays(structure, prompts):
    assert_replays(tiny_model("qwen2"), prompts, structure=structure, max_new_tokens=40)


# Left to the model


@pytest.mark.parametrize("structure", ["guided", "lenient", "off"])
@pytest.mark.parametrize("seed", slow_unless([0], range(4)))
def test_what_a_random_model_writes_by_itself_replays(structure, seed):
    model = new_tiny_model("qwen3", seed=seed)
    prompts = [[50, 51], [60, TAGS.open("parallel")], [TAGS.open("think"), 70, 71, 72]]
    sampling = {"do_sample": True, "temperature": 3.0, "seed": seed, "num_return_sequences": 3}
    for options in ({}, sampling):
        assert_replays(model, prompts, structure=structure, max_new_tokens=80, **options)


@pytest.mark.slow
@settings(max_examples=5)
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
    dtype = torch.float32 if name == "qwen3_moe" else torch.float64  # its experts cannot decode in float64 there
    model = new_tiny_model(name, dtype=dtype)
    base = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=dtype).eval()
    base.load_state_dict(model.state_dict())
    prompts = [[50, 51, 52, 53, 54], [60], [TAGS.open("parallel"), TAGS.open("goal")]]
    ids, mask = left_pad(prompts)
    theirs = base.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, structure="off")
    assert ours.tolist() == theirs.tolist()
