"""What ``generate`` does: DESIGN's table of rules, sampling and streaming."""

import functools
from collections import Counter

import pytest
import torch
from helpers import (
    COLON,
    EOS,
    FIRST_TEXT,
    NEWLINE,
    PAD,
    TAGS,
    Forced,
    answer,
    documents,
    slow_unless,
    text_of,
)
from helpers import tiny_model as new_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

from multiverse_hf import MultiverseForCausalLM
from multiverse_hf.checkpoints import EMBEDDED
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.documents import parse_document
from multiverse_hf.modeling.budget import closing_positions, empty_path_length
from multiverse_hf.modeling.grammar import Structure
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.state import FinishReason
from multiverse_hf.modeling.tags import encode_prompt

PROMPT = [50, 51, 52]
tiny_model = functools.cache(new_tiny_model)
OPEN, CLOSE = TAGS.open, TAGS.close
NESTED = (2, Forced(((4, Forced(((2,), (3,))), 1), (6,), (0,))), 2)


def forced(plan: tuple, prompt: list[int] = PROMPT, name: str = "qwen2", **options):
    """One answer along a plan: the output, and prompt and answer as ids."""
    output = answer(tiny_model(name), [prompt], {tuple(prompt): plan}, **options)
    return output, documents(output, [prompt])[0]


class Script(LogitsProcessor):
    """Forces a sequence of tokens after the prompt, then text; where there is no fork."""

    def __init__(self, script: list[int], prompt_length: int = len(PROMPT)) -> None:
        self.script, self.prompt_length = script, prompt_length

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        at = input_ids.shape[1] - self.prompt_length
        allowed = slice(self.script[at], self.script[at] + 1) if at < len(self.script) else slice(FIRST_TEXT, None)
        out[:, allowed] = scores[:, allowed]
        return out


class Bias(LogitsProcessor):
    """Adds to the scores of some tokens."""

    def __init__(self, tokens: list[int], bias: float) -> None:
        self.tokens, self.bias = tokens, bias

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.tokens] += self.bias
        return scores


# The rules, one by one


@pytest.mark.parametrize("num_paths", [1, 2, 5, 16])
def test_a_goal_with_n_outlines_makes_n_branches(num_paths):
    output, document = forced((Forced(((2,),) * num_paths),))
    assert document.count(OPEN("path")) == document.count(CLOSE("path")) == num_paths
    assert (output.stats[0].num_forks, output.stats[0].depth) == (1, 1)
    assert output.stats[0].max_width == num_paths


def test_a_goal_without_outlines_goes_on_sequentially_and_counts_as_malformed():
    script = [OPEN("parallel"), OPEN("goal"), CLOSE("goal"), 60, 61]
    output = answer(
        tiny_model("qwen2"), [PROMPT], logits_processor=[Script(script)], structure="lenient", max_new_tokens=99
    )
    (stats,) = output.stats
    assert documents(output, [PROMPT])[0][: 3 + len(script)] == PROMPT + script
    assert (stats.num_forks, stats.max_width) == (0, 1)
    assert stats.malformed >= 1


def test_a_guided_goal_cannot_be_closed_without_outlines():
    script = [OPEN("parallel"), OPEN("goal"), CLOSE("goal")]
    with pytest.raises(ValueError, match="no token is left"):
        answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Script(script)])


@pytest.mark.parametrize("structure", ["guided", "lenient"])
def test_more_outlines_than_max_paths_cannot_be_sampled(structure):
    output, document = forced((Forced(((1,),) * 6), 1), max_paths=4, structure=structure)
    assert output.stats[0].max_width == 4
    assert document.count(OPEN("outline")) == 4


@pytest.mark.parametrize("structure", ["guided", "lenient"])
@pytest.mark.parametrize("max_depth", slow_unless([1], [0, 1, 2]))
def test_blocks_deeper_than_max_depth_cannot_be_sampled(structure, max_depth):
    plan = (1, Forced(((Forced(((Forced(((1,), (2,))), 1), (1,))),), (2,))), 1)
    output, _ = forced(plan, max_depth=max_depth, structure=structure, max_new_tokens=300)
    assert output.stats[0].depth == max_depth


