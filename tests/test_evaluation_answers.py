"""Verdicts: gold answers are right and wrong ones wrong on every task, and hostile strings behave as documented."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from multiverse_hf.data.chains import document, parse_problem
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import AnswerKind, Rule, final_answer, judge
from multiverse_hf.evaluation.tasks import TASKS, Mode, load_problems, row_id
from multiverse_hf.judging.boxes import last_boxed
from multiverse_hf.judging.checker import find_folder, is_here
from multiverse_hf.judging.latex import clean, compact
from multiverse_hf.judging.verifier import WORKER, Verifier

NEEDS_EVAL = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pyarrow", "matplotlib"))) or not (is_here() or find_folder()),
    reason="needs multiverse_hf[eval]",
)
pytestmark = NEEDS_EVAL

BENCHMARKS = Path(__file__).parents[2] / "shared/data/benchmarks"
GPQA_ROW = {
    "Question": "Which of these made-up particles is a boson?",
    "Correct Answer": "the plinkton",
    "Incorrect Answer 1": "the plonkton",
    "Incorrect Answer 2": "the plunkton",
    "Incorrect Answer 3": "none",
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(timeout_s=3) as verifier:
        yield verifier


@pytest.mark.parametrize("name", ["aime24", "aime25", "math_500"])
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="../shared/data/benchmarks is not here")
def test_gold_answers_are_right_and_others_wrong(name: str, verifier: Verifier, tmp_path: Path) -> None:
    source = {"aime24": "aime25.jsonl", "aime25": "aime25.jsonl", "math_500": "math500_first100.jsonl"}[name]
    (tmp_path / f"{name}.jsonl").symlink_to(BENCHMARKS / source)
    problems = load_problems(TASKS[f"mv:{name}"], tmp_path).problems
    assert len(problems) == (100 if name == "math_500" else 30)
    for problem in problems:
        for text in (f"<Think>\nx\n</Think>\n\nAnswer: {problem.gold}", f"So $\\boxed{{{problem.gold}}}$."):
            verdict = judge(AnswerKind.MATH, problem.gold, text, verifier)
            assert (verdict.correct, verdict.rule) == (True, Rule.TEXT), (problem, text)
        wrong = judge(AnswerKind.MATH, problem.gold, f"\\boxed{{{problem.gold} + 1234567}}", verifier)
        assert not wrong.correct, problem


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="../shared/data/benchmarks is not here")
def test_whole_solutions_of_math_500_are_right(verifier: Verifier) -> None:
    rows = [json.loads(line) for line in (BENCHMARKS / "math500_first100.jsonl").read_text().splitlines()]
    verdicts = [judge(AnswerKind.MATH, row["answer"], row["solution"], verifier) for row in rows]
    assert [row["unique_id"] for row, verdict in zip(rows, verdicts, strict=True) if not verdict.correct] == []


def test_gpqa_letters_its_choices_in_an_order_that_is_always_the_same(verifier: Verifier) -> None:
    task = TASKS["mv:gpqa_diamond"]
    problem = task.read(GPQA_ROW)
    assert problem == task.read(dict(reversed(GPQA_ROW.items())))
    assert f"{problem.gold}) the plinkton" in problem.question
    assert problem.prompt(Mode.PARALLEL).endswith("Think step by step and in parallel before answering.")
    others = sorted(set("ABCD") - {problem.gold})
    for text in (f"Answer: {problem.gold}", f"\\boxed{{\\text{{{problem.gold}}}}}", f"**Answer:** ({problem.gold})"):
        assert judge(task.kind, problem.gold, text, verifier).rule is Rule.LETTER
    for text in (f"Answer: {others[0]}", f"Answer: {problem.gold} or {others[0]}", "Answer: the plinkton", "none"):
        assert not judge(task.kind, problem.gold, text, verifier).correct, text
    orders = {task.read(GPQA_ROW | {"Question": f"question {n}"}).gold for n in range(40)}
    assert orders == set("ABCD")


def test_chains_are_right_to_the_letter_only(verifier: Verifier) -> None:
    problem = parse_problem("A=5+6; B=7+8; total?")
    for text, correct in (
        (document(problem), True),
        ("Answer: 26", True),
        ("Answer: 27", False),
        ("Answer: 26.", False),
        ("\\boxed{26}", False),
        ("Answer: 26\nOr not.", False),
        ("Answer: 026", False),
        ("Answer: ٢٦", False),
        ("Answer: " + "2" * 5000, False),
    ):
        assert judge(AnswerKind.CHAINS, "26", text, verifier).correct is correct, text


# gold, answer, verdict, the rule that gives it
ADVERSARIAL = [
    # several boxes: the last one; joined by "or" a hedge, by "and" a list
    ("70", r"\boxed{3} is not it, \boxed{70} is", True, Rule.TEXT),
    ("70", r"\boxed{70}, no: \boxed{3}", False, Rule.DIFFERENT),
    ("3", r"\boxed{3} or \boxed{4}", False, Rule.SEVERAL),
    ("3, 4", r"\boxed{3} and $\boxed{4}$", True, Rule.TEXT),
    ("3, 4", r"$\boxed{3}$, $\boxed{4}$.", True, Rule.TEXT),
    ("4", r"\boxed{3}, \boxed{4}", False, Rule.DIFFERENT),
    ("4", r"\boxed{3}. \boxed{4}", True, Rule.TEXT),
    ("3", "Answer: 3 or 4", False, Rule.SEVERAL),
    ("3", "Answer: 3 (or 5)", False, Rule.SEVERAL),
    ("3", r"\boxed{3 \text{ or } 4}", False, Rule.SEVERAL),
    # units and what else does not change a number
    ("5", r"\boxed{5 \text{ cm}}", True, Rule.TEXT),
    ("5", r"Answer: $5\text{ cm}^2$.", True, Rule.TEXT),
    ("5", "Answer: 5 inches", True, Rule.TEXT),
    ("90^\\circ", r"\boxed{90}", True, Rule.TEXT),
    ("36", r"\boxed{\$36}", True, Rule.TEXT),
    ("10", r"\boxed{10\%}", True, Rule.TEXT),
    ("5", r"\boxed{x=5}", True, Rule.TEXT),
    ("1000", "Answer: 1,000", True, Rule.INTEGER),
    ("70", "Answer: 070", True, Rule.INTEGER),
    ("70", "Answer: 71", False, Rule.DIFFERENT),
    # words that are no unit, other units, and digits that something parts
    ("2", r"\boxed{2 pi}", False, Rule.DIFFERENT),
    ("5", r"\boxed{5 million}", False, Rule.DIFFERENT),
    ("2", r"\boxed{2\text{ or more}}", False, Rule.SEVERAL),
    (r"5\text{ m}", r"\boxed{5\text{ cm}}", False, Rule.DIFFERENT),
    ("34", r"\boxed{3 4}", False, Rule.DIFFERENT),
    ("34", r"\boxed{3\quad 4}", False, Rule.DIFFERENT),
    ("10000", r"\boxed{10\,000}", True, Rule.TEXT),
    # what math-verify passes over
    ("3", r"\boxed{\neq 3}", False, Rule.DIFFERENT),
    ("3", r"\boxed{\ge 3}", False, Rule.DIFFERENT),
    ("3", r"\boxed{4=3}", False, Rule.DIFFERENT),
    ("3", r"\boxed{2+1=3}", True, Rule.NUMBER),
    ("2516_8", r"\boxed{2516_{8}}", True, Rule.TEXT),
    ("2516_8", r"\boxed{2516_9}", False, Rule.DIFFERENT),
    ("2516_8", r"\boxed{2516}", False, Rule.DIFFERENT),
    # the same in other words
    (r"\frac{1}{2}", r"\boxed{\dfrac12}", True, Rule.TEXT),
    ("p - q", r"\boxed{-q+p}", True, Rule.MATH_VERIFY),
    ("p - q", r"\boxed{q-p}", False, Rule.DIFFERENT),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True, Rule.MATH_VERIFY),
    ("(3,4)", r"\boxed{(4,3)}", False, Rule.DIFFERENT),
    # intervals: their ends count
    ("[1,2)", r"\boxed{[1, 2)}", True, Rule.TEXT),
    ("(1,2)", r"\boxed{[1,2]}", False, Rule.DIFFERENT),
    (r"(-\infty,3)\cup(5,\infty)", r"\boxed{(5,\infty) \cup (-\infty, 3)}", True, Rule.PARTS),
    # numbers nobody can write down
    ("5", r"\boxed{9^{9^{9^{9}}}}", False, Rule.TIMEOUT),
    ("5", r"\boxed{99999999999!}", False, Rule.TIMEOUT),
    ("5", "\\boxed{" + "(" * 3000 + "}", False, Rule.UNREADABLE),
    # nothing said
    ("5", r"\boxed{}", False, Rule.NO_ANSWER),
    ("5", r"\boxed{5", False, Rule.NO_ANSWER),
    ("5", "It is 5.", False, Rule.NO_ANSWER),
    ("5", r"<Think>\boxed{5}", False, Rule.NO_ANSWER),
    ("5", "<Think>\\boxed{5}</Think>\n\nI do not know.", False, Rule.NO_ANSWER),
]


@pytest.mark.parametrize(("gold", "text", "correct", "rule"), ADVERSARIAL, ids=[each[1][:40] for each in ADVERSARIAL])
def test_hostile_answers_are_judged_as_documented_and_none_hangs(
    gold: str, text: str, correct: bool, rule: Rule, verifier: Verifier
) -> None:
    verdict = judge(AnswerKind.MATH, gold, text, verifier)
    assert (verdict.correct, verdict.rule) == (correct, rule)


def test_many_boxes_that_are_not_closed_are_read_at_once() -> None:
    assert last_boxed("\\boxed{" * 100_000) is None  # in time that grows with the square this would take hours
    assert last_boxed("\\boxed{1}" + "\\boxed{" * 100_000) == "1"


def test_a_verifier_goes_on_after_its_process_is_killed_from_outside(verifier: Verifier) -> None:
    assert verifier.is_same("1/2", "0.5")
    verifier._process.kill()
    verifier._process.wait()
    assert verifier.is_same("1/2", "0.5")
    assert not verifier.is_same("1/2", "0.25")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("resource") is None, reason="needs limits of processes")
def test_a_comparison_ends_by_itself_where_nobody_is_left_to_end_it(verifier: Verifier) -> None:
    assert not verifier.is_same("1", "2")  # math-verify is installed
    code = "import verifier_worker as w; w.CPU_S = 1; w.main()"
    paths = [str(WORKER.parent), str(find_folder() or "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=environment)
    worker.stdin.write(json.dumps(["5", "9^{9^{9^{9}}}", False]) + "\n")
    worker.stdin.flush()
    assert worker.wait(60) == -signal.SIGXCPU


def test_the_end_of_an_answer_is_read_where_it_is_documented_to_be() -> None:
    assert final_answer("<Think>\\boxed{1}</Think>\n\nAnswer: 2") == "2"
    assert final_answer("Answer: 1\n\n**Final answer:** 2\nwhich is more than 1") == "2"
    assert final_answer("So the answer is: 3") is None  # it does not begin the line
    assert final_answer("<Think>a</Think>\n\nAnswer: It follows that\n$$\\boxed{7}$$") == "7"
    assert last_boxed(r"\boxed{\frac{1}{2}} and $\boxed{\{1, 2\}}$") == r"\frac{1}{2}, \{1, 2\}"
    assert compact(clean(r" $\text{Evelyn}$. ")) == "Evelyn"


def test_rows_that_cannot_be_had_are_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, *words: str) -> None:
        with pytest.raises(CommandError) as error:
            load_problems(TASKS[name], tmp_path)
        assert all(word in str(error.value) for word in words), error.value

    fails("mv:aime25", "aime25.jsonl")
    (tmp_path / "aime25.jsonl").write_text('{"problem": "x"}\n')
    fails("mv:aime25", "aime25.jsonl, line 1", "answer or solution", "it has problem")
    (tmp_path / "aime25.jsonl").write_text('{"problem": "x", "answer": "1"}\n' * 2)
    fails("mv:aime25", "aime25.jsonl, line 2 asks what line 1 does, 'x'")
    (tmp_path / "aime25.jsonl").write_text('{"problem": "x"')
    fails("mv:aime25", "line 1")
    (tmp_path / "aime-25.csv").write_text("problem,answer\nx,1\n")
    fails("mv:aime25", "several files", "aime-25.csv")
    with pytest.raises(CommandError, match="no folder nowhere"):
        load_problems(TASKS["mv:aime25"], Path("nowhere"))


def test_an_unreachable_gated_dataset_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CommandError, match=r"GPQA is gated: accept its terms at .* log in"):
        load_problems(TASKS["mv:gpqa_diamond"])


def test_a_row_has_one_id_however_it_is_spaced_and_chains_are_the_same_every_time() -> None:
    assert row_id("a  b\n") == row_id("a b")
    first, second = (load_problems(TASKS["mv:chains"]) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert [problem.group for problem in first.problems[:6]] == ["single", "flat", "nested"] * 2
    assert load_problems(TASKS["mv:chains"], limit=30).problems == first.problems[:30]
