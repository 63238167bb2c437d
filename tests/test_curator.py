"""The curator's parts: sentences, stages, checks, replies. What a stage refuses, and why."""
# ruff: noqa: E402 - without the extra these tests are skipped, with the reason

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

for package in ("aiohttp", "rapidfuzz", "math_verify"):
    pytest.importorskip(package, reason="needs multiverse_hf[curate]")

import rule_server
from rapidfuzz.distance import Levenshtein

from multiverse_hf.curator.answers import AnswerChecker, boxed, concluded_answers, final_answers
from multiverse_hf.curator.assembly import character_parallelism, reasoning_of
from multiverse_hf.curator.calls import CallLog
from multiverse_hf.curator.checks import check_content, check_independence, distance
from multiverse_hf.curator.drafts import Draft, Limits, Refusal
from multiverse_hf.curator.endpoint import Endpoint, EndpointError
from multiverse_hf.curator.health import CallFailed, EndpointDown, Health
from multiverse_hf.curator.options import Settings, load_settings
from multiverse_hf.curator.replies import Reply, read_result, schema_of
from multiverse_hf.curator.sentences import number_sentences, split_sentences
from multiverse_hf.curator.stages import JUDGE, STAGES, prompt_versions
from multiverse_hf.curator.traces import Trace, read_trace
from multiverse_hf.data.chains import Kind, document, sample_problem
from multiverse_hf.data.records import RowError
from multiverse_hf.documents import Document, check, parse_document
from multiverse_hf.errors import CommandError

TEXT = """First, look at it, e.g. as 3.5 times 2. Is that so? Yes!

  1. Try x = 1. It gives 2.
  2. Similarly, try x = 2... it gives 5 (see Eq. 4).
So f(x) = x^2 + 1."""


# Sentences


@given(st.text(alphabet=st.sampled_from("aB1 .?!…\n\t\"')。_*"), max_size=80) | st.text(max_size=80))
@example(TEXT)
@example("." * 50 + " " + "\n" * 50)
def test_sentences_joined_are_the_text_byte_for_byte(text: str):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)


def test_sentences_end_at_marks_and_line_ends_but_not_at_abbreviations_decimals_and_list_numbers():
    assert [sentence.strip() for sentence in split_sentences(TEXT)] == [
        "First, look at it, e.g. as 3.5 times 2.",
        "Is that so?",
        "Yes!",
        "1. Try x = 1.",
        "It gives 2.",
        "2. Similarly, try x = 2...",
        "it gives 5 (see Eq. 4).",
        "So f(x) = x^2 + 1.",
    ]
    assert split_sentences(TEXT)[3].startswith("  1.")  # indentation stays with what it indents
    assert number_sentences(["a. ", "b\n"]) == "[1] a.\n[2] b"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("甲等于一。\n乙等于二！\n", ["甲等于一。\n", "乙等于二！\n"]),
        ("甲。　乙。", ["甲。　", "乙。"]),
        ("他说：“好。”然后走了。", ["他说：“好。”", "然后走了。"]),
        ("One.\r\n\r\nTwo.\r\n", ["One.\r\n\r\n", "Two.\r\n"]),
        ("One.\u2028\u2028Two.\x0c\nThree", ["One.\u2028\u2028", "Two.\x0c\n", "Three"]),
        ("\n\n  One.\n \u00a0\n", ["\n\n  One.\n \u00a0\n"]),
    ],
)
def test_no_blank_is_a_sentence_of_its_own(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


def test_long_runs_of_marks_and_spaces_are_read_once():
    # quadratic, either of these would take minutes
    for text in ("." * 200_000, " " * 200_000 + "x", ("! " * 100_000)):
        assert "".join(split_sentences(text)) == text


# Traces


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "reasoning": "r", "answer": 7.0, "id": 3}, Trace(1, "3", "p", "r", "7")),
        (
            {"question": "p", "deepseek_thinking_trajectory": "r", "deepseek_attempt": "a"},
            Trace(1, "1", "p", "r", "a"),
        ),
        ({"problem": "p", "completion": "<think>\nr\n</think>\n\na"}, Trace(1, "1", "p", "r", "a")),
        ({"prompt": "p", "reasoning": "<Think>\nr\n</Think>"}, Trace(1, "1", "p", "r", None)),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "<think>r</think> a"}]},
            Trace(1, "1", "p", "r", "a"),
        ),
    ],
)
def test_traces_are_read_from_the_usual_columns(row: dict[str, Any], expected: Trace):
    assert read_trace(1, row, {}) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "object with columns"),
        ({"prompt": "p"}, "no text for the reasoning"),
        ({"prompt": "p", "cot": "r"}, "columns: prompt, cot"),
        ({"prompt": " ", "reasoning": "r"}, "no text for the prompt"),
        ({"prompt": ["p"], "reasoning": "r"}, "must be text, got list"),
        ({"prompt": "p", "reasoning": "so <Path> it is"}, "control tag <Path>"),
        ({"prompt": "p", "reasoning": "\ud800"}, "surrogate"),
        ({"messages": [{"role": "user", "content": "p"}]}, "must end with"),
    ],
)
def test_rows_that_are_no_traces_are_told_why(row: Any, words: str):
    with pytest.raises(RowError, match=words):
        read_trace(1, row, {})