def test_an_end_token_inside_a_path_closes_that_path_alone():
    output, document = forced((1, Forced(((2, "eos"), (9,))), 3))
    parsed = parse_document(text_of(document))
    first, second = next(parsed.blocks())[0].paths
    assert len(first.text.strip()) == 2 + 2  # its label, "1:", and two letters
    assert len(second.text.strip()) == 2 + 9
    assert document[-1] == EOS
    assert output.stats[0].finish_reason == FinishReason.STOP


@pytest.mark.parametrize(
    "script",
    [
        [OPEN("parallel")],
        [OPEN("parallel"), 60, OPEN("goal")],
        [OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60],
        [OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60, CLOSE("outline"), OPEN("outline"), CLOSE("outline")],
        [OPEN("think"), 60],
        [OPEN("think"), 60, OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60],
    ],
    ids=["a block", "a goal", "an outline", "after outlines", "thinking", "an outline while thinking"],
)
def test_an_end_token_anywhere_leaves_a_document_that_parses(script):
    script = [Script([*script, EOS])]
    output = answer(tiny_model("qwen2"), [PROMPT], logits_processor=script, structure="lenient")
    (document,) = documents(output, [PROMPT])
    assert parse_document(text_of(document)).render() == text_of(document)
    assert output.stats[0].finish_reason == FinishReason.STOP
    assert document.count(OPEN("path")) == document.count(OPEN("outline")) == document.count(CLOSE("path"))


@pytest.mark.parametrize(
    ("script", "last"),
    [
        ([OPEN("parallel"), 60], "text between structural tags"),
        ([OPEN("parallel"), EOS], "an end token between structural tags"),
        ([OPEN("parallel"), OPEN("goal"), OPEN("outline"), CLOSE("outline")], "an empty outline"),
        ([OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60, EOS], "an end token in an outline"),
        ([OPEN("think"), 60, CLOSE("think"), OPEN("think")], "a second region of thinking"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_guidance_leaves_nothing_that_a_training_row_may_not_have(script, last):
    with pytest.raises(ValueError, match="no token is left to choose"):
        answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Script(script)])
    assert answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Script(script)], structure="lenient").stats


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_new_tokens": 200}, FinishReason.LENGTH),
        ({"max_total_tokens": 600}, FinishReason.TOTAL),
        ({"max_time": 0.0}, FinishReason.TIME),
        ({"max_path_tokens": 90}, FinishReason.STOP),  # only paths end early
    ],
    ids=["max_new_tokens", "max_total_tokens", "max_time", "max_path_tokens"],
)
def test_a_limit_closes_open_branches_and_says_so(limit, reason):
    output, document = forced(
        (2, Forced(((200,), (3, Forced(((200,), (200,)))), (1,))), 5), **{"max_new_tokens": 900, **limit}
    )
    (stats,) = output.stats
    assert stats.finish_reason == reason
    assert str(stats.finish_reason) == reason.value
    parse_document(text_of(document))
    if "max_time" not in limit:
        assert stats.num_closed >= 1


def test_max_path_tokens_bounds_every_path_from_its_fork():
    _, document = forced((2, Forced(((30,), (3, Forced(((30,), (30,)))), (1,))), 5), max_path_tokens=24)
    layout = build_layout(document, TAGS)
    fork = layout.position_ids[document.index(CLOSE("goal"))]
    last = max(i for i, token in enumerate(document) if token == CLOSE("path"))
    assert int(layout.position_ids[: last + 1].max()) - int(fork) <= 24


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 30}, {"max_total_tokens": 30}],
    ids=["max_new_tokens", "max_total_tokens"],
)
def test_text_without_blocks_uses_the_whole_budget(options):
    output, _ = forced((100,), **options)
    assert output.stats[0].num_tokens >= 30 - 6


def test_an_error_in_a_processor_reaches_the_caller_and_the_model_goes_on_working():
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 12:
                raise RuntimeError("a broken processor")
            return scores

    before, document = forced(NESTED)
    with pytest.raises(RuntimeError, match="a broken processor"):
        forced(NESTED, logits_processor=[Broken()])
    after, again = forced(NESTED)
    assert again == document
    assert after.stats == before.stats


