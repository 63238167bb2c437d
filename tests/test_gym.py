"""The generators of reasoning-gym as tasks: names, problems, scores, and an evaluation as users run it."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from test_evaluation_answers import NEEDS_EVAL
from test_evaluation_run import ENVIRONMENT, error_of

from multiverse_hf.cli import run
from multiverse_hf.errors import CommandError, install_line
from multiverse_hf.evaluation.answers import Rule, Verdict, judge
from multiverse_hf.evaluation.compare import judge_again
from multiverse_hf.evaluation.results import read_results
from multiverse_hf.evaluation.rewards import make_prompts, score_answer
from multiverse_hf.evaluation.samples import read_samples
from multiverse_hf.evaluation.tasks import Mode, gym_task, load_problems
from multiverse_hf.judging import gym
from multiverse_hf.judging.verifier import Verifier

pytestmark = [
    NEEDS_EVAL,
    pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs multiverse_hf[tasks]"),
]


def verdict_on(name: str, document: str, number: int = 0) -> Verdict:
    """Judge a document as the answer to a problem of a generator."""
    task = gym_task(name)
    problem = load_problems(task, limit=number + 1).problems[number]
    return judge(task.kind, problem.gold, document.replace("GOLD", problem.gold), Verifier(), task.scorer(problem.id))


@pytest.mark.parametrize(
    ("text", "title", "options"),
    [
        ("rg:gcd", "rg:gcd", {"seed": 1_000_000, "size": 100}),
        ("rg:gcd,size=100", "rg:gcd", {"seed": 1_000_000, "size": 100}),
        ("rg:gcd, size=7,seed=0", "rg:gcd,seed=0,size=7", {"seed": 0, "size": 7}),
        ('rg:x,ops=["+", "-"],size=7', 'rg:x,ops=["+","-"],size=7', {"ops": ["+", "-"]}),
        ("rg:x,style=a b,flag=true,share=0.5", "rg:x,flag=true,share=0.5,style=a b", {"style": "a b", "flag": True}),
        ('rg:x,word="5",other=five', 'rg:x,other=five,word="5"', {"word": "5", "other": "five"}),
    ],
)
def test_a_name_with_options_is_read_and_written_the_same_way(text: str, title: str, options: dict) -> None:
    generator = gym.parse_generator(text)
    assert generator.title == title
    assert json.loads(generator.options).items() >= options.items()
    assert gym.parse_generator(title) == generator


@pytest.mark.slow
@pytest.mark.usefixtures("unquiet")
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("rg:", ["rg:NAME"]),
        ("rg:gcd,x", ["rg:NAME,OPTION=VALUE"]),
        ("rg:leg_countin", ["no generator 'leg_countin'", "leg_counting, letter_counting"]),
        ("rg:leg_counting,max_animal=3", ["no option 'max_animal'", "did you mean max_animals?"]),
        ("rg:leg_counting,max_animals=many", ["max_animals takes int such as 10", 'got "many"']),
        ("rg:chain_sum,min_terms=2.5", ["min_terms takes int", "got 2.5"]),
        ("rg:basic_arithmetic,operators=[1]", ['operators takes str such as "+"', "got 1"]),
        ("rg:leg_counting,max_animals=1", ["does not take max_animals=1", "max_animals must be >= min_animals"]),
        ("rg:gcd,size=0", ["size is an integer of at least 1", "got 0"]),
        ("rg:gcd,seed=one", ["seed is an integer of at least 0", "got 'one'"]),
        ("rg:gcd,seed=1,seed=2", ["seed is given twice"]),
    ],
)
def test_a_task_that_cannot_be_made_is_told_in_a_line(
    task: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capfd, "eval", "--task", task, "--output", str(tmp_path / "run"))
    assert all(word in line for word in [task.partition(",")[0], *words]), line
    assert not any((tmp_path / "run").glob("*"))


def test_a_missing_or_other_reasoning_gym_is_told_with_the_line_that_installs_it(monkeypatch) -> None:
    def find_nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    for find, words in ((find_nothing, "reasoning-gym is missing"), (lambda name: "0.2.0", "reasoning-gym 0.2.0")):
        gym._gym.cache_clear()
        monkeypatch.setattr(gym, "version", find)
        with pytest.raises(CommandError) as caught:
            gym.make_rows(gym.parse_generator("rg:gcd,size=11"))
        assert words in str(caught.value)
        assert install_line("tasks") in str(caught.value)
    gym._gym.cache_clear()


def test_the_rule_of_the_generators_judges_no_rows_of_ones_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}')
    assert "rg:NAME" in error_of(capfd, "eval", "--task", str(file), "--rule", "reasoning-gym")


@pytest.mark.slow
def test_two_processes_ask_the_same_whatever_their_hash_seeds() -> None:
    # both draw from sets of texts, whose order depends on the hash seed
    names = ["rg:polynomial_multiplication,size=5", "rg:knight_swap,size=2"]
    code = (
        "import json, sys; from multiverse_hf.judging import gym\n"
        "print(json.dumps([gym.make_rows(gym.parse_generator(name)) for name in sys.argv[1:]]))"
    )
    made = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code, *names], env=ENVIRONMENT | {"PYTHONHASHSEED": seed},
                capture_output=True, text=True, check=True, timeout=300,
            ).stdout
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    assert made[0] == made[1] == [gym.make_rows(gym.parse_generator(name)) for name in names]
    assert [len(rows) for rows in made[0]] == [5, 2]


@pytest.mark.slow
def test_problems_do_not_depend_on_the_limit_and_options_change_them() -> None:
    first, more = (load_problems(gym_task("rg:leg_counting,size=9"), limit=limit).problems for limit in (2, None))
    assert len(more) == 9
    assert more[:2] == first
    few = load_problems(gym_task("rg:leg_counting,min_animals=1,max_animals=1,size=9")).problems
    assert all("," not in problem.question.partition("you have")[2] for problem in few)  # one animal, no list
    assert len({problem.id for problem in load_problems(gym_task("rg:coin_flip,size=30")).problems}) == 30


# binary_matrix and sudoku have answers of several lines; the config of power_function has no validate
@pytest.mark.parametrize(
    "name", ["rg:leg_counting", "rg:caesar_cipher", "rg:power_function", "rg:binary_matrix", "rg:mini_sudoku"]
)
def test_the_right_answer_has_score_1_in_a_box_and_after_answer(name: str) -> None:
    for document in ("<Think>\nx\n</Think>\n\nAnswer: GOLD", r"so \boxed{GOLD}", "Answer:\nGOLD\n", "\\boxed{7} x\n"):
        verdict = verdict_on(name, document, number=1)
        right = "GOLD" in document
        assert (verdict.correct, verdict.rule) == (right, Rule.REASONING_GYM), (document, verdict)
        assert (verdict.score == 1.0) is right
    for document in ("<Think>\nAnswer: GOLD", "GOLD", ""):
        assert verdict_on(name, document, number=1) == Verdict(False, Rule.NO_ANSWER, None, 0.0)


def test_a_score_below_1_is_kept_and_wrong() -> None:
    gold = gym.make_problem(gym.parse_generator("rg:gcd"), 0)[1]
    # the base class scores a text that contains the right answer by their lengths
    assert verdict_on("rg:gcd", f"Answer: {gold} or so") == Verdict(
        False, Rule.REASONING_GYM, f"{gold} or so", len(gold) / len(f"{gold} or so")
    )
    assert verdict_on("rg:caesar_cipher", r"\boxed{\text{GOLD}}").score == 1


def test_a_generator_without_right_answer_of_its_own_scores_every_one_that_is_right() -> None:
    name = "rg:graph_color,min_num_vertices=4,max_num_vertices=4,edge_probability=0.8"
    question, answer = gym.make_problem(gym.parse_generator(name), 0)
    assert answer is None
    vertices, edges, colors = (
        json.loads(f"[{re.search(pattern, question)[1]}]".replace("(", "[").replace(")", "]"))
        for pattern in (r"Vertices: \[(.*)\]", r"Edges: \[(.*)\]", r"Possible colors: \[(.*)\]")
    )
    colorings = [dict(zip(vertices, chosen, strict=True)) for chosen in itertools.product(colors, repeat=4)]
    right = [all(each[one] != each[other] for one, other in edges) for each in colorings]
    for said in (True, False):
        coloring = colorings[right.index(said)]
        assert verdict_on(name, f"Answer: {json.dumps(coloring)}").correct is said, coloring


@pytest.mark.slow
def test_an_answer_whose_score_fails_or_never_ends_is_wrong_and_the_next_is_scored(monkeypatch) -> None:
    # prime_factorization calls int(), countdown lets sympy compute the tower
    assert verdict_on("rg:prime_factorization", "Answer: abc") == Verdict(False, Rule.UNREADABLE, "abc", 0.0)
    monkeypatch.setattr(gym._gym(), "timeout_s", 0.5)
    for _ in range(2):
        assert verdict_on("rg:countdown", "Answer: 9**9**9**9") == Verdict(False, Rule.TIMEOUT, "9**9**9**9", 0.0)
    monkeypatch.undo()
    assert verdict_on("rg:countdown", "Answer: GOLD").score == 1


def test_prompts_and_the_reward_are_those_of_the_evaluation() -> None:
    dataset = make_prompts("rg:gcd,size=3", "rg:leg_counting,seed=5,size=2")
    assert dataset.column_names == ["prompt", "answer", "task", "metadata"]
    assert dataset["task"][:] == ["rg:gcd,size=3"] * 3 + ["rg:leg_counting,seed=5,size=2"] * 2
    problem = load_problems(gym_task("rg:leg_counting,seed=5,size=2")).problems[1]
    assert dataset[4]["prompt"] == [{"role": "user", "content": problem.prompt(Mode.PARALLEL)}]
    columns = dataset[:]
    prompts = columns.pop("prompt")
    right = [[{"role": "assistant", "content": f"<Think>\n</Think>\nAnswer: {gold}"}] for gold in columns["answer"]]
    assert score_answer(right, prompts=prompts, **columns) == [1.0] * 5
    assert score_answer(["no idea", "Answer: x", "", "Answer: 7", "12"], prompts=prompts, **columns) == [0.0] * 5


@pytest.mark.slow
@pytest.mark.usefixtures("unquiet")
def test_an_evaluation_is_run_extended_compared_and_judged_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "rg:leg_counting,max_animals=3,size=5"
    options = ["--task", name, "--task", "mv:chains", "--max-new-tokens", "40", "--temperature", "0"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(["eval", *options, "--limit", "2", "--output", str(first)]) == 0
    assert run(["eval", *options, "--limit", "3", "--output", str(first)]) == 0
    assert run(["eval", *options, "--limit", "3", "--mode", "autoregressive", "--output", str(second)]) == 0
    results = read_results(first)
    task = results["tasks"][name]
    assert (task["rule"], task["problems"], results["samples_before"]) == ("reasoning-gym", 3, 4)
    assert (results["versions"]["reasoning-gym"], task["source"]) == (gym.VERSION, f"reasoning-gym {gym.VERSION}")
    assert task["options"].items() >= {"max_animals": 3, "min_animals": 3, "seed": 1_000_000, "size": 5}.items()
    assert task["metrics"]["score"].keys() == {"value", "low", "high"}
    assert "score" not in results["tasks"]["mv:chains"]["metrics"]
    assert "| score |" in (first / "report.md").read_text()
    samples = [sample for sample in read_samples(first / "samples") if sample.task == name]
    assert [sample.prompt for sample in samples] == [
        problem.prompt(Mode.PARALLEL) for problem in load_problems(gym_task(name), limit=3).problems
    ]
    assert all(sample.score is not None for sample in samples)
    for other in (name.replace("size=5", "size=6"), name + ",seed=1"):
        line = error_of(capfd, "eval", "--task", other, *options[2:], "--limit", "3", "--output", str(first))
        assert name in line
        assert other.partition(",size")[0] in line
    capfd.readouterr()
    assert run(["compare", str(second), str(first), "--output", str(tmp_path / "out")]) == 0
    assert "score" in capfd.readouterr().out
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())["tasks"]
    assert comparison[name]["problems"] == 3
    assert "score" in comparison[name]["differences"]
    assert "score" not in comparison["mv:chains"]["differences"]
    # answers that an older version judged
    right = [replace(sample, document=f"Answer: {sample.gold}") for sample in samples]
    assert [(sample.correct, sample.score) for sample in judge_again(right, results)] == [(True, 1.0)] * 3
    with pytest.raises(CommandError, match="other problems in this version"):
        judge_again([replace(samples[0], id="0-0123456789ab")], results)
