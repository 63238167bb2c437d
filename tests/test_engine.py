"""The engine under pressure: admission, chunked prompts, preemption, cancellation, and nothing lost by any of it."""

import asyncio
import contextlib
import copy
import functools
import gc
import logging
import operator
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import COLON, EOS, FIRST_TEXT, PAD, TAGS, slow_unless, text_of
from helpers import tiny_model as new_tiny_model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from transformers import LogitsProcessor

from multiverse_hf import MultiverseForCausalLM
from multiverse_hf.documents import parse_document, validate
from multiverse_hf.modeling import engine as engine_module
from multiverse_hf.modeling.budget import closing_cost, reduce_cost
from multiverse_hf.modeling.cache import SCRATCH, LogCache, bytes_per_entry
from multiverse_hf.modeling.cpu import packed_weights, using
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests
from multiverse_hf.modeling.grammar import Structure
from multiverse_hf.modeling.handles import RequestHandle
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.sampling import choose
from multiverse_hf.modeling.state import Block, Branch, FinishReason, Segment, Sequence, document_entries

tiny_model = functools.cache(new_tiny_model)


class Forky(LogitsProcessor):
    """Makes control tags likely, so that a random model forks and, the likelier the more, comes to an end."""

    def __init__(self, end: float = 1.0) -> None:
        self.end = end

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, TAGS.control_ids] += 3.0
        # one spells nothing; the other would spell labels, which no mask keeps from being spelled twice
        scores[:, [PAD, COLON]] = -torch.inf
        scores[:, EOS] += self.end
        scores[:, TAGS.close("path")] += self.end
        scores[:, TAGS.close("goal")] += self.end
        return scores


def request_of(name: str, prompt: list[int], **options):
    """Read one request as ``generate`` does."""
    options = {"return_dict_in_generate": True, "output_logits": True, "seed": 0} | options
    asked = read_requests(
        tiny_model(name), torch.tensor([prompt]), None, [Forky()], None, options.pop("seed"), options
    )
    return asked.requests[0]


def new_engine(name: str, capacity: int, growable: bool = False, **options) -> Engine:
    model = tiny_model(name)
    return Engine(model, TAGS, LogCache(model.config.num_hidden_layers, capacity, growable), **options)


ARRIVAL = operator.attrgetter("arrival")


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def answer_of(sequence: Sequence) -> list[int]:
    return [sequence.ids[entry] for entry in document_entries(sequence.root)]


@functools.cache
def alone(name: str, prompt: tuple[int, ...], options: tuple) -> Sequence:
    """The oracle: the request by itself, read in one piece, one pass a sequence, the model's own attention."""
    engine = new_engine(name, 64, growable=True, decoding="simple", prefill_chunk=10_000)
    sequence = engine.add(request_of(name, list(prompt), **dict(options)))
    drain(engine)
    return sequence


OUTLINE = [TAGS.open("outline"), 61, TAGS.close("outline")]
GOAL = [60, TAGS.open("parallel"), TAGS.open("goal"), *OUTLINE, *OUTLINE, *OUTLINE]
prompts = st.one_of(
    st.lists(st.integers(FIRST_TEXT, 95), min_size=1, max_size=30),
    st.just(GOAL),
    # in a path, with siblings to come, some tokens from where they begin
    st.integers(1, 12).map(lambda count: [*GOAL, TAGS.close("goal"), *[62] * count]),
)
sampling = st.one_of(
    st.just({}),
    st.integers(0, 5).map(lambda seed: {"do_sample": True, "temperature": 8.0, "seed": seed}),
    st.integers(0, 5).map(lambda seed: {"do_sample": True, "top_k": 30, "repetition_penalty": 1.2, "seed": seed}),
)


class Pressure(RuleBasedStateMachine):
    """Random requests come, go and are cancelled in an engine with little room."""

    name = "qwen2"
    decoding = "packed"
    CAPACITY = 160
    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.engine = new_engine(self.name, self.CAPACITY, max_num_seqs=4, prefill_chunk=7, decoding=self.decoding)
        self.requests: list[tuple[Sequence, tuple[int, ...], tuple]] = []

    @rule(
        target=asked,
        prompt=prompts,
        how=sampling,
        max_new_tokens=st.integers(20, 50),
        structure=st.sampled_from(["guided", "guided", "lenient", "off"]),
    )
    def submit(self, prompt, how, max_new_tokens, structure):
        # what an answer may take in all fits the cache, so that the oracle, which has more room, ends as it does
        options = how | {"max_new_tokens": max_new_tokens, "max_total_tokens": 100, "structure": structure}
        sequence = self.engine.add(request_of(self.name, prompt, **options))
        self.requests.append((sequence, tuple(prompt), tuple(sorted(options.items()))))
        return sequence

    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @rule(sequence=asked)
    def cancel(self, sequence):
        self.engine.cancel(sequence)

    @invariant()
    def no_slot_is_owned_twice_or_leaked(self):
        cache = self.engine.cache
        extents = sorted(cache.extents.values(), key=lambda extent: extent.base)
        ends = [SCRATCH, *(extent.end for extent in extents)]
        assert all(extent.base >= end for extent, end in zip(extents, ends, strict=False))
        assert ends[-1] <= cache.capacity == SCRATCH + self.CAPACITY
        assert set(cache.extents) == {sequence.arrival for sequence in self.engine.scheduler.running}
        for sequence in self.engine.scheduler.running:
            extent = cache.extents[sequence.arrival]
            assert sequence.num_computed <= extent.used <= extent.size

    def teardown(self):
        drain(self.engine)
        assert not self.engine.cache.extents
        for sequence, prompt, options in self.requests:
            assert sequence.error is None
            if sequence.finish is FinishReason.CANCELLED:
                if dict(options)["structure"] == "guided":
                    parse_document(text_of(answer_of(sequence)))
                continue
            oracle = alone(self.name, prompt, options)
            assert answer_of(sequence) == answer_of(oracle)
            assert sequence.stats == oracle.stats
            assert sequence.logits.keys() == oracle.logits.keys()
            for entry, logits in sequence.logits.items():
                assert (logits - oracle.logits[entry]).abs().max() < 1e-9