# Every guided answer parses, within its limits


MIN_PATH = empty_path_length(TAGS)
limits_of_all_kinds = {
    "max_new_tokens": st.integers(2, 120),  # two close the thinking that a prompt may end in
    "max_total_tokens": st.one_of(st.none(), st.integers(2, 80)),
    "max_path_tokens": st.one_of(st.none(), st.integers(MIN_PATH, 80)),
}


def guided_answers(seed: int, prompt: list[int], thinks: bool = True, **limits):
    model = tiny_model("qwen2", seed=seed % 5)
    limits = {name: value for name, value in limits.items() if value is not None}
    output = answer(
        model,
        [prompt],
        output_logits=False,
        logits_processor=[Bias(TAGS.control_ids, 3.0), Bias([OPEN("think")], 0.0 if thinks else -1e9)],
        do_sample=True,
        temperature=40.0,
        seed=seed,
        num_return_sequences=5,
        **limits,
    )
    return output, documents(output, [prompt], copies=5)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32),
    think=st.booleans(),
    **limits_of_all_kinds,
    max_paths=st.integers(1, 4),
    max_depth=st.integers(0, 3),
)
def test_guided_answers_of_random_models_parse_under_any_limits(seed, think, **limits):
    output, answers = guided_answers(seed, [*PROMPT, *([OPEN("think")] if think else [])], **limits)
    for document, stats in zip(answers, output.stats, strict=True):
        parsed = parse_document(text_of(document))
        assert stats.malformed == 0
        assert stats.num_forks == len(list(parsed.blocks()))
        assert stats.depth == parsed.depth <= limits["max_depth"]
        for block, _ in parsed.blocks():
            assert len(block.outlines) == len(block.paths) <= limits["max_paths"]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), think=st.booleans(), **limits_of_all_kinds)
def test_limits_are_never_passed(seed, think, **limits):
    output, answers = guided_answers(seed, [*PROMPT, *([OPEN("think")] if think else [])], **limits)
    for document, stats in zip(answers, output.stats, strict=True):
        assert stats.length <= limits["max_new_tokens"]
        assert stats.num_tokens <= (limits["max_total_tokens"] or stats.num_tokens)
        assert stats.length == build_layout(document, TAGS).length - len(PROMPT) - think
        assert stats.num_tokens == len(document) - len(PROMPT) - think


@pytest.mark.parametrize("limit", ["max_new_tokens", "max_total_tokens", "max_path_tokens"])
def test_an_answer_that_just_fits_is_not_cut(limit):
    output, document = forced(NESTED)
    (stats,) = output.stats
    positions = build_layout(document, TAGS).position_ids
    fork, last = document.index(CLOSE("goal")), len(document) - 1 - document[::-1].index(OPEN("conclusion"))
    reduce = last - len(TAGS.reduce_prefix[: TAGS.reduce_prefix.index(OPEN("conclusion"))])
    longest = int(positions[reduce] - positions[fork]) - 1
    fits = {"max_new_tokens": stats.length, "max_total_tokens": stats.num_tokens, "max_path_tokens": longest}[limit]
    again, same = forced(NESTED, **{limit: fits})
    assert same == document
    assert again.stats == output.stats
    cut, shorter = forced(NESTED, **{limit: fits - 1})
    assert shorter != document
    assert cut.stats[0].num_closed or cut.stats[0].finish_reason != "stop"
    parse_document(text_of(shorter))


def test_a_block_that_a_budget_has_no_room_for_ends_the_answer_and_is_not_written():
    output, document = forced((3, Forced(paths=((1,), (1,))), 1), max_new_tokens=10)
    (stats,) = output.stats
    assert (stats.finish_reason, stats.num_forks) == ("length", 0)
    assert document == document[: len(PROMPT) + 3], "the text before the block, and no half of it"


@pytest.mark.parametrize("limit", ["max_new_tokens", "max_total_tokens"])
@pytest.mark.parametrize("value", [1, 2])
def test_thinking_does_not_open_where_no_room_is_left_to_close_it(limit, value):
    output = answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Bias([OPEN("think")], 1e4)], **{limit: value})
    (stats,) = output.stats
    assert (stats.length if limit == "max_new_tokens" else stats.num_tokens) <= value