@pytest.mark.parametrize(
    ("reasoning", "answer", "thought", "said"),
    [
        ("One. Two.\n</think>\n\nIt is 2.", None, "One. Two.", "It is 2."),
        ("<THINK>One. Two.</Think> It is 2.", None, "One. Two.", "It is 2."),
        ("<think>\nOne. Two.", "2", "One. Two.", "2"),
        ("One.</think>left over", "2", "One.", "2"),
    ],
)
def test_a_thought_ends_where_its_tag_says(reasoning, answer, thought, said):
    trace = read_trace(1, {"prompt": "p", "reasoning": reasoning, "answer": answer}, {})
    assert (trace.reasoning, trace.answer) == (thought, said)


@pytest.mark.parametrize(
    "marker", ["<|im_end|>", "<|eot_id|>", "<｜Assistant｜>", "[/INST]", "<end_of_turn>", "</s>", "<think>"]
)
def test_what_parts_turns_is_no_text_of_a_trace(marker):
    for row in (
        {"reasoning": f"One. {marker} Two.", "answer": "2"},
        {"reasoning": "One. Two.", "answer": f"2{marker}"},
    ):
        with pytest.raises(RowError, match="which separates turns or thinking"):
            read_trace(1, {"prompt": "p", **row}, {})


def test_columns_may_be_called_otherwise():
    row = {"q": "p", "cot": "r", "final": "a", "key": "k"}
    columns = {"prompt": "q", "reasoning": "cot", "answer": "final", "id": "key"}
    assert read_trace(1, row, columns) == Trace(1, "k", "p", "r", "a")


# Stages


def target(kind: Kind | str = Kind.NESTED, seed: int = 0, num_chains: int | None = None) -> tuple[Trace, Document]:
    """Give a trace and the document it should come to."""
    problem = sample_problem(random.Random(seed), kind, num_chains, max_ops=4)
    found = parse_document(document(problem).partition("\n\nAnswer")[0])
    return Trace(1, "1", str(problem), reasoning_of(found), str(problem.answer)), found


def drafted(trace: Trace, found: Document, stage_name: str) -> tuple[Draft, Any, dict[str, Any]]:
    """Take a draft up to a stage by the rule server's answers; give the stage and its true answer too."""
    draft = Draft.begin(trace, Limits())
    sentences = [sentence.strip() for sentence in draft.sentences]
    for stage in STAGES:
        truth = rule_server.answer(stage.name, found, sentences)
        if stage.name == stage_name:
            return draft, stage, truth
        draft = stage.check(draft, stage.form.model_validate(truth))
    raise KeyError(stage_name)


@given(seed=st.integers(0, 1000), kind=st.sampled_from([Kind.FLAT, Kind.NESTED]))
def test_the_true_answers_give_the_document_with_the_originals_text(seed: int, kind: Kind):
    trace, found = target(kind, seed)
    draft, stage, truth = drafted(trace, found, "mapreduce")
    draft = stage.check(draft, stage.form.model_validate(truth))
    check(draft.document, max_depth=2)
    assert draft.document.sequential() == found.sequential()
    assert [len(block.paths) for block, _ in draft.document.blocks()] == [len(b.paths) for b, _ in found.blocks()]
    assert draft.distance == 0 == sum(draft.path_distances)
    assert len(draft.path_distances) == found.num_paths


def test_every_stage_asks_with_the_same_opening_and_names_its_version():
    trace, found = target()
    openings = set()
    for stage in STAGES:
        draft, stage, _ = drafted(trace, found, stage.name)
        openings.add(draft.opening)
        assert "$" not in stage.instructions(draft)
    assert len(openings) == 1
    assert prompt_versions() == dict.fromkeys(["system", *(stage.name for stage in (*STAGES, JUDGE))], "v1")