class PressureOnStaticShapes(Pressure):
    """What a GPU replays as graphs, without the graphs."""

    name = "llama"
    decoding = "static"


class PressureOnSlidingWindows(Pressure):
    name = "gemma3_text"


Pressure.TestCase.settings = settings(max_examples=5, stateful_step_count=30, deadline=None)
PressureOnSlidingWindows.TestCase.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
PressureOnStaticShapes.TestCase.settings = settings(max_examples=8, stateful_step_count=20, deadline=None)
TestPressure = Pressure.TestCase
TestPressureOnStaticShapes = pytest.mark.slow(PressureOnStaticShapes.TestCase)
TestPressureOnSlidingWindows = pytest.mark.slow(PressureOnSlidingWindows.TestCase)


@pytest.mark.long
def test_pressure_for_thousands_of_steps():
    class Long(Pressure):
        pass

    Long.TestCase.settings = settings(max_examples=200, stateful_step_count=80, deadline=None)
    Long.TestCase("runTest").runTest()


def test_a_preempted_answer_is_the_same_and_the_last_come_gives_way():
    engine = new_engine("qwen2", 120, max_num_seqs=8, prefill_chunk=16)
    asked = [[70 + n] * 12 for n in range(6)]
    options = {"max_new_tokens": 40, "max_total_tokens": 90, "do_sample": True, "temperature": 8.0}
    sequences = [engine.add(request_of("qwen2", prompt, **options)) for prompt in asked]
    victims, scheduler = [], engine.scheduler
    preempt = scheduler._preempt

    def note():
        victims.append((preempt(), max(scheduler.running, key=ARRIVAL)))
        return victims[-1][0]

    scheduler._preempt = note
    drain(engine)
    assert len(victims) == scheduler.num_preemptions > 0
    for victim, last_left in victims:
        assert victim.arrival > last_left.arrival
    for sequence, prompt in zip(sequences, asked, strict=True):
        oracle = alone("qwen2", tuple(prompt), tuple(sorted(options.items())))
        assert answer_of(sequence) == answer_of(oracle)
        assert sequence.stats == oracle.stats


def brute_room(sequence: Sequence) -> int:
    """What the model may still choose: what is left once all is closed, from the tree of segments and each branch."""
    open_blocks, stack = [], [sequence.root]
    while stack:
        segment = stack.pop()
        if (block := segment.block) is not None:
            stack += [block.reduced] if block.reduced is not None else block.paths
            open_blocks += [block] if block.reduced is None else []
    states = [branch.structure for branch in sequence.live]
    states += [block.structure.for_path(path) for block, path in sequence.held]
    closing = sum(closing_cost(state)[0] for state in states)
    closing += sum(reduce_cost(block.structure, block.structure.depth - 1) for block in open_blocks)
    return sequence.budget.tokens - sequence.num_written - closing


@pytest.mark.parametrize("max_branches", [1, 2, 5])
@pytest.mark.parametrize("seed", slow_unless([0], range(3)))
def test_paths_that_wait_write_what_they_would_have_written_at_once(max_branches, seed):
    options = {"max_new_tokens": 50, "max_total_tokens": 4000, "do_sample": True, "temperature": 8.0, "seed": seed}
    has_waited = False
    for prompt in (GOAL, [*GOAL, TAGS.close("goal"), 62], [60, *nested(2, 4)]):
        engine = new_engine("qwen2", 4000)
        sequence = engine.add(request_of("qwen2", prompt, max_branches=max_branches, **options))
        while engine.has_work:
            has_waited |= bool(sequence.held)
            engine.step()
            assert len(sequence.live) <= max_branches
            assert sequence.error is not None or sequence.budget.room == brute_room(sequence)
        oracle = alone("qwen2", tuple(prompt), tuple(sorted(options.items())))
        assert answer_of(sequence) == answer_of(oracle)
        for name in ("num_tokens", "length", "num_forks", "depth", "finish_reason", "closed_by"):
            assert getattr(sequence.stats, name) == getattr(oracle.stats, name)
        assert sequence.stats.max_width <= max(max_branches, 1)
        for mine, theirs in zip(document_entries(sequence.root), document_entries(oracle.root), strict=True):
            if theirs in oracle.logits:
                assert (sequence.logits[mine] - oracle.logits[theirs]).abs().max() < 1e-9
    assert has_waited