# Statistics and outputs


def test_statistics_agree_with_the_document():
    output, document = forced(NESTED)
    (stats,) = output.stats
    layout = build_layout(document, TAGS)
    assert stats.num_tokens == len(document) - len(PROMPT)
    assert stats.length == layout.length - len(PROMPT)
    assert stats.parallelism == stats.num_tokens / stats.length
    assert stats.parallelism > 1
    # the other two paths are done when the first forks
    assert (stats.num_forks, stats.depth, stats.max_width) == (2, 2, 3)
    assert stats.num_steps < stats.length, "forced tokens take no step of their own"


def test_an_answer_without_a_block_has_parallelism_one():
    output, document = forced((9,))
    (stats,) = output.stats
    assert (stats.num_tokens, stats.length, stats.num_steps) == (10, 10, 9)  # the prompt's pass gives the first
    assert stats.parallelism == 1
    assert document[-1] == EOS


def test_the_sampled_mask_is_false_on_prompt_forced_tokens_and_padding_and_logits_are_there_where_it_is_true():
    prompts = [PROMPT, [60]]
    output = answer(tiny_model("qwen2"), prompts, {tuple(PROMPT): NESTED, (60,): (3,)})
    width = len(PROMPT)
    assert output.sampled_mask.shape == output.sequences.shape
    assert not output.sampled_mask[:, :width].any()
    for row, stats in enumerate(output.stats):
        assert not output.sampled_mask[row, width + stats.num_tokens :].any()
        assert (output.sequences[row, width + stats.num_tokens :] == PAD).all()
    logprobs = torch.stack(output.logits, 1).log_softmax(-1).gather(-1, output.sequences[:, width:, None])[..., 0]
    assert torch.equal(logprobs == 0, ~output.sampled_mask[:, width:])  # what nobody chose was certain
    sampled = output.sequences[output.sampled_mask]
    for token in (NEWLINE, COLON, OPEN("path"), OPEN("conclusion")):  # of the forced prefixes
        outlines = sum(ids.count(OPEN("outline")) for ids in documents(output, prompts))
        assert (sampled == token).sum() == (outlines if token == COLON else 0)  # the labels in outlines are chosen


def test_logits_are_what_each_token_was_chosen_from():
    output = answer(tiny_model("qwen2"), [PROMPT, [60, 61]], structure="off", max_new_tokens=12)
    for column, logits in enumerate(output.logits):
        for row, stats in enumerate(output.stats):
            if column < stats.num_tokens:
                assert output.sequences[row, 3 + column] == logits[row].argmax()


def test_without_return_dict_the_ids_alone_are_returned():
    model, ids = tiny_model("qwen2"), torch.tensor([PROMPT])
    plain = model.generate(ids, max_new_tokens=9)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=9, return_dict_in_generate=True).sequences)
    assert torch.equal(plain, model.generate(input_ids=ids, generation_config=GenerationConfig(max_new_tokens=9)))


OPEN_OUTLINE = [*PROMPT, OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60]


def closing_length(prompt: list[int]) -> int:
    structure = Structure(TAGS)
    for token in prompt:
        structure.feed(token)
    return closing_positions(structure)


def test_logits_can_be_asked_for_where_a_limit_leaves_nothing_to_choose():
    output = answer(tiny_model("qwen2"), [OPEN_OUTLINE], max_new_tokens=closing_length(OPEN_OUTLINE))
    assert not output.sampled_mask.any()
    parse_document(text_of(documents(output, [OPEN_OUTLINE])[0]))


