"""Drafts change the number of steps and nothing else: tokens, logits, events and limits are those without them."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EOS, TAGS, answer, left_pad
from helpers import tiny_model as new_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import assert_replays
from transformers import AutoTokenizer, LogitsProcessor

from multiverse_hf import MultiverseEngine, MultiverseForCausalLM, embedded_model
from multiverse_hf.modeling.drafts import LONGEST, MARGIN, MOST, StepCosts, allot, find_continuation
from multiverse_hf.modeling.tags import encode_prompt

tiny_model = functools.cache(new_tiny_model)
OPEN = TAGS.open


def fork(num_paths):
    """Return the ids that open a block of so many paths."""
    outlines = [
        [OPEN("outline"), *TAGS.ordinal(number), 70 + number, 71, TAGS.close("outline")]
        for number in range(1, num_paths + 1)
    ]
    return [OPEN("parallel"), OPEN("goal"), *itertools.chain(*outlines), TAGS.close("goal")]


STARTS = [
    [50, 51, 50, 51, 52],
    [60, OPEN("parallel")],
    [OPEN("think"), 70, 71, 72, 70, 71],
    [61, 61, *fork(2)],
    [OPEN("think"), 50, 51, *fork(3)],
]
COSTS = ("num_steps", "num_drafted", "num_accepted")


class Recorder:
    """Keeps the events of a call."""

    def __init__(self) -> None:
        self.events = []

    def on_event(self, event) -> None:
        self.events.append(event)


def written(model, prompts, **options):
    """Return ids, logits, stats and events of the answers, and what their steps cost."""
    recorder = Recorder()
    is_one = len(prompts) == 1 and "num_return_sequences" not in options  # a streamer takes one answer
    output = answer(model, prompts, streamer=recorder if is_one else None, **options)
    stats = [dataclasses.asdict(each) for each in output.stats]
    costs = [{name: each.pop(name) for name in COSTS} for each in stats]
    return (output.sequences.tolist(), stats, recorder.events), output.logits, costs


def assert_same(model, prompts, speculate, **options):
    """Check that an answer with drafts is the one without them, and return the costs of both."""
    plain, logits, slow = written(model, prompts, speculate=0, **options)
    drafted, others, fast = written(model, prompts, speculate=speculate, **options)
    assert drafted == plain
    for ours, theirs in zip(others, logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert all(each["num_drafted"] == 0 for each in slow)
    return slow, fast


@settings(max_examples=4)
@given(
    seed=st.integers(0, 5),
    speculate=st.sampled_from([1, 3, 6, "auto"]),
    starts=st.lists(st.sampled_from(STARTS), min_size=1, max_size=3),
    structure=st.sampled_from(["guided", "lenient", "off"]),
    sampling=st.sampled_from([{}, {"do_sample": True, "temperature": 0.7, "seed": 4, "num_return_sequences": 2}]),
    penalty=st.sampled_from([{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}]),
    limits=st.sampled_from(
        [
            {},
            {"max_path_tokens": 20},
            {"max_total_tokens": 90},
            {"max_branches": 1},
            {"max_depth": 2, "max_paths": 3, "max_path_tokens": 40},
        ]
    ),
)
def test_any_answer_with_drafts_is_the_one_without(seed, speculate, starts, structure, sampling, penalty, limits):
    model = tiny_model("qwen3", seed=seed)
    options = {"structure": structure, "max_new_tokens": 60, **sampling, **penalty, **limits}
    assert_same(model, starts, speculate, **options)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_drafts_are_exact_on_sliding_windows(name):
    assert_same(tiny_model(name), STARTS, 4, max_new_tokens=90)


@pytest.mark.parametrize("structure", ["guided", "off"])
def test_the_logits_of_drafted_tokens_replay(structure):
    starts = STARTS if structure == "guided" else STARTS[:3]  # the replay would lay out a block of a prompt
    assert_replays(tiny_model("qwen2"), starts, structure=structure, max_new_tokens=80, speculate=5)


def test_text_that_repeats_itself_takes_far_fewer_steps():
    slow, fast = assert_same(tiny_model("qwen3"), [[50, 51, 52]], 6, structure="off", max_new_tokens=200)
    assert fast[0]["num_accepted"] > 50
    assert fast[0]["num_steps"] == slow[0]["num_steps"] - fast[0]["num_accepted"]


def test_a_branch_goes_ahead_of_its_siblings():
    waiting = []
    with MultiverseEngine(tiny_model("qwen2")) as engine:
        engine.add_step_callback(
            lambda: waiting.extend(len(each.ready) for one in engine._engine.scheduler.running for each in one.live)
        )
        result = engine.submit(STARTS[-1], max_new_tokens=200, max_path_tokens=80, speculate=1).result(timeout=600)
    assert max(waiting) > 2  # one draft that was right, and the token after it, is what a branch has in one step
    assert result.stats.max_width == 3


@given(
    trusts=st.lists(st.tuples(*[st.sampled_from([0.1, 0.3, 0.5, 1.0])] * 2), max_size=2),
    others=st.integers(0, 3),
    seconds=st.lists(st.floats(0.1, 5), min_size=1, max_size=5),
)
def test_the_number_of_drafts_gives_the_most_tokens_for_the_time(trusts, others, seconds):
    costs = StepCosts()
    for size, each in enumerate(seconds):
        costs.note(2**size, each)
    num_asking = len(trusts) + others

    def rate(counts):
        each = zip(trusts, counts, strict=True)
        right = [trust * flow**place for (trust, flow), most in each for place in range(most)]
        return (num_asking + sum(right)) / costs(np.array([max(num_asking, 1) + sum(counts)]))[0]

    counts = allot(trusts, num_asking, max(num_asking, 1), costs)
    best, none = max(map(rate, itertools.product(range(MOST + 1), repeat=len(trusts)))), rate([0] * len(trusts))
    assert rate(counts) == pytest.approx(best if best > MARGIN * none else none)


def test_a_step_costs_what_it_took_before_and_one_that_is_held_up_counts_little():
    def seconds(*numbers):
        return costs(np.array(numbers)).tolist()

    costs = StepCosts()
    assert seconds(1, 100) == [1.0, 1.0]  # nothing is known
    costs.note(1, 1.0)
    assert seconds(1, 100) == [1.0, 1.0]
    costs.note(6, 2.0)
    assert seconds(1, 3.5, 6, 16) == pytest.approx([1.0, 1.5, 2.0, 4.0])
    costs.note(6, 1000.0)
    assert seconds(6)[0] < 4
    costs.note(16, 0.5)  # no larger step takes less
    assert seconds(16) == seconds(6)


@pytest.mark.slow
def test_the_benchmark_has_all_sides_write_the_same_and_counts_their_steps(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, str(root / "benchmarks/speculation.py"), "--problems", "1", "--batch", "1"]
    command += ["--tokens", "20", "--threads", "1", "--output", "result.json", "--plot", "steps.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    off, auto, fixed = result["answers"]["1"]["sides"].values()
    assert off["drafted"] == 0
    for side in (auto, fixed):
        assert side["steps"] + 10 < off["steps"]
        assert 0 < side["accepted"] < side["drafted"]
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_that_solves_problems_solves_them_with_drafts():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = MultiverseForCausalLM.from_pretrained(embedded_model(), dtype=torch.float64).eval()
    text = "(A=3+4-2; B=5+6) (C=7-2+9; D=1+1) total? Think step by step and in parallel before answering."
    prompt, outputs = torch.tensor([encode_prompt(tokenizer, text)]), []
    for options in ({}, {"stop_strings": ["11"], "tokenizer": tokenizer, "stop_scope": "answer"}):
        for speculate in (0, 4):
            outputs.append(model.generate(prompt, max_new_tokens=400, speculate=speculate, **options))
        assert torch.equal(outputs[-1], outputs[-2])
    assert "Answer: 32" in tokenizer.decode(outputs[0][0])


@pytest.mark.parametrize("decoding", ["packed", "simple", pytest.param("static", marks=pytest.mark.slow)])
def test_preempted_answers_go_on_with_what_was_ready(decoding):
    model = tiny_model("qwen2")
    prompts = [[50 + row, 51, 52] * 3 for row in range(6)]
    results = []
    for speculate in (0, 4):
        with MultiverseEngine(model, max_cache_tokens=200, max_num_seqs=6, decoding=decoding) as engine:
            results.append(
                [
                    each.ids
                    for each in engine.generate(prompts, max_new_tokens=90, speculate=speculate, structure="off")
                ]
            )
            if speculate:
                assert engine.memory()["num_preemptions"] > 0
    assert results[0] == results[1]


@pytest.mark.parametrize("decoding", ["packed", pytest.param("static", marks=pytest.mark.slow)])
@pytest.mark.parametrize("limits", [{"max_new_tokens": 110}, {"max_new_tokens": 90, "max_path_tokens": 30}])
def test_tokens_that_wait_in_blocks_leave_a_full_cache_and_no_answer_hangs(decoding, limits):
    model = tiny_model("qwen2")
    prompts = [[50 + row, 51, *fork(2 + row % 2)] for row in range(3)]
    results = []
    for speculate in (0, 8):
        with MultiverseEngine(model, max_cache_tokens=400, max_num_seqs=3, decoding=decoding) as engine:
            handles = [engine.submit(prompt, speculate=speculate, **limits) for prompt in prompts]
            results.append([handle.result(timeout=300).ids for handle in handles])
            if speculate:
                assert engine.memory()["num_preemptions"] > 0
    assert results[0] == results[1]


class Choosy(LogitsProcessor):
    """Fails where token 50 comes more than nine times in a row."""

    is_stateless = True

    def __call__(self, input_ids, scores):
        if any(token == 50 and len(list(run)) > 9 for token, run in itertools.groupby(input_ids[0].tolist())):
            raise RuntimeError("too often")
        return scores


def test_a_processor_that_fails_on_a_wrong_draft_fails_no_answer():
    model, prompt = tiny_model("qwen3"), [50] * 9
    plain = answer(model, [prompt], structure="off", max_new_tokens=20, logits_processor=[Choosy()])
    assert plain.sequences[0, 9] != 50  # the draft is 50, again
    drafted = answer(model, [prompt], structure="off", max_new_tokens=20, logits_processor=[Choosy()], speculate=4)
    assert drafted.stats[0].num_drafted > 0
    assert torch.equal(plain.sequences, drafted.sequences)
    with pytest.raises(RuntimeError, match="too often"):
        answer(model, [[50] * 10], structure="off", max_new_tokens=20, logits_processor=[Choosy()], speculate=4)


def test_an_answer_that_its_listener_cancels_ends_where_it_ends_without_drafts():
    def listen(event):
        if event.kind == "token" and event.position >= 20:
            handle.cancel()

    ends = []
    for speculate in (0, 6):
        with MultiverseEngine(tiny_model("qwen3")) as engine:
            engine_options = {"max_new_tokens": 500, "speculate": speculate, "structure": "off"}
            handle = engine.submit([50, 51, 52], on_event=listen, **engine_options)
            ends.append(handle.result(timeout=600).ids)
    assert ends[0] == ends[1]


def test_an_answer_that_is_cancelled_keeps_what_is_written_only():
    model = tiny_model("qwen3")
    with MultiverseEngine(model) as engine:
        handle = engine.submit([50, 51, 52], max_new_tokens=5000, speculate=6, structure="off")
        seen = [event.token for event, _ in zip(handle, range(30), strict=False)]
        handle.cancel()
        ids = handle.result(timeout=600).ids
    assert ids[: len(seen)] == seen
    plain = answer(model, [[50, 51, 52]], structure="off", max_new_tokens=len(ids)).sequences[0, 3:].tolist()
    assert ids == plain


def slow_continuation(context, most):
    """Go on as after the last of the longest matches, token by token."""
    end = len(context) - 1

    def length(at):
        equal = (n <= at and context[at - n] == context[end - n] for n in range(LONGEST))
        return len(list(itertools.takewhile(bool, equal)))

    ends = [at for at in range(end) if context[at] == context[end]]
    if not ends:
        return []
    best, text = max(ends, key=lambda at: (length(at), at)), list(context)
    for place in range(most):
        text.append(text[best + 1 + place])
    return text[len(context) :]


@given(context=st.lists(st.integers(0, 3), max_size=40), most=st.integers(1, 6))
def test_a_continuation_is_what_followed_the_last_tokens_before(context, most):
    assert find_continuation(context, most) == slow_continuation(context, most)


@pytest.mark.parametrize("value", [-1, 1.5, True, "on"])
def test_a_wrong_number_of_drafts_is_refused(value):
    ids, mask = left_pad([[50]])
    with pytest.raises(ValueError, match="speculate must be 'auto', 'off' or an integer of at least 0"):
        tiny_model("qwen2").generate(ids, attention_mask=mask, max_new_tokens=2, speculate=value, eos_token_id=EOS)