@pytest.mark.parametrize("max_branches", [2, 256])
@pytest.mark.parametrize("budget", slow_unless([60, 160], [60, 100, 160, 240]))
def test_what_closing_takes_is_kept_account_of_to_the_token(max_branches, budget):
    prompt = [60, *nested(2, 3)]
    options = {"max_new_tokens": 80, "max_total_tokens": budget, "do_sample": True, "temperature": 8.0}
    seen = 0
    for seed in range(4):
        engine = new_engine("qwen2", 4000)
        sequence = engine.add(request_of("qwen2", prompt, max_branches=max_branches, seed=seed, **options))
        while engine.has_work:
            engine.step()
            assert sequence.budget.room == brute_room(sequence) >= 0
            seen += 1
        assert sequence.num_written <= budget
        parse_document(text_of(answer_of(sequence)))
    assert seen > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "max_branches", "least_held"),
    [({}, 256, 0), ({"max_branches": 20, "max_total_tokens": 12_000}, 20, 100)],
)
def test_a_model_that_never_stops_forking_is_bounded(options, max_branches, least_held):
    class Bomb(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, TAGS.open("parallel")] += 1e4
            scores[:, [TAGS.open("goal"), TAGS.open("outline")]] += 1e4
            scores[:, TAGS.close("goal")] += 5e3
            scores[input_ids[:, -1] == TAGS.open("outline"), 61] += 1e6
            scores[input_ids[:, -1] == 61, TAGS.close("outline")] += 1e6
            scores[:, EOS] = -1e9
            return scores

    (request,) = read_requests(
        tiny_model("qwen2"), torch.tensor([[60]]), None, [Bomb()], None, 0, {"max_new_tokens": 2000} | options
    ).requests
    engine = new_engine("qwen2", 64, growable=True)
    sequence = engine.add(request)
    most_read = most_held = 0
    while engine.has_work:
        engine.step()
        most_read, most_held = max(most_read, len(sequence.pending)), max(most_held, len(sequence.held))
    assert most_held >= least_held
    assert sequence.stats.max_width == request.options.max_branches == max_branches
    assert most_read < 12 * max_branches, "a step reads no more than what its branches have begun"
    assert sequence.num_written <= request.max_total_tokens
    parse_document(text_of(answer_of(sequence)))


def nested(depth: int, width: int) -> list[int]:
    """A goal inside the first path of another."""
    goal = [TAGS.open("parallel"), TAGS.open("goal"), *OUTLINE * width, TAGS.close("goal")]
    return goal if depth == 1 else [*goal, TAGS.open("path"), *nested(depth - 1, width)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_static_shapes_are_few_and_choose_the_same():
    engine = new_engine("qwen2", 1000, decoding="static")
    options = {"max_new_tokens": 60, "max_total_tokens": 300, "do_sample": True, "temperature": 8.0}
    asked = [GOAL, [60, 61], [*GOAL, TAGS.close("goal")]]
    sequences = [engine.add(request_of("qwen2", prompt, **options)) for prompt in asked]
    drain(engine)
    assert engine.num_steps > 3 * len(engine.runner.shapes) > 0
    for sequence, prompt in zip(sequences, asked, strict=True):
        oracle = alone("qwen2", tuple(prompt), tuple(sorted(options.items())))
        assert answer_of(sequence) == answer_of(oracle)
        for entry, logits in sequence.logits.items():
            assert (logits - oracle.logits[entry]).abs().max() < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 4, 6])  # of one key head 1, 2, and 3, which the kernel for few queries cannot
def test_graphs_on_a_gpu_choose_the_same_with_one_copy_to_the_host_a_step(heads):
    # flex_attention on a GPU takes heads of 16 and more
    model = new_tiny_model("qwen2", dtype=torch.float32, num_attention_heads=heads, head_dim=16).cuda()
    prompts = [torch.tensor(GOAL), torch.tensor([60, 61])]
    options = {"max_new_tokens": 60, "max_total_tokens": 300, "seed": 1, "do_sample": True, "temperature": 8.0}
    answers = {}
    for decoding in ("static", "packed"):
        with MultiverseEngine(model, max_cache_tokens=1000, decoding=decoding) as front:
            front.generate(prompts, **options)  # kernels are compiled, graphs captured
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                steps = front._engine.num_steps
                answers[decoding] = [result.ids for result in front.generate(prompts, **options)]
                steps = front._engine.num_steps - steps
            copies = sum("DtoH" in event.key and event.count for event in profile.key_averages())
            assert copies <= steps
            assert front._engine.runner.name == decoding, "nothing fell back"
    assert answers["static"] == answers["packed"]


def test_a_long_prompt_is_read_in_chunks_while_others_write():
    engine = new_engine("qwen2", 1000, prefill_chunk=8)
    short = engine.add(request_of("qwen2", [60], max_new_tokens=30, structure="off"))
    engine.step()
    long = engine.add(request_of("qwen2", [61] * 80, max_new_tokens=5, structure="off"))
    written = []
    while long.num_written == 0:
        before = short.num_written
        engine.step()
        written.append(short.num_written - before)
    assert len(written) == 10
    assert set(written) == {1}, "the one that runs writes a token at every step"