@pytest.mark.parametrize("structure", ["guided", "lenient"])
@pytest.mark.parametrize("limit", ["max_new_tokens", "max_total_tokens"])
def test_a_prompt_whose_blocks_a_limit_leaves_no_room_to_close_is_answered_all_the_same(limit, structure):
    options = {limit: closing_length(OPEN_OUTLINE) - 1, "structure": structure}
    output = answer(tiny_model("qwen2"), [OPEN_OUTLINE], **options)  # no path has begun: its tags are text
    assert output.stats[0].num_tokens > 0
    assert output.stats[0].num_forks == 0
    forked = [*OPEN_OUTLINE, CLOSE("outline"), CLOSE("goal"), NEWLINE]
    output = answer(tiny_model("qwen2"), [forked, PROMPT], **{**options, limit: 1})
    assert [stats.num_tokens for stats in output.stats] == [0, 1]
    assert output.stats[0].finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(("limit", "value"), [("max_paths", 1), ("max_depth", 0)])
def test_a_prompt_may_hold_more_than_an_answer_may_open(limit, value):
    outlines = [OPEN("outline"), 60, CLOSE("outline")] * 2
    prompt = [*PROMPT, OPEN("parallel"), OPEN("goal"), *outlines, CLOSE("goal"), 60]
    output = answer(tiny_model("qwen2"), [prompt], **{limit: value})
    parse_document(text_of(documents(output, [prompt])[0]))


def test_paths_too_short_for_any_are_refused():
    with pytest.raises(ValueError, match=f"at least {MIN_PATH} tokens"):
        answer(tiny_model("qwen2"), [PROMPT], max_path_tokens=MIN_PATH - 1)


# Sampling


SAMPLING = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 40}


