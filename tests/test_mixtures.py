"""The training stream of the chains family."""

from itertools import islice

import pytest

from multiverse_hf.data.chains import (
    Chain,
    Kind,
    document,
    is_correct,
    parse_problem,
    read_chains_answer,
    sample_problem,
)
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.records import Form
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX
from multiverse_hf.documents import check, parse_document


def test_the_twin_sees_the_same_problems_in_the_same_order_all_sequential():
    parallel, twin = ChainsMixture(600, seed=3), ChainsMixture(600, seed=3, sequential=True)
    assert [row.problem for row in parallel] == [row.problem for row in twin]
    assert not any("<Parallel>" in row.document or row.form is Form.PLAIN for row in twin)


def test_a_stream_is_repeatable_and_grows_from_short_rows_to_all_shapes():
    rows = list(ChainsMixture(1500, seed=5, ramp=0.5))
    assert rows == list(ChainsMixture(1500, seed=5, ramp=0.5))
    early, late = rows[:40], rows[750:]
    assert max(len(chain.terms) for row in early for chain in row.problem.chains) == 2
    assert max(len(row.problem.chains) for row in early) == 3
    assert {row.problem.kind for row in late} == set(Kind)
    assert {len(chain.terms) for row in late for chain in row.problem.chains} == set(range(1, 9))
    assert {len(row.problem.chains) for row in late} == set(range(1, 9))
    assert 0.05 < sum(row.form is Form.PLAIN for row in rows) / len(rows) < 0.2


def test_every_document_is_valid_right_and_strips_to_the_sequential_one():
    for row in islice(ChainsMixture(400, seed=7, ramp=0), 400):
        tree = parse_document(document(row.problem))
        check(tree)
        assert is_correct(row.problem, tree.render())
        assert is_correct(row.problem, tree.sequential())
        assert tree.num_paths == (0 if row.problem.kind == Kind.SINGLE else tree.num_paths)
        assert parse_problem(row.prompt) == row.problem


@pytest.mark.parametrize("kind", list(Kind))
def test_a_problem_reads_back_from_its_text(kind):
    import random

    rng = random.Random(11)
    for _ in range(200):
        problem = sample_problem(rng, kind)
        assert parse_problem(str(problem)) == problem
        assert parse_problem(problem.prompt()) == problem
        assert all(0 <= value <= 99 for chain in problem.chains for value in chain.values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a chains problem"),
        ("A=1+2", "not a chains problem"),
        ("A=1; total?", "not a chain"),
        ("B=1+2; total?", "named A, B, C"),
        ("A=1+2;  B=3+4; total?", "not a chain"),
        ("A=21+2; total?", "1 to 20"),
        ("A=1-2; total?", "between 0 and 99"),
        ("(A=1+2) (B=3+4) total?", "at least two chains"),
        ("A=1+2; total? Be quick.", "not a chains problem"),
    ],
)
def test_what_is_no_problem_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_problem(text)


def test_the_checker_takes_the_last_line_only():
    problem = parse_problem(f"A=1+2; total? {PARALLEL_SUFFIX}")
    assert is_correct(problem, "x\nAnswer: 3")
    assert not is_correct(problem, "Answer: 3\nAnswer: 4")
    assert not is_correct(problem, "Answer: 3 or so")
    assert read_chains_answer("no answer") is None
    with pytest.raises(ValueError, match="1 to 8 operations"):
        Chain("A", 1, ())