def test_what_never_fits_is_refused_with_the_numbers():
    engine = new_engine("qwen2", 50)
    with pytest.raises(ValueError, match="has 60 tokens and the engine's cache holds 50"):
        engine.add(request_of("qwen2", [60] * 60, max_new_tokens=5))


def test_an_answer_that_fills_the_whole_cache_is_closed_well():
    engine = new_engine("qwen2", 60)
    sequence = engine.add(request_of("qwen2", [60] * 20, max_new_tokens=500, do_sample=True, temperature=8.0, seed=4))
    drain(engine)
    assert sequence.stats.finish_reason in (FinishReason.CACHE, FinishReason.STOP)
    assert len(sequence.ids) <= 60
    parse_document(text_of(answer_of(sequence)))


def test_a_pool_that_is_moved_together_keeps_its_contents():
    cache = LogCache(1, 30)
    (layer,) = cache.layers
    states = torch.arange(31.0).reshape(1, 1, 31, 1)
    for owner in range(3):
        assert cache.reserve(owner, 5, 10)
    layer.lazy_initialization(states, states)
    layer.keys[:] = states
    layer.values[:] = -states
    held = {owner: layer.keys[0, 0, e.base : e.base + e.used, 0].clone() for owner, e in cache.extents.items()}
    assert cache.reserve(1, 18), "the spare room of the others is given back"
    assert not cache.reserve(0, 13)
    assert (cache.num_used, cache.num_free) == (28, 2)
    for owner, extent in cache.extents.items():
        used = slice(extent.base, extent.base + 5)
        assert layer.keys[0, 0, used, 0].tolist() == held[owner].tolist()
        assert layer.values[0, 0, used, 0].tolist() == (-held[owner]).tolist()


def test_logs_that_grow_together_are_seldom_moved(monkeypatch):
    cache = LogCache(1, 8 * 100 + 20)
    (layer,) = cache.layers
    moves = []
    monkeypatch.setattr(layer, "move", lambda source, _: moves.append(len(source)))
    for length in range(40, 101):
        assert all(cache.reserve(owner, length, length + length // 2 + 64) for owner in range(8))
    assert cache.num_used == 800
    assert sum(moves) <= 8 * cache.num_used, "each entry moves a few times, not at every step"


# The front: threads, handles, coroutines


@pytest.fixture
def front():
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=600, max_num_seqs=8, prefill_chunk=32) as engine:
        yield engine


OPTIONS = {"max_new_tokens": 30, "max_total_tokens": 100, "do_sample": True, "temperature": 8.0}


def same_as_generate(result, seed: int = 0, **options) -> bool:
    output = tiny_model("qwen2").generate(torch.tensor([result.prompt_ids]), seed=seed, **(OPTIONS | options))
    return output[0, len(result.prompt_ids) :].tolist() == result.ids


def test_submit_gives_what_generate_gives(front):
    handles = [front.submit([60 + n, 61], seed=n, logits_processor=[Forky()], **OPTIONS) for n in range(12)]
    for seed, handle in enumerate(handles):
        result = handle.result(timeout=1800)
        assert same_as_generate(result, seed, logits_processor=[Forky()])
        assert len(result.ids) == len(result.sampled) == len(result.branches) == result.stats.num_tokens
    assert any(result.stats.num_forks for result in (handle.result() for handle in handles))
    assert front.memory()["used_tokens"] == 0


def test_events_tell_the_whole_answer(front):
    handle = front.submit([60, 61], seed=4, logits_processor=[Forky()], logprobs=3, **OPTIONS)
    events = list(handle)
    result = handle.result()
    tokens = [event for event in events if event.kind == "token"]
    assert sorted(zip(result.branches, result.ids, strict=True)) == sorted((e.branch, e.token) for e in tokens)
    assert (events[-1].kind, events[-1].finish_reason) == ("finish", result.finish_reason)
    assert list(handle) == events, "they may be read again"
    for event in tokens:
        assert (event.scores is not None) == event.sampled
    for scores, token in zip(result.scores, result.ids, strict=True):
        if scores is not None:
            assert len(scores.top) == 3
            assert scores.entropy >= 0 >= scores.logprob
            assert scores.logprob == dict(scores.top).get(token, scores.logprob)


def test_events_come_in_the_engines_thread_from_the_first_on(front):
    seen = []
    handle = front.submit(
        [*GOAL, TAGS.close("goal")], on_event=lambda event: seen.append((threading.get_ident(), event)), **OPTIONS
    )
    handle.result(timeout=1800)
    assert {thread for thread, _ in seen} == {front._thread.ident}
    fork, *first = [event for _, event in seen[:4]]
    assert (fork.kind, fork.branch) == ("fork", ""), "the block that the prompt leaves open"
    assert [(event.kind, event.branch, event.sampled) for event in first] == [("token", "1", False)] * 3


def test_log_probabilities_are_those_of_the_logits(front):
    result = front.submit([60, 61], logprobs=0, output_logits=True, **OPTIONS).result(timeout=1800)
    for token, scores, logits in zip(result.ids, result.scores, result.logits, strict=True):
        if logits is not None:
            logprobs = logits.log_softmax(-1)
            assert scores.logprob == pytest.approx(logprobs[token].item())
            assert scores.entropy == pytest.approx(-(logprobs.exp() * logprobs).sum().item())


def test_coroutines_wait_without_blocking(front):
    async def read(seed: int) -> tuple[int, list[int]]:
        handle = front.submit([60, 61], seed=seed, **OPTIONS)
        count = 0
        async for event in handle:
            count += event.kind == "token"
        return count, (await handle).ids

    async def main():
        return await asyncio.gather(*(read(seed) for seed in range(5)))

    for count, ids in asyncio.run(main()):
        assert count == len(ids)


@pytest.mark.parametrize("where", ["waiting", "body", "timeout"])
def test_a_task_that_is_cancelled_while_it_reads_cancels_its_request(front, where):
    async def read(handle) -> None:
        async for _ in handle:
            if where == "body":
                await asyncio.sleep(60)

    async def main() -> str:
        handle = front.submit([60, 61], max_new_tokens=1500, structure="off", eos_token_id=None)
        if where == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(read(handle), 0.05)
        else:
            task = asyncio.create_task(read(handle))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return (await handle).finish_reason

    assert asyncio.run(main()) == "cancelled"


def test_a_loop_that_ends_early_leaves_its_request_running(front):
    async def main() -> tuple[str, int]:
        handle = front.submit([60, 61], max_new_tokens=30, structure="off", eos_token_id=None)
        async for _ in handle:
            break
        result = await handle
        return result.finish_reason, len(result.ids)

    assert asyncio.run(main())[1] == 30


def test_a_closed_engine_takes_nothing_and_leaves_nothing_waiting():
    engine = MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=5000)
    handles = [engine.submit([60], max_new_tokens=4000, structure="off", eos_token_id=None) for _ in range(3)]
    engine.close()
    assert {handle.result(timeout=1800).finish_reason for handle in handles} <= {"cancelled", "max_cache_tokens"}
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([60])