def test_the_same_seed_gives_the_same_answer_and_another_seed_another():
    model = tiny_model("qwen2")
    first, again, other = (answer(model, [PROMPT], seed=seed, **SAMPLING).sequences.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_without_a_seed_torchs_own_is_used():
    model, runs = tiny_model("qwen2"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs += [[answer(model, [PROMPT], **SAMPLING).sequences.tolist() for _ in range(2)]]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1], "a second call continues the random stream"


@pytest.mark.parametrize("options", slow_unless([{}], [{}, {"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.3}]))
def test_an_answer_does_not_depend_on_what_it_is_batched_with(options):
    model = tiny_model("qwen3")
    prompts = [PROMPT, [60], [70, OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60, CLOSE("outline")], [80] * 9]
    for sampling in ({"max_new_tokens": 40}, SAMPLING | {"seed": 3}):
        together = answer(model, prompts, **sampling, **options)
        turned = answer(model, prompts[::-1], **sampling, **options)
        alone = [documents(answer(model, [prompt], **sampling, **options), [prompt])[0] for prompt in prompts]
        assert documents(together, prompts) == alone
        assert documents(turned, prompts[::-1]) == alone[::-1]


def test_min_new_tokens_counts_from_each_rows_own_prompt():
    options = {"logits_processor": [Bias([EOS], 1e4)], "min_new_tokens": 5, "max_new_tokens": 30}
    prompts = [PROMPT, [60] * 12]
    output = answer(tiny_model("qwen2"), prompts, **options, structure="off")
    assert [stats.num_tokens for stats in output.stats] == [6, 6]


def test_equal_prompts_in_one_batch_get_different_answers():
    output = answer(tiny_model("qwen2"), [PROMPT, PROMPT], seed=0, num_return_sequences=3, **SAMPLING)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6


def test_sibling_paths_draw_their_own_noise():
    _, document = forced((Forced(((12,),) * 4),), do_sample=True, temperature=50.0, seed=0)
    (block, _), *_ = parse_document(text_of(document)).blocks()
    texts = {path.text.strip().split(":")[1] for path in block.paths}
    assert len(texts) == 4


@pytest.mark.parametrize("seed", range(20))
def test_a_token_without_probability_is_never_drawn(seed):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            out = torch.full_like(scores, -torch.inf)
            out[:, 60:62] = scores[:, 60:62]
            return out

    output = answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Only()], **SAMPLING, seed=seed)
    assert set(documents(output, [PROMPT])[0][3:]) <= {60, 61}


# What processors and criteria see


def test_processors_see_each_branchs_own_visible_ids_in_document_order():
    contexts = []

    def record(input_ids, scores):
        contexts.extend(tuple(row) for row in input_ids.tolist())
        return scores

    output, document = forced((1, Forced(((3, Forced(((2,), (3,)))), (1,), (5,)))), logits_processor=[record])
    mask = build_layout(document, TAGS).mask()
    expected = [
        tuple(token for token, seen in zip(document[:at], mask[at, :at].tolist(), strict=True) if seen)
        for at in output.sampled_mask[0].nonzero().flatten().tolist()
    ]
    assert Counter(contexts) == Counter(expected)


def test_stopping_criteria_see_each_branchs_own_visible_ids_with_the_new_token():
    contexts = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            contexts.extend(tuple(row) for row in input_ids.tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    output, document = forced((1, Forced(((3,), (5,))), 2), stopping_criteria=[Watch()])
    mask = build_layout(document, TAGS).mask()
    expected = {
        tuple(token for token, seen in zip(document, mask[at].tolist(), strict=False) if seen)
        for at in output.sampled_mask[0].nonzero().flatten().tolist()
    }
    assert set(contexts) <= expected
    assert len(contexts) >= 1 + 3 + 5 + 2


def test_repetition_penalty_counts_what_a_branch_sees_and_nothing_else():
    output, document = forced((4, Forced(((9,), (9,), (9,))), 4), repetition_penalty=3.0)
    mask, penalty = build_layout(document, TAGS).mask(), RepetitionPenaltyLogitsProcessor(3.0)
    for at in output.sampled_mask[0].nonzero().flatten().tolist():
        if document[at] < FIRST_TEXT or document[at - 1] == OPEN("outline"):
            continue
        context = torch.tensor([[t for t, seen in zip(document[:at], mask[at, :at].tolist(), strict=True) if seen]])
        scores = penalty(context, output.logits[at - len(PROMPT)][:1].clone())
        if document[at + 1] != CLOSE("outline"):  # the plan names the text of an outline
            assert document[at] == FIRST_TEXT + int(scores[0, FIRST_TEXT:].argmax())


def test_stopping_criteria_end_the_answer_outside_a_block_and_only_a_path_inside_one():
    class AfterText(StoppingCriteria):
        def __init__(self, num: int) -> None:
            self.num = num

        def __call__(self, input_ids, scores, **kwargs):
            text = [row[len(PROMPT) :] for row in input_ids.tolist()]
            return torch.tensor([sum(token >= FIRST_TEXT for token in row) >= self.num for row in text])

    output, document = forced((9,), stopping_criteria=[AfterText(4)])
    assert output.stats[0].num_tokens == 4
    assert output.stats[0].finish_reason == FinishReason.CRITERIA
    # two outlines spend two text tokens, so each path may write three of its own
    output, document = forced((Forced(((9,), (9,))), 9), stopping_criteria=[AfterText(5)])
    (block, _), *_ = parse_document(text_of(document)).blocks()
    assert [len(path.text.strip()) for path in block.paths] == [2 + 3, 2 + 3]
    assert output.stats[0].finish_reason == FinishReason.CRITERIA


# Streamers


class Collect:
    """A transformers streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.num_ends
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.num_ends += 1


@pytest.mark.parametrize(
    "plan",
    [(5,), NESTED, (Forced(((1,), (9,))), 1, Forced(((9,), (1,), (4,)))), (1, Forced(((2, "eos"), (3,))))],
    ids=["sequential", "nested", "chained", "end token"],
)
@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 30}, {"max_total_tokens": 40}, {"max_time": 0.0}])
def test_a_streamer_receives_the_final_document_in_order_as_it_is_settled(plan, options):
    collect = Collect()
    _, document = forced(plan, streamer=collect, **options)
    assert collect.puts[0] == PROMPT
    assert [token for put in collect.puts for token in put] == document
    assert collect.num_ends == 1


def test_a_streamer_receives_text_before_a_fork_before_the_block_is_done():
    sent_at: dict[int, int] = {}
    num_calls = 0

    def count(input_ids, scores):
        nonlocal num_calls
        num_calls += 1
        return scores

    class Watch(Collect):
        def put(self, value):
            sent_at[len(self.puts)] = num_calls
            super().put(value)

    collect = Watch()
    forced((4, Forced(((8,), (8,))), 2), streamer=collect, logits_processor=[count])
    assert sent_at[1] == 1, "the first token is sent after the first step"
    assert len(set(sent_at.values())) > 20


def test_a_streamer_of_a_left_padded_prompt_receives_the_whole_document():
    collect, model = Collect(), tiny_model("qwen2")
    ids, mask = torch.tensor([[PAD, PAD, PAD, PAD, *PROMPT]]), torch.tensor([[0] * 4 + [1] * 3])
    sequences = model.generate(ids, attention_mask=mask, streamer=collect, max_new_tokens=9)
    assert [token for put in collect.puts for token in put][-9:] == sequences[0, 7:].tolist()
    assert collect.num_ends == 1


def test_a_streamer_ends_even_where_nothing_is_left_to_choose():
    collect, room = Collect(), closing_length(OPEN_OUTLINE)
    sequences = tiny_model("qwen2").generate(torch.tensor([OPEN_OUTLINE]), streamer=collect, max_new_tokens=room)
    assert [token for put in collect.puts for token in put] == sequences[0].tolist()
    assert collect.num_ends == 1


def test_a_streamer_takes_one_answer_only():
    with pytest.raises(ValueError, match="one answer"):
        answer(tiny_model("qwen2"), [PROMPT, [60]], streamer=Collect())


def test_a_streamer_of_branches_receives_events_in_a_sensible_order():
    class Events:
        def __init__(self) -> None:
            self.events = []

        def on_event(self, event) -> None:
            self.events.append(event)

    streamer = Events()
    output, document = forced(NESTED, streamer=streamer)
    events = streamer.events
    (stats,) = output.stats
    tokens = [event for event in events if event.kind == "token"]
    assert Counter(event.token for event in tokens) == Counter(document[len(PROMPT) :])
    assert sum(event.sampled for event in tokens) == int(output.sampled_mask.sum())
    assert Counter(event.kind for event in events if event.kind != "token") == {
        "fork": 2, "close": 5, "reduce": 2, "finish": 1,
    }  # fmt: skip
    assert events[-1].kind == "finish"
    assert {event.branch for event in tokens} == {"", "1", "2", "3", "1.1", "1.2"}
    assert sum(event.num_paths for event in events if event.kind == "fork") == 5
    assert stats.num_forks == 2
    for branch in ("1", "2", "3", "1.1", "1.2"):
        parent = branch.rpartition(".")[0]
        fork = next(i for i, e in enumerate(events) if e.kind == "fork" and e.branch == parent)
        reduce = next(i for i, e in enumerate(events) if e.kind == "reduce" and e.branch == parent)
        close = next(i for i, e in enumerate(events) if e.kind == "close" and e.branch == branch)
        own = [i for i, e in enumerate(events) if e.kind == "token" and e.branch == branch]
        assert fork < min(own) <= max(own) < close < reduce
        assert events[close - 1].token == CLOSE("path")


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_processor_that_allows_nothing_is_reported(do_sample):
    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf)

    with pytest.raises(ValueError, match="no token is left"):
        answer(tiny_model("qwen2"), [PROMPT], logits_processor=[Nothing()], do_sample=do_sample)


def test_a_stop_string_is_looked_for_in_each_paths_own_text():
    model = MultiverseForCausalLM.from_pretrained(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    prompt = "A=19-7+12; B=8+15-3; total?"  # the stop string is in it, and in the outlines that every path sees
    ids = encode_prompt(tokenizer, Suffix.PARALLEL.end(prompt), model.tags.names, return_tensors="pt")
    options = {"max_new_tokens": 600, "return_dict_in_generate": True, "tokenizer": tokenizer}
    whole = model.generate(ids, **options)
    output = model.generate(ids, stop_strings=["="], **options)

    def paths(found) -> list[str]:
        document = parse_document(tokenizer.decode(found.sequences[0, ids.shape[1] :]))
        return [path.text for block, _ in document.blocks() for path in block.paths]

    assert len(paths(whole)) == len(paths(output)) == 2
    for before, after in zip(paths(whole), paths(output), strict=True):
        assert before.startswith(after)
        assert after.endswith("=")
        assert after.count("=") == 1 < before.count("=")
    assert output.stats[0].closed_by == {FinishReason.CRITERIA: 2}