def change(truth: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Give a copy with one place changed: "quotes.0.last" to a value, or to what a function makes of the old one."""
    made = json.loads(json.dumps(truth))
    *way, last = (int(each) if each.lstrip("-").isdigit() else each for each in path.split("."))
    place = made
    for each in way:
        place = place[each]
    place[last] = value(place[last]) if callable(value) else value
    return made


@pytest.mark.parametrize(
    ("stage_name", "path", "value", "name", "words"),
    [
        ("summary", "steps", [], "steps", "no step"),
        ("summary", "steps.0.summary", " ", "steps", "step 1 has an empty summary"),
        ("summary", "steps.0.substeps", ["one"], "steps", "one substep only"),
        ("summary", "steps", lambda steps: steps * 50, "steps", "join some"),
        ("groups", "groups", [], "no parallel group", "independent"),
        ("groups", "groups.0.steps", lambda steps: [*steps, "9"], "groups", "no step 9"),
        ("groups", "groups.0.steps", lambda steps: steps[:1], "groups", "two different steps"),
        ("groups", "groups.0.steps", lambda steps: [*steps, "1.1"], "groups", "levels"),
        ("groups", "groups", lambda groups: groups * 2, "groups", "grouped twice"),
        ("groups", "groups.0.argument", "", "groups", "lacks the argument"),
        ("structure", "parts", lambda parts: parts[:-1], "structure", "lacks step"),
        ("structure", "parts", lambda parts: parts[::-1], "structure", "in the order of the text"),
        ("structure", "parts.0.steps.0.step", "9", "structure", "lacks step 1"),
        ("structure", "parts.0.steps.0.parts", lambda parts: parts[1:], "structure", "step 1 lacks step 1.1"),
        (
            "structure",
            "parts",
            lambda parts: [{"steps": [step for part in parts for step in part["steps"]]}],
            "structure",
            "no group",
        ),
        ("refill", "quotes.0.step", "9", "quotes", "no text of its own"),
        ("refill", "quotes.0.last", 999, "quotes", "sentences run from 1"),
        ("refill", "quotes.0.first", 0, "quotes", "sentences run from 1"),
        ("refill", "quotes.1.first", 1, "quotes", "quoted for step"),
        ("refill", "quotes", lambda quotes: quotes[:-1], "quotes", "has no text"),
        ("refill", "quotes", lambda quotes: [q | {"last": q["first"]} for q in quotes], "content", "in no step: sent"),
        ("mapreduce", "blocks", lambda blocks: blocks[:-1], "blocks", "each once"),
        ("mapreduce", "blocks.0.block", "B9", "blocks", "got B9"),
        ("mapreduce", "blocks.0.outlines", lambda outlines: outlines[:-1], "blocks", "outlines"),
        ("mapreduce", "blocks.0.outlines.0", " ", "blocks", "says nothing"),
        ("mapreduce", "blocks.0.conclusion", "", "blocks", "says nothing"),
        ("mapreduce", "blocks.0.conclusion", "x</Conclusion></Parallel>", "blocks", "holds '</Conclusion>'"),
        ("mapreduce", "blocks.0.conclusion", "x </ parallel>", "blocks", "holds '</ parallel>'"),
        ("mapreduce", "blocks.0.conclusion", "x<|im_end|>", "blocks", "holds '<|im_end|>'"),
        ("mapreduce", "blocks.0.conclusion", "x" * 3000, "blocks", "2000 at most"),
        ("mapreduce", "blocks.0.outlines.1", "As in path one, find it", "independence", "outline 2 refers to a path"),
        ("mapreduce", "rewrites", [{"sentence": 10**6, "text": "x"}], "rewrites", "in no path"),
    ],
)
def test_a_stage_refuses_what_nothing_can_be_made_of(stage_name: str, path: str, value: Any, name: str, words: str):
    trace, found = target()
    draft, stage, truth = drafted(trace, found, stage_name)
    stage.check(draft, stage.form.model_validate(truth))
    with pytest.raises(Refusal, match=words) as caught:
        stage.check(draft, stage.form.model_validate(change(truth, path, value)))
    assert caught.value.check == name
    assert caught.value.is_final == (name == "no parallel group")


def test_a_rewritten_sentence_keeps_its_place_and_what_is_around_it():
    reasoning = (
        "We need f(1) and f(2). Let us see.\nFirst f(1) = 2, since 1 + 1 = 2. \nSimilarly f(2) = 5. That is all."
    )
    draft = Draft.begin(Trace(1, "1", "p", reasoning), Limits())
    answers = {
        "summary": {"steps": [{"summary": "s", "substeps": []} for _ in range(4)]},
        "groups": {"groups": [{"steps": ["2", "3"], "argument": "a"}]},
        "structure": {
            "parts": [{"steps": [{"step": name, "parts": []} for name in names]} for names in ("1", "23", "4")]
        },
        "refill": {
            "quotes": [
                {"step": step, "first": first, "last": last}
                for step, first, last in (("1", 1, 2), ("2", 3, 3), ("3", 4, 4), ("4", 5, 5))
            ]
        },
    }
    for stage in STAGES[:-1]:
        draft = stage.check(draft, stage.form.model_validate(answers[stage.name]))
    stage = STAGES[-1]
    block = {"block": "B1", "outlines": ["7: find f(1)", "find f(2)"], "conclusion": "f(1) = 2 and f(2) = 5."}
    with pytest.raises(Refusal, match=r"path 2 refers to another path: 'Similarly f\(2\)"):
        stage.check(draft, stage.form.model_validate({"blocks": [block], "rewrites": []}))
    patient = replace(draft, limits=Limits(max_distance=0.6))
    rewrites = [{"sentence": 4, "text": "Now f(2) = 5."}]
    found = stage.check(patient, stage.form.model_validate({"blocks": [block], "rewrites": rewrites}))
    assert found.text == (
        "<Think>\nWe need f(1) and f(2). Let us see.\n<Parallel>\n<Goal>\n<Outline>\n1: find f(1)\n</Outline>\n"
        "<Outline>\n2: find f(2)\n</Outline>\n</Goal>\n<Path>\n1: First f(1) = 2, since 1 + 1 = 2.\n</Path>\n"
        "<Path>\n2: Now f(2) = 5.\n</Path>\n<Conclusion>\nf(1) = 2 and f(2) = 5.\n</Conclusion>\n</Parallel>\n"
        "That is all.\n</Think>"
    )
    # two sentences of 21 characters became "Now f(2) = 5.": nine letters for three, none of which they share
    assert found.path_distances == [0.0, pytest.approx(9 / len("2: Similarly f(2) = 5. "), abs=0.02)]
    assert 0 < found.distance < 0.2
    with pytest.raises(Refusal, match=r"path 2 has distance 0\.38.* became 'Now'"):
        stage.check(draft, stage.form.model_validate({"blocks": [block], "rewrites": rewrites}))
    dropped = {"blocks": [block], "rewrites": [{"sentence": 4, "text": ""}]}
    with pytest.raises(Refusal, match="an empty <Path>"):
        stage.check(draft, stage.form.model_validate(dropped))


# Checks


@given(st.text(alphabet="ab \n", max_size=60), st.text(alphabet="ab \n", max_size=60))
def test_the_distance_is_that_of_the_plain_table(one: str, other: str):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        last, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
    assert distance(one, other) == (row[-1] / max(len(one), len(other)) if one or other else 0)
    assert distance(one, other) == Levenshtein.normalized_distance(one, other)


def test_the_content_check_shows_the_worst_place():
    original = "".join(f"Line {number} of the text.\n" for number in range(100))
    changed = original.replace("Line 3 of", "Line 3 off").replace("Line 40 of the text.\n", "").replace("9", "8")
    assert check_content(original, changed, 0.2) == pytest.approx(0.02, abs=0.01)
    with pytest.raises(
        Refusal, match=r"distance 0.0\d to the original.*worst in line 41: .*0 of the text.* became nothing"
    ):
        check_content(original, changed, 0.001)
    with pytest.raises(Refusal, match=r"became 'x{80} \.\.\. x{80}'"):
        check_content(original, original.replace("Line 50 of the text.", "x" * 2000), 0.1)


def blocks(*paths: str) -> Document:
    outlines = "".join(f"<Outline>{n}: o</Outline>" for n in range(1, len(paths) + 1))
    inside = "".join(f"<Path>\n{n}: {path}\n</Path>\n" for n, path in enumerate(paths, start=1))
    return parse_document(f"<Parallel><Goal>{outlines}</Goal>\n{inside}<Conclusion>c</Conclusion></Parallel>")


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (("x = 1.", "Similarly, y = 2."), "Similarly"),
        (("x = 1.", "As above, y = 2."), "As above"),
        (("x = 1.", "y = 2, in the same way."), "in the same way"),
        (("x = 1.", "The previous approach failed. So y."), "previous approach"),
        (("x = 1.", "y = 2.\nThis is what path 1 has."), "path 1"),
        (("x = 1, unlike Path 2.", "y = 2."), "Path 2"),
        (("x = 1.", "y = 2. The other path gives x."), "other path"),
        (("x = 1.", "y = 2.", "z = 3. Combined with the first path's x: 4."), "first path"),
    ],
)
def test_a_path_that_refers_to_another_is_refused_with_its_words(paths: tuple[str, ...], words: str):
    with pytest.raises(Refusal, match=words):
        check_independence(blocks(*paths))


@pytest.mark.parametrize(
    "paths",
    [
        ("Similarly to what we know, x = 1.", "y = 2."),  # before the first path there is the shared text
        ("x = 1.", "y = 2. Similarly, z = 2, as above."),  # leans on the path itself
        ("Path 1 begins here.", "In path 2 we take y."),
        ("A pathological case.", "Likelihoods similar to these."),
    ],
)
def test_a_path_that_leans_on_itself_is_not_refused(paths: tuple[str, ...]):
    check_independence(blocks(*paths))


def test_a_problem_about_paths_may_have_them_in_its_solution():
    document = blocks("Go right.", "Go up. The second path meets path 1 here.")
    with pytest.raises(Refusal):
        check_independence(document, "How many ways are there?")
    check_independence(document, "How many lattice paths are there?")


def test_parallelism_is_all_text_over_the_longest_way():
    # tags: <Parallel> 21, <Goal> 13, <Outline> 19, <Path> 13, <Conclusion> 25 characters, open and close together
    found = parse_document(
        "<Parallel><Goal><Outline>a</Outline><Outline>b</Outline></Goal><Path>cccc</Path><Path>dd</Path>"
        "<Conclusion>e</Conclusion></Parallel>"
    )
    shared = 21 + 13 + 2 * 20 + 26
    assert character_parallelism(found) == (shared + 17 + 15) / (shared + 17)
    assert character_parallelism(parse_document("text")) == character_parallelism(parse_document("")) == 1


# Answers


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("so \\boxed{1}\nand \\boxed{\\frac{1}{2}} or $\\boxed{x}$.", ["\\frac{1}{2}", "x"]),
        ("\\boxed{3}\nAnswer: 44", ["44"]),
        ("Answer: $\\boxed{7}$\n", ["7"]),
        ("a\nSum: A 3 B+4=7\n", ["Sum: A 3 B+4=7"]),
        ("\\boxed{unclosed", ["\\boxed{unclosed"]),
    ],
)
def test_the_final_answer_is_what_the_text_ends_with(text: str, answers: list[str]):
    assert final_answers(text) == answers
    assert boxed("\\boxed{ {a} {b} } \\boxed {c}") == ["{a} {b}", "c"]


def test_answers_are_compared_by_value_and_a_comparison_that_hangs_is_ended():
    async def compare() -> list[str | None]:
        checker = AnswerChecker(timeout_s=20)
        found: list[str | None] = []
        plain = parse_document("text")
        pairs = [("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}"), ("\\boxed{2}", "\\boxed{3}"), ("x = 7.", "x = 7.0")]
        pairs.append(("\\boxed{2}", "\\boxed{2}\n\\boxed{1} and \\boxed{2}"))
        pairs.append(("\\boxed{n = 2, 3, 4}", "\\boxed{n = 1, 2, 3}"))
        pairs.append(("\\boxed{8 \\text{ cm}}", "\\boxed{8 \\text{ m}}"))
        try:
            for original, text in pairs:
                try:
                    await checker.check(original, text, plain)
                    found.append(None)
                except Refusal as err:
                    found.append(err.detail)
            checker.timeout_s = 0.3
            tower = "\\boxed{" + "^{".join(["9"] * 12) + "}" * 12
            with pytest.raises(Refusal):
                await asyncio.wait_for(checker.check(tower, tower.replace("9", "8", 1), plain), 10)
            conclusion = parse_document(
                "<Parallel><Goal><Outline>1: o</Outline></Goal><Path>1: p</Path><Conclusion>\\boxed{4}</Conclusion>"
                "</Parallel>"
            )
            checker.timeout_s = 20
            with pytest.raises(Refusal, match="the answer is '4', in the original '3'"):
                await checker.check("\\boxed{3}", "\\boxed{3}", conclusion)
        finally:
            checker.close()
        return found

    equal, other, number, two, *alike = asyncio.run(compare())
    assert equal is number is None
    assert other == "the answer is '3', in the original '2'"
    assert two.startswith("the answer is '1, 2'")
    assert None not in alike  # what math-verify alone held to be the same


@pytest.mark.parametrize(
    ("conclusion", "trace_answer", "is_refused"),
    [
        ("So the answer is 41.", None, True),
        ("So the answer is 42.", None, False),
        ("Answer: 41", None, True),
        ("\\boxed{41} here", None, True),
        ("Both agree.", None, False),
        ("Answer: 41", "42", True),
        ("Answer: 42", "42", False),
        ("**Answer:** 41", None, True),
        ("**Answer: 42**", None, False),
        ("The answer is therefore **41**.", None, True),
        ("Total: 41", None, True),
        ("**Total:** 41.", "42", True),
        ("Taken together, the sum is $41$.", None, True),
        ("So 17 + 24 = 41.", None, True),
        ("Both agree on **41**.", None, True),
        # no answers, or no other ones
        ("So 17 + 25 = 42.", None, False),
        ("Total: 42", "42", False),
        ("The answer is positive in both cases.", None, False),
        ("The answer is at least 40.", None, False),
        ("The answer is not 41.", None, False),
        ("The paths leave 41 cases.", None, False),
        ("So x >= 41.", None, False),
        ("Both have 41 = 41 and go on.", None, False),
    ],
)
def test_a_conclusion_that_states_another_answer_is_refused(conclusion, trace_answer, is_refused):
    text = f"<Goal><Outline>1: o</Outline></Goal><Path>1: p</Path><Conclusion>{conclusion}</Conclusion>"
    document = parse_document(f"<Parallel>{text}</Parallel>")
    original = "So it must be 42." if trace_answer else "It is \\boxed{42}"

    async def check_it() -> None:
        checker = AnswerChecker(timeout_s=20)
        try:
            await checker.check(original, original, document, trace_answer)
        finally:
            checker.close()

    if not is_refused:
        asyncio.run(check_it())
        return
    with pytest.raises(Refusal, match="the answer is '41', in the original '42'"):
        asyncio.run(check_it())


@pytest.mark.parametrize(
    ("reasoning", "conclusion", "found"),
    [
        ("a = 6, b = 7. a + b = 13. a * b = 42", "So a + b = 13.", []),  # a result on the way
        ("It is 12.96 in all. 42", "The sum is 13.", []),  # rounded
        ("A dozen, that is twelve, makes 42", "The total is 12.", []),
        ("1,234 in all. 42", "Total: 1234", []),
        ("a = 6, b = 7", "So a + b = 13.", ["13"]),
        ("a = 6, b = 7", "Total: 1,300.", ["1,300"]),
    ],
)
def test_a_number_that_the_reasoning_has_is_no_other_answer(reasoning, conclusion, found):
    assert concluded_answers(conclusion, "42", reasoning) == found
    assert concluded_answers(conclusion, "x^2", reasoning) == []  # the answer is no integer


@pytest.mark.parametrize(
    "words", ["As in path one", "As in Path (1)", "As in the 1st path", "Using the sibling's result"]
)
@pytest.mark.parametrize("problem", ["What is 6 * 7?", "Two sympathetic friends share 42."])
def test_siblings_are_noticed_however_they_are_called(words, problem):
    paths = f"<Path>1: p</Path><Path>2: {words}, it is 2.</Path>"
    goal = "<Goal><Outline>1: o</Outline><Outline>2: q</Outline></Goal>"
    document = parse_document(f"<Parallel>{goal}{paths}<Conclusion>c</Conclusion></Parallel>")
    with pytest.raises(Refusal, match="path 2 refers to another path"):
        check_independence(document, problem)


# The endpoint

GOOD = '{"groups": [{"steps": ["1", "2"], "argument": "a {brace} and\\nline"}]}'
KEY = "sk-of-this-test-only"
CHOICE = {"finish_reason": "stop", "message": {"content": GOOD}}


def ask_once(*answers: tuple[int, Any, dict[str, str]], extra: dict[str, Any] | None = None) -> Reply:
    """Ask a real server that gives these answers one after the other."""
    from aiohttp import test_utils, web

    left = list(answers)

    async def handle(request: Any) -> Any:
        status, body, headers = left.pop(0)
        body = body if isinstance(body, str | bytes) else json.dumps(body)
        return web.Response(body=body, status=status, headers={"Content-Type": "application/json", **headers})

    async def run() -> Reply:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        async with test_utils.TestServer(app) as server:
            address = f"http://{server.host}:{server.port}/v1"
            settings = Settings("m", address, max_retries=0, max_outage_s=5)
            async with Endpoint(settings, KEY) as endpoint:
                body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **(extra or {})}
                return await endpoint.ask(body, "groups", STAGES[1].form)

    given = asyncio.run(run())
    assert not left
    return given


def test_replies_in_parts_without_counts_and_with_half_a_character_are_read():
    parts = [{"type": "text", "text": GOOD[:9]}, {"type": "text", "text": GOOD[9:]}]
    usage = {"prompt_tokens": "many", "completion_tokens": 7}
    given = ask_once((200, {"choices": [{"message": {"content": parts}}], "usage": usage}, {}))
    assert (given.text, given.prompt_tokens, given.completion_tokens) == (GOOD, 0, 7)
    assert ask_once((200, {"choices": [{"message": {"content": "\ud83d"}}], "usage": [1]}, {})).text == "?"


@pytest.mark.parametrize("body", ["{", "", "null", "[1]", '{"choices": [7]}', "<html>", b"\xff\xfe\x00"])
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
def test_an_answer_that_is_none_is_a_fault_of_the_server(body: str | bytes, content_type: str):
    with pytest.raises(Refusal, match="1 tries failed, the last with an unreadable answer") as caught:
        ask_once((200, body, {"Content-Type": content_type}))
    assert caught.value.check == "no answer"


def test_an_answer_is_read_whatever_its_content_type_is():
    text = json.dumps({"choices": [CHOICE]})
    assert ask_once((200, text, {"Content-Type": "text/plain"})).text == GOOD


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize("said", ["Structured outputs are not supported", "JSON Schema mode is not supported"])
def test_an_endpoint_that_takes_no_schema_is_asked_for_text(status, said):
    given = ask_once((status, {"error": {"message": said}}, {}), (200, {"choices": [CHOICE]}, {}))
    assert given.text == GOOD


def test_an_endpoint_that_takes_no_seed_is_asked_without(caplog):
    refusal = (422, {"message": "seed: Extra inputs are not permitted"}, {})
    assert ask_once(refusal, (200, {"choices": [CHOICE]}, {}), extra={"seed": 3}).text == GOOD
    assert "takes no seed" in caplog.text
    with pytest.raises((Refusal, EndpointError)):  # a fault of another field is none of the seed's
        ask_once((422, {"message": "temperature: too high"}, {}), extra={"seed": 3})


def test_a_key_in_a_servers_own_words_is_hidden():
    with pytest.raises(Refusal, match=r"Bearer \*\*\*") as caught:
        ask_once((200, {"error": {"message": f"Invalid credentials Bearer {KEY}"}}, {}))
    assert KEY not in str(caught.value)


def test_a_wait_longer_than_one_may_wait_ends_the_run_and_a_refused_input_does_not():
    with pytest.raises(EndpointDown, match="asks to wait 86400 s, longer than 5 s; raise --max-outage"):
        ask_once((429, {}, {"Retry-After": "86400"}))
    with pytest.raises(Refusal, match="flagged"):
        ask_once((403, {"error": {"message": "the input was flagged"}}, {}))
    with pytest.raises(EndpointError, match="403"):
        ask_once((403, {"error": {"message": "no such key"}}, {}))


def test_a_run_does_not_stop_while_a_call_is_on_its_way():
    async def run() -> None:
        health, may_answer = Health(max_outage_s=0.2), asyncio.Event()

        async def answer() -> Reply:
            await may_answer.wait()
            return reply("late")

        async def fail() -> Reply:
            raise CallFailed("server error", "HTTP 503: too many calls")

        slow = asyncio.create_task(health.attempt(answer))
        for _ in range(4):  # together longer than an outage may be
            with pytest.raises(CallFailed):
                await health.attempt(fail)
            await asyncio.sleep(0.1)
        may_answer.set()
        assert (await slow).text == "late"
        with pytest.raises(CallFailed):  # a new outage
            await health.attempt(fail)
        await asyncio.sleep(0.3)
        with pytest.raises(EndpointDown, match="the last one failed: HTTP 503: too many calls"):
            await health.attempt(fail)

    asyncio.run(run())


# Replies and the log


def reply(text: str, finish_reason: str = "stop") -> Reply:
    return Reply(text, finish_reason, 10, 5)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Here it is:\n```json\n{GOOD}\n```\nDone.",
        f"```\n{GOOD}\n```",
        f"<think>maybe {{}}\n```json\n{{}}\n```</think>\n{GOOD}",
        f"Sure! {GOOD} I hope this helps.",
        f"```json\n{{}}\n```\nNo, better:\n```json\n{GOOD}\n```",
        GOOD.replace("\\n", "\n"),  # a line end in a string, which strict JSON forbids and models write
        f"```json\n{GOOD}",
        f"I think {{maybe}} so.</think>{GOOD}",  # the beginning of the thought is left out
        f"In {{braces}}: {GOOD} {{}}",
        f"```\n{GOOD}```",
    ],
)
def test_a_result_is_read_from_bare_and_fenced_replies(text: str):
    groups = read_result(reply(text), STAGES[1].form)
    assert groups.groups[0].steps == ["1", "2"]


# What JSON reads as a tab, a form feed, a backspace, a line end and a carriage return.
BROKEN = (r"\times", r"\theta", r"\frac{1}", r"\beta", r"\boxed{1}", r"\rho", r"\neq", r"\nabla", r"\nu", r"\ne")


@pytest.mark.parametrize("text", [r"a \\times b", r"one\nnext", r"$x$\nu = 3", r"it is\neven", r"a\r\nb"])
def test_latex_written_as_json_wants_it_and_line_ends_are_read(text: str):
    assert read_result(reply(GOOD.replace("and", text)), STAGES[1].form).groups


@pytest.mark.parametrize(
    ("given_reply", "words"),
    [
        (reply(GOOD, "length"), "cut off after 5 tokens"),
        (reply(GOOD.replace("line", "\\ud83d")), "half a character"),
        *((reply(GOOD.replace("and", rf"$2 {command} 3$")), "one backslash") for command in BROKEN),
        (reply(""), "no JSON object"),
        (reply("I would rather not."), "no JSON object"),
        (reply(GOOD[:-3]), "holds no JSON object"),
        (reply('{"groups": [{"steps": "1"}]}'), "groups.0.steps"),
        (reply("{" * 100_000 + "}"), "holds no JSON object"),
        (reply('{"groups": ' + "[" * 100_000 + "}"), "holds no JSON object"),
    ],
)
def test_what_is_no_result_is_refused_with_the_place(given_reply: Reply, words: str):
    with pytest.raises(Refusal, match=words) as caught:
        read_result(given_reply, STAGES[1].form)
    assert caught.value.check == "form"


def test_schemas_are_strict_all_the_way_down():
    for stage in (*STAGES, JUDGE):
        schema = schema_of(stage.form)
        parts = [schema, *schema.get("$defs", {}).values()]
        assert all(
            part["additionalProperties"] is False and part["required"] == list(part["properties"]) for part in parts
        )
        assert "default" not in json.dumps(schema)


def test_the_log_gives_back_what_was_put_and_a_damaged_one_is_told_of(tmp_path: Path):
    log = CallLog(tmp_path / "calls.sqlite3")
    assert log.get(b"key") is None
    log.put(b"key", reply("täxt\n"))
    log.close()
    again = CallLog(tmp_path / "calls.sqlite3")
    assert again.get(b"key") == reply("täxt\n")
    again.close()
    (tmp_path / "calls.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(CommandError, match=r"cannot read .*calls.sqlite3"):
        CallLog(tmp_path / "calls.sqlite3")


# Settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: m", "unknown name 'modle' .*did you mean model"),
        ("", "no model"),
        ("model: m\nconcurrency: many", "concurrency must be int, got 'many'"),
        ("model: m\nconcurrency: 0", "concurrency must be at least 1, got 0"),
        ("model: m\nmax_distance: 2", "max_distance must be from 0"),
        ("model: m\ntimeout_s: -1", "timeout_s must be a number above 0"),
        ("model: m\ncolumns: {promt: q}", "unknown name 'promt' in columns; did you mean prompt"),
        ("model: m\nprices: {m: {input: 1}}", "unknown name 'input' in the price of m; there are prompt, completion"),
        ("model: m\nprices: {m: cheap}", "the price of m must be"),
        ("model: m\nbase_url: localhost", "must be an address"),
        ("model: m\nbase_url: https://me:secret@host/v1", "holds a key"),
        ("model: m\nbase_url: https://host/v1#secret", "holds a key"),
        ("model: m\nbase_url: http://host:port/v1", "a port out of range \\(1-65535\\)"),
        ("model: m\ntimeout_s: .inf", "timeout_s must be a number above 0, got inf"),
        ("model: m\nprices: {m: {prompt: -1}}", "the price of m must be at least 0"),
        ("model: m\nrequest: {model: other}", "request cannot have model: it is a setting of its own"),
        ("model: m\nrequest: {response_format: null}", "json_schema: false turns schemas off"),
        ("model: m\nrequest: {api_key: x}", "put keys into an environment variable"),
        ("model: [", "cannot read"),
        ("- model", "must hold settings"),
        ("model: m\njudge: 1", "judge must be bool"),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(tmp_path: Path, text: str, words: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CommandError, match=words) as caught:
        load_settings(path)
    assert "secret" not in str(caught.value)


def test_options_go_before_the_config_file_and_keys_come_from_the_environment(tmp_path: Path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nseed: 3\nprices: {m: {prompt: 1, completion: 2.5}}\n")
    settings = load_settings(path, seed=4, base_url=None)
    assert (settings.model, settings.seed) == ("m", 4)
    assert settings.cost("m", 10**6, 2 * 10**6) == 6
    assert settings.cost("other", 1, 1) is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("MINE", "mine")
    assert settings.api_key() == "hf_secret"
    # a token of the Hub's goes to nobody else, not even to a host whose name looks like it
    for host in ("https://api.openai.com/v1", "https://huggingface.co.evil.org/v1", "https://nothuggingface.co/v1"):
        assert load_settings(path, base_url=host).api_key() == "sk-secret"
    assert load_settings(path, base_url="http://localhost:1/v1", api_key_env="MINE").api_key() == "mine"
    with pytest.raises(CommandError, match="NOT_SET is empty"):
        load_settings(path, api_key_env="NOT_SET").api_key()


@pytest.mark.parametrize("stage_name", [stage.name for stage in STAGES])
def test_each_lie_of_the_rule_server_is_refused(stage_name: str):
    trace, found = target(Kind.FLAT, 3, 4)
    draft, stage, truth = drafted(trace, found, stage_name)
    sentences = [sentence.strip() for sentence in draft.sentences]
    for kind in (*rule_server.LIES, *rule_server.STAGE_LIES.get(stage_name, ())):
        text, finish_reason = rule_server.lie(kind, truth, found, sentences)
        if kind == "other ending":  # which only the answer shows
            changed = stage.check(draft, read_result(reply(text, finish_reason), stage.form))
            assert final_answers(reasoning_of(changed.plain)) != final_answers(trace.reasoning)
        else:
            with pytest.raises(Refusal):
                stage.check(draft, read_result(reply(text, finish_reason), stage.form))