def test_an_engine_that_nobody_holds_is_let_go():
    engine = MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=600)
    engine.generate([[60]], max_new_tokens=4)
    thread = engine._thread
    del engine
    gc.collect()
    thread.join(timeout=1800)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ValueError('a bug of the user')"])
def test_an_engine_at_work_does_not_spoil_the_interpreters_exit(end):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from helpers import tiny_model
from multiverse_hf import MultiverseEngine
engine = MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=5000)
handle = engine.submit([60], max_new_tokens=4000, structure="off", eos_token_id=None)
next(iter(handle))
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1), done.stderr
    assert "terminate" not in done.stderr


def test_equal_prompts_and_copies_get_noise_of_their_own(front):
    options = OPTIONS | {"logits_processor": [Forky()], "seed": 3}
    results = front.generate([[60, 61], [60, 61]], num_return_sequences=2, **options)
    texts = [result.ids for result in results]
    assert len({tuple(ids) for ids in texts}) == 4
    output = tiny_model("qwen2").generate(torch.tensor([[60, 61]] * 2), num_return_sequences=2, **options)
    assert [ids[: len(text)] for ids, text in zip(output[:, 2:].tolist(), texts, strict=True)] == texts
    torch.manual_seed(0)
    drawn = [front.submit([60, 61], **OPTIONS).result(timeout=1800).ids for _ in range(3)]
    assert len({tuple(ids) for ids in drawn}) > 1


def test_awaiting_that_is_cancelled_cancels_the_request(front):
    async def main():
        handle = front.submit([60], max_new_tokens=500, structure="off", eos_token_id=None)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.01)
        return handle

    handle = asyncio.run(main())
    assert handle.result(timeout=1800).finish_reason == FinishReason.CANCELLED


def test_requests_are_answered_first_come_first_served():
    ended = []
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=600, max_num_seqs=1) as engine:

        def listen(number: int):
            return lambda event: ended.append(number) if event.kind == "finish" else None

        handles = [engine.submit([60 + n], on_event=listen(n), **OPTIONS) for n in range(6)]
        for handle in handles:
            handle.result(timeout=1800)
    assert ended == list(range(6))


