"""Documents by construction: every family's documents are right, and a bad family gets one clear line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from multiverse_hf.data.families import (
    Fork,
    ProblemFamily,
    Solution,
    Subtask,
    find_dependence,
    find_wrong_arithmetic,
    load_families,
)
from multiverse_hf.documents import validate

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m"
SEQUENTIAL = {"chain_sum", "prime_factorization", "spell_backward"}
NESTED = {"letter_counting", "products"}
PARALLEL = {
    "caesar_cipher", "gcd", "group_anagrams", "knights_knaves", "leg_counting", "number_filtering", "pool_matrix",
}  # fmt: skip
NAMES = sorted(SEQUENTIAL | NESTED | PARALLEL)


def recipe_family(name: str) -> ProblemFamily:
    pytest.importorskip("reasoning_gym")
    return load_families(RECIPE / "families")[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_document_of_a_family_is_right(name: str) -> None:
    from multiverse_hf.curator.checks import check_independence

    family, depths = recipe_family(name), set()
    for item in family.items(seed=5000, count=20):
        solution = family.solve(item)
        assert family.find_faults(item, solution) == []
        document = solution.document()
        check_independence(document, item["question"])
        assert document.render() == family.solve(item).document().render()
        assert "<Path>" not in document.sequential()
        depths.add(document.depth)
    assert max(depths) == (0 if name in SEQUENTIAL else 2 if name in NESTED else 1)


def test_the_words_of_a_claim_are_those_of_its_question() -> None:
    pytest.importorskip("reasoning_gym")
    family = recipe_family("knights_knaves")
    for item in family.items(seed=6000, count=30):
        said = [fork.write(fork.parts[0]).steps[0] for fork in family.solve(item).forks()]
        claims = re.findall(r" says that (.+?)\. This is", said[0])
        assert len(claims) == 2
        assert all(claim in item["question"] for claim in claims), (item["question"], claims)


def test_the_recipe_has_these_families() -> None:
    pytest.importorskip("reasoning_gym")
    assert sorted(load_families(RECIPE / "families")) == NAMES


@pytest.mark.parametrize("name", sorted(NESTED | PARALLEL))
def test_a_wrong_answer_is_found(name: str) -> None:
    family = recipe_family(name)
    item = next(family.items(seed=5000, count=1))
    solution = family.solve(item)
    assert family.find_faults(item, Solution(solution.steps, "9999"))


def test_a_path_that_reads_its_siblings_is_found() -> None:
    seen: list[int] = []

    def count_up(part: int) -> Subtask:
        seen.append(part)
        return Subtask(f"{part}", (f"{sum(seen)} so far.",))

    assert find_dependence(Fork(count_up, (1, 2, 3), "Done."))
    assert not find_dependence(Fork(lambda part: Subtask(f"{part}", (f"{part} alone.",)), (1, 2, 3), "Done."))


def test_a_path_stays_equal_when_siblings_are_missing() -> None:
    fork = Fork(lambda part: Subtask(f"number {part}", (f"Twice: 2 x {part} = {2 * part}.",)), (3, 4, 5), "Done.")
    whole, fewer = (
        next(Solution((Fork(fork.write, parts, "Done."),), "1").document().blocks())[0].paths
        for parts in ((3, 4, 5), (3, 4))
    )
    assert whole[:2] == fewer


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("2 + 3 = 5. 84 / 2 = 42.", True),
        ("2 + 3 x 4 = 14.", True),
        ("-6 - -9 = 3.", True),
        ("-27 is smaller than -23.", True),
        ("2 + 3 = 6.", False),
        ("7 / 2 = 3.5. 7 / 2 = 3.50.", True),
        ("7 / 2 = 3.", False),
        ("7 / 2 = 3.4.", False),
        ("x = 5", False),  # cannot be read, so it cannot be checked
        ("3 is larger than 4.", False),
    ],
)
def test_arithmetic_is_checked(text: str, is_right: bool) -> None:
    assert (find_wrong_arithmetic(text) == []) == is_right


OWN = """
from multiverse_hf.data.families import Subtask, ProblemFamily, Fork, Solution

def make(seed):
    return {"question": f"What are twice {seed} and thrice {seed}?", "answer": f"{2 * seed} {3 * seed}"}

def write(part):
    factor, number = part
    return Subtask(f"{factor} times {number}", (f"{factor} x {number} = {factor * number}.",))

def solve(item):
    number = int(item["question"].split()[3])
    return Solution((Fork(write, ((2, number), (3, number)), "Both are known."),), item["answer"])

FAMILIES = [ProblemFamily("twice", solve, make=make)]
"""


def make_data(*arguments: str | Path, hash_seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RECIPE / "make_data.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "COLUMNS": "119"},
    )


@pytest.mark.slow
def test_a_users_own_family_is_built_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "twice.py").write_text(OWN)
    done = make_data("--output", tmp_path / "out", "--families", tmp_path / "mine", "--size", "4", "--heldout", "2")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "multiverse.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "out" / "tasks.txt").read_text() == ""


@pytest.mark.slow
def test_two_builds_are_byte_equal_and_share_no_question(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    from multiverse_hf.data.records import number_rows, read_record
    from multiverse_hf.judging.gym import make_problem, parse_generator

    for place in (0, 1):
        done = make_data("--output", tmp_path / str(place), "--size", "24", "--heldout", "2", hash_seed=place)
        assert done.returncode == 0, done.stderr
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "01")
    assert first == second
    rows = {
        name: [row for _, row in number_rows(str(tmp_path / "0" / f"{name}.jsonl"))]
        for name in ("multiverse", "autoregressive", "heldout")
    }
    asked = {make_problem(parse_generator(task), 0)[0].strip() for task in first["tasks.txt"].decode().splitlines()}
    questions = {row["question"].strip() for row in rows["heldout"]}
    assert asked <= questions
    for parallel, sequential in zip(rows["multiverse"], rows["autoregressive"], strict=True):
        records = [read_record(row) for row in (parallel, sequential)]
        assert [record.doubt for record in records] == [None, None]
        assert validate(records[0].document) == []
        assert records[0].document.sequential() == records[1].document.render()
        assert not any(parallel["prompt"][0]["content"].startswith(question) for question in questions)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("FAMILIES = 3", "has no list FAMILIES"),
        (None, "has no family file"),
        (OWN.replace("3 * seed}", "4 * seed}").replace('item["answer"]', '"1"'), "scores 0.0, not 1"),
        (OWN.replace("{factor * number}.", "{factor + number}."), "wrong or unreadable arithmetic"),
    ],
)
def test_a_bad_family_file_is_one_line(tmp_path: Path, source: str | None, message: str) -> None:
    if source is not None:
        (tmp_path / "bad.py").write_text(source)
    done = make_data("--output", tmp_path / "out", "--families", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not [file for file in tmp_path.glob("out/*") if file.is_file()]


def test_an_unknown_family_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(OWN)
    done = make_data("--output", tmp_path / "out", "--families", tmp_path, "--only", "thrice")
    assert done.returncode == 2
    assert "no family 'thrice'" in done.stderr.splitlines()[-1]