@pytest.mark.parametrize("decoding", [None, "simple"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_the_cache_takes_the_memory_that_it_is_given(decoding, tokens):
    model = tiny_model("qwen2")
    given = tokens * bytes_per_entry(model) + 3
    with MultiverseEngine(model, cache_memory=given, decoding=decoding) as engine:
        assert engine.max_cache_tokens == tokens
        assert engine.capacity_bytes == given - 3


def test_an_engine_says_once_how_it_decodes():
    model, said = tiny_model("qwen2"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("multiverse_hf.modeling.multiverse_engine")
    logger.addHandler(handler)
    try:
        for decoding in (None, "simple", None, "simple"):
            MultiverseEngine(model, max_cache_tokens=611, decoding=decoding).close()
    finally:
        logger.removeHandler(handler)
    packed, simple = said
    assert packed.startswith("MultiverseEngine: packed decoding with sdpa attention on cpu; cache of 611 tokens")
    assert simple.startswith("MultiverseEngine: simple decoding with sdpa attention on cpu; cache of 611 tokens")


def test_a_closed_engine_gives_its_memory_back():
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=5000) as engine:
        engine.generate([[60]], max_new_tokens=5)
        assert engine._engine.cache.layers[0].keys is not None
    assert engine._engine.cache.layers[0].keys is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cache_tokens": 10**12}, "GiB are free"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_cache_tokens": 5, "cache_memory": 5}, "not both"),
        ({"cache_memory": 5}, "one takes"),
        ({"decoding": "fast"}, "'packed', 'static' or 'simple'"),
        ({"pack_weights": True}, "bfloat16"),
    ],
)
def test_bad_engine_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiverseEngine(tiny_model("qwen2"), **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ("text", {}, "without a tokenizer"),
        ([[60], [61]], {}, "submit takes one prompt, got 2"),
        ([60], {"streamer": None}, "takes no streamer"),
        ([60], {"logprobs": -1}, "logprobs"),
        ([60], {"max_new_token": 3}, "did you mean max_new_tokens"),
        ([60], {"num_return_sequences": 2, "do_sample": True}, "submit each"),
        ([60] * 700, {}, "700 tokens and the engine's cache holds 600"),
    ],
)
def test_bad_requests_are_refused_at_once(front, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        front.submit(prompt, **options)
    assert front.memory()["num_waiting"] == 0


class Raises(LogitsProcessor):
    """Fails once an answer has some tokens."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.after:
            raise RuntimeError("a broken processor")
        return scores


@pytest.mark.slow
def test_overload():
    """200 requests of mixed size with room for 20, a tenth cancelled, one that raises: nobody else notices."""
    chance, results = random.Random(0), {}
    long = OPTIONS | {"max_new_tokens": 50, "max_total_tokens": 150}
    asked = [[chance.randrange(FIRST_TEXT, 96) for _ in range(chance.randrange(1, 40))] for _ in range(200)]
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=600, max_num_seqs=20) as engine:
        memory, lock = [], threading.Lock()
        engine._engine.on_step = lambda: memory.append(engine.memory())

        def cancel_after(number: int, left: int):
            """Cancel a tenth: while they wait, read or write."""

            def listen(event):
                nonlocal left
                left -= event.kind == "token"
                if left == 0 and number in results:
                    results[number].cancel()

            return listen

        def ask(numbers: range) -> None:
            for number in numbers:
                processors = [Raises(len(asked[number]) + 3)] if number == 77 else [Forky(0.0)]
                options = long | {"structure": "off"} if number == 77 else long
                listen = cancel_after(number, number % 30) if number % 10 == 3 else None
                handle = engine.submit(
                    asked[number], seed=number, logits_processor=processors, on_event=listen, **options
                )
                with lock:
                    results[number] = handle
                if number % 30 == 3:
                    handle.cancel()

        threads = [threading.Thread(target=ask, args=(range(start, 200, 4),)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(RuntimeError, match="a broken processor"):
            results[77].result(timeout=1800)
        done = {number: handle.result(timeout=1800) for number, handle in results.items() if number != 77}
        assert engine.memory()["used_by"] == []
        assert engine.memory()["num_preemptions"] > 0
        used = [each["used_bytes"] for each in memory]
        assert 0 < max(used) <= engine.capacity_bytes == 600 * engine.bytes_per_token, (
            "at no step more than it may take"
        )
        assert all(each["used_tokens"] == sum(each["used_by"]) <= 600 for each in memory)
        pool = engine._engine.cache.layers[0].keys
        assert pool.shape[2] <= 600 + SCRATCH, "and no more is held"
    for number, result in done.items():
        if result.finish_reason != FinishReason.CANCELLED:
            assert same_as_generate(result, number, logits_processor=[Forky(0.0)], **long)
    cancelled = [result for result in done.values() if result.finish_reason == FinishReason.CANCELLED]
    assert len(cancelled) <= 20
    assert any(result.ids for result in cancelled), "some had begun"


def test_requests_with_processors_of_their_own_share_one_copy_to_the_host_a_step(monkeypatch):
    engine = new_engine("qwen2", 4000)
    ways = ({"repetition_penalty": 1.3}, {"top_k": 20, "do_sample": True}, {}, {"do_sample": True, "temperature": 2.0})
    asked = [([60 + row, 61], how | {"seed": row, "max_new_tokens": 20}) for row, how in enumerate(ways * 2)]
    sequences = [engine.add(request_of("qwen2", prompt, **options)) for prompt, options in asked]
    rows = []
    monkeypatch.setattr(
        engine_module, "choose", lambda scores, *more: rows.append(len(scores)) or choose(scores, *more)
    )
    drain(engine)
    assert len(rows) == engine.num_steps
    assert max(rows) >= len(asked)
    for sequence, (prompt, options) in zip(sequences, asked, strict=True):
        assert answer_of(sequence) == answer_of(alone("qwen2", tuple(prompt), tuple(sorted(options.items()))))


def test_a_path_that_a_limit_cuts_says_which():
    limits = {"max_path_tokens": 14, "max_new_tokens": 200, "structure": "guided"}
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=600) as engine:
        handle = engine.submit([*GOAL, TAGS.close("goal")], **limits)
        closed = [event for event in handle if event.kind == "close"]
        stats = handle.result(timeout=1800).stats
    cut = [event for event in closed if event.finish_reason is not None]
    assert {event.finish_reason for event in cut} == {FinishReason.PATH}
    assert stats.closed_by == {"max_path_tokens": len(cut)}
    assert stats.num_closed == len(cut) >= 1
    assert stats.finish_reason != FinishReason.PATH


def random_documents(count: int) -> None:
    """Sample documents of a random model, guided, at temperature 2: all must parse, and be fit for training unless a
    limit cut them."""
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=20_000, max_num_seqs=64) as engine:
        handles = [
            engine.submit(
                [60], seed=seed, do_sample=True, temperature=2.0, max_new_tokens=200, logits_processor=[Forky(2.0)]
            )
            for seed in range(count)
        ]
        num_forks = num_whole = 0
        for handle in handles:
            result = handle.result(timeout=1800)
            document = parse_document(text_of(result.ids))
            if result.finish_reason == FinishReason.STOP and not result.stats.num_closed:
                assert validate(document, max_depth=4) == []
                num_whole += 1
            num_forks += result.stats.num_forks
            assert result.stats.malformed == 0
        assert num_forks > count // 4
        assert num_whole > count // 2
        assert engine.memory()["used_tokens"] == 0
        assert not engine._handles


@pytest.mark.slow
def test_guided_documents_of_a_random_model_parse():
    random_documents(200)


@pytest.mark.long
def test_ten_thousand_guided_documents_parse():
    random_documents(10_000)


@pytest.mark.long
def test_after_ten_thousand_random_requests_memory_returns():
    """Of all kinds and sizes, some cancelled, some that fail, some refused."""
    kinds = (Sequence, Branch, Block, Segment, RequestHandle)

    def held() -> dict[str, int]:
        gc.collect()
        objects = gc.get_objects()
        return {kind.__name__: sum(type(each) is kind for each in objects) for kind in kinds}

    chance, before, peaks = random.Random(0), held(), []
    ways = ({}, {"do_sample": True, "temperature": 8.0}, {"repetition_penalty": 1.2}, {"max_branches": 2})
    with MultiverseEngine(tiny_model("qwen2"), max_cache_tokens=3000, max_num_seqs=32) as engine:
        for _ in range(100):
            handles = []
            for _ in range(100):
                text = [chance.randrange(FIRST_TEXT, 96) for _ in range(chance.randrange(1, 60))]
                prompt = chance.choice([text, text, GOAL, [*GOAL, TAGS.close("goal"), 62]])
                processors = [Raises(len(prompt) + 4)] if chance.random() < 0.02 else [Forky()]
                options = {
                    **{
                        "structure": chance.choice(["guided", "guided", "lenient", "off"]),
                        "logits_processor": processors,
                    },
                    **{"max_new_tokens": chance.randrange(30, 60), "max_total_tokens": chance.randrange(80, 400)},
                    **{"logprobs": chance.choice([None, 2]), "seed": chance.randrange(1 << 30)},
                }
                try:
                    handles.append(engine.submit(prompt, **options, **chance.choice(ways)))
                except ValueError:  # no room to close what the prompt leaves open
                    continue
                if chance.random() < 0.1:
                    handles[-1].cancel()
            for handle in handles:
                with contextlib.suppress(RuntimeError):  # those whose processor is broken
                    handle.result(timeout=1800)
            assert engine.memory()["used_by"] == []
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    del engine, handle, handles
    assert held() == before
    assert peaks[-1] - peaks[20] < 64 << 10, "KiB: what is taken at first is enough for all that follow"


# The engine beside other users of its model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_others_may_use_the_model_while_an_engine_steps(attention):
    model = new_tiny_model("qwen2", attn=attention)
    outlines = [TAGS.open("outline"), 61, TAGS.close("outline")] * 2
    path = [62, TAGS.close("path")]
    document = torch.tensor(
        [[60, TAGS.open("parallel"), TAGS.open("goal"), *outlines, TAGS.close("goal"), *path, *path]]
    )
    expected = model(document).logits
    with MultiverseEngine(model, max_cache_tokens=4000) as engine:
        handle = engine.submit([60], max_new_tokens=3000, structure="off", eos_token_id=None)
        next(iter(handle))
        for _ in range(60):
            logits = model(document).logits
            assert torch.equal(logits, expected)
        logits.sum().backward()
        second = MultiverseEngine(model, max_cache_tokens=500)
        assert second.generate([[60]], max_new_tokens=5)
        second.close()
        handle.cancel()


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, RuntimeError])
def test_whatever_a_callback_raises_concerns_its_own_request_alone(front, error):
    def raise_it(event):
        if event.kind == "token":
            raise error

    good, bad = front.submit([60], **OPTIONS), front.submit([61], on_event=raise_it, **OPTIONS)
    with pytest.raises(error):
        bad.result(timeout=1800)
    assert good.result(timeout=1800).ids
    assert front.submit([62], **OPTIONS).result(timeout=1800).ids


def test_wide_goals_of_many_siblings_keep_within_the_budget():
    """Each sibling is in the middle of a goal: closing them all takes far more than what they have written."""
    width, outline = 24, [TAGS.open("outline"), 61, TAGS.close("outline")]
    goal = [60, TAGS.open("parallel"), TAGS.open("goal"), *outline * width, TAGS.close("goal")]

    class WideGoals(LogitsProcessor):
        def __call__(self, input_ids, scores):
            out = scores.clone()
            for row, ids in enumerate(input_ids.tolist()):
                if ids[-1] == COLON:
                    out[row, TAGS.open("parallel")] += 1e4
                out[row, [TAGS.open("goal"), TAGS.open("outline")]] += 1e4
                if ids[-1] == TAGS.open("outline"):
                    out[row, 61] += 1e5
                elif ids[-1] == 61:
                    out[row, TAGS.close("outline")] += 1e5
            return out

    model = tiny_model("qwen2")
    output = model.generate(
        torch.tensor([goal]), logits_processor=[WideGoals()], max_new_tokens=600, max_paths=100,
        max_total_tokens=4000, return_dict_in_generate=True,
    )  # fmt: skip
    (stats,) = output.stats
    assert stats.num_tokens <= 4000
    parse_document(text_of(output.sequences[0].tolist()))


def test_a_long_label_does_not_make_siblings_twins():
    digits = [TAGS.digits[digit][0] for digit in "12345"]
    dotted = [token for digit in digits for token in (digit, *TAGS.digits["."])][:-1]
    first = [TAGS.open("outline"), *dotted, *TAGS.colon, 61, TAGS.close("outline")]
    second = [TAGS.open("outline"), digits[0], *TAGS.colon, 62, TAGS.close("outline")]
    structure = Structure(TAGS)
    for token in [TAGS.open("parallel"), TAGS.open("goal"), *first, *second, TAGS.close("goal")]:
        structure.feed(token)
    assert structure.path_prefix(0) != structure.path_prefix(1)


BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packable_model() -> torch.nn.Module:
    """Make a bfloat16 model whose layers are large enough to pack."""
    config = copy.deepcopy(tiny_model("qwen2").config)
    config.hidden_size, config.intermediate_size = 512, 512
    return MultiverseForCausalLM.from_config(config, TAGS, dtype=torch.bfloat16).eval()


def own_forwards(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.skipif(not BF16, reason="needs a CPU with bfloat16 instructions")
def test_packed_weights_answer_alike_and_leave_the_model_as_it_was():
    model = packable_model()
    ids = torch.tensor([[60, 61, 62]])
    with torch.no_grad():
        expected = model(ids).logits
        with using(packed_weights(model)):
            assert len(own_forwards(model)) > 4
            for some in (ids, ids[:, :2], ids[:, :2].T, ids[:, :1]):  # two rows are multiplied otherwise
                alike = copy.deepcopy(model)(some).logits
                assert (model(some).logits - alike).abs().max() < 0.05
            assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        assert not own_forwards(model)
        assert torch.equal(model(ids).logits, expected)
    with using(packed_weights(model)):
        model(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def train_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[60, 61, 62]])).logits.float().sum().backward()
    optimizer.step()


def load_others(model):
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()})


def assign_others(model):
    model.load_state_dict({name: weight + 0.01 for name, weight in model.state_dict().items()}, assign=True)


def cast_and_back(model):
    model.float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.bfloat16()


def merge_an_adapter(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    assert adapted.merge_and_unload() is model


def write_to_data(model):
    model.base_model.layers[0].mlp.up_proj.weight.data.mul_(1.01)


@pytest.mark.skipif(not BF16, reason="needs a CPU with bfloat16 instructions")
@pytest.mark.parametrize(
    "change", [train_a_step, load_others, assign_others, cast_and_back, merge_an_adapter, write_to_data]
)
def test_packed_weights_are_kept_until_a_weight_changes(change):
    model = packable_model()
    first = packed_weights(model)
    assert first
    assert all(old is new for old, new in zip(first, packed_weights(model), strict=True))
    change(model)
    second = packed_weights(model)
    assert {each.module for each in second} == {each.module for each in first}
    assert not all(old is new for old, new in zip(first, second, strict=True))
    for each in second:
        rows = torch.randn(3, each.module.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            expected = each.module(rows)
            assert (each(rows) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_weights_are_looked_at_when_answers_begin_and_not_while_nothing_is_to_do(monkeypatch):
    looks = []
    monkeypatch.setattr(engine_module, "packed_weights", lambda model: looks.append(model) or [])
    engine = new_engine("qwen2", 200)
    for expected in (0, 1, 2):
        assert len(looks) == expected
        for _ in range(3):
            engine.step()  # nothing to do
        assert len(looks) == expected
        engine.add(request_of("qwen2", [60], max_new_tokens=5))
        drain(engine)


@pytest.mark.skipif(not BF16, reason="needs a CPU with bfloat16 instructions")
def test_generate_packs_once_and_again_after_training():
    model = packable_model()
    ids = torch.tensor([[60, 61, 62]])
    first = model.generate(ids, max_new_tokens=4, do_sample=False, structure="off")
    packed = packed_weights(model)
    model.generate(ids, max_new_tokens=4, do_sample=False, structure="off")
    assert all(old is new for old, new in zip(packed, packed_weights(model), strict=True))
    assert not own_forwards(model)
    train_a_step(model)
    model.generate(ids, max_new_tokens=4, do_sample=False, structure="off")
    assert not any(old is new for old, new in zip(packed, packed_weights(model), strict=True))
    assert first.shape == (1, 7)
