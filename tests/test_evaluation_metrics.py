"""Metrics: against slow oracles, and against what the engine counted."""

import itertools
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_hf import MultiverseEngine, embedded_model
from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.data.chains import Kind, document, sample_problem
from multiverse_hf.evaluation.metrics import (
    avg_at_n,
    bootstrap,
    is_well_formed,
    measure_ids,
    parallel_rate,
    parallelism,
    pass_at_k,
    speedup,
)
from multiverse_hf.outputs import json_text

ROOT = Path(__file__).parents[1]


@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=7), k=st.integers(1, 7))
def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_right_one(verdicts: list[bool], k: int) -> None:
    if k > len(verdicts):
        with pytest.raises(ValueError, match=f"pass@{k}"):
            pass_at_k(len(verdicts), sum(verdicts), k)
        return
    draws = [any(draw) for draw in itertools.combinations(verdicts, k)]
    assert pass_at_k(len(verdicts), sum(verdicts), k) == pytest.approx(sum(draws) / len(draws))


@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=9))
def test_pass_at_1_is_avg_at_n(verdicts: list[bool]) -> None:
    assert pass_at_k(len(verdicts), sum(verdicts), 1) == pytest.approx(avg_at_n(verdicts))


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_an_interval_holds_its_mean_lies_within_the_values_and_is_the_same_again(
    values: list[float], seed: int
) -> None:
    estimate = bootstrap(values, seed)
    assert min(values) - 1e-9 <= estimate.low <= estimate.value + 1e-9
    assert estimate.value - 1e-9 <= estimate.high <= max(values) + 1e-9
    assert bootstrap(values, seed) == estimate


def test_an_interval_is_as_wide_as_the_normal_one_where_there_are_many_problems() -> None:
    # 400 problems, half right: standard error sqrt(0.25 / 400) = 0.025, so 0.5 -+ 1.96 * 0.025
    estimate = bootstrap([0.0, 1.0] * 200)
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.451, 0.549), abs=0.006)


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="as many tokens as positions"):
        parallelism(3, 4)
    with pytest.raises(ValueError, match="positive"):
        speedup(1.0, 0.0)
    for empty in (avg_at_n, parallel_rate, bootstrap):
        with pytest.raises(ValueError, match="at least one"):
            empty([])
    assert parallelism(0, 0) == 1
    assert speedup(3.0, 1.5) == 2
    assert parallel_rate([0, 2, 1, 0]) == 0.5


@pytest.mark.slow
def test_ids_of_an_answer_measure_what_the_engine_counted_also_where_a_budget_cut_it() -> None:
    checkpoint = open_checkpoint(None)
    model = load_model(checkpoint, Dtype.AUTO, Attention.SDPA, "cpu", None)
    problem = sample_problem(random.Random(3), Kind.NESTED, 5)
    ids = checkpoint.encode(problem.prompt())
    with MultiverseEngine(model) as engine:
        for budget in (40, 150, 1024):
            result = engine.submit(ids, max_new_tokens=budget, do_sample=False).result()
            measured = measure_ids(result.ids, checkpoint.tags)
            assert (measured.num_tokens, measured.length) == (result.stats.num_tokens, result.stats.length)
            assert measured.parallelism == result.stats.parallelism
            assert is_well_formed(checkpoint.decode(result.ids))
    assert not is_well_formed("<Parallel>\n<Goal>")
    assert is_well_formed("no tags at all")


def test_the_evaluate_library_loads_the_metric_by_its_path_offline() -> None:
    evaluate = pytest.importorskip("evaluate", reason="needs multiverse_hf[eval]")
    metric = evaluate.load(str(ROOT / "metrics/parallelism"))
    documents = [document(sample_problem(random.Random(1), kind, n)) for kind, n in (("single", 1), ("flat", 4))]
    checkpoint = open_checkpoint(None)
    measures = [measure_ids(checkpoint.tokenizer.encode(text), checkpoint.tags) for text in documents]
    result = metric.compute(predictions=[*documents, "</Path>"], tokenizer=embedded_model())
    assert result["parallelism"] == pytest.approx((sum(each.parallelism for each in measures) + 1) / 3)
    assert result["length"] == pytest.approx((sum(each.length for each in measures) + 1) / 3)
    assert measures[1].parallelism > 1.5
    assert (result["well_formed"], result["parallel_rate"]) == pytest.approx((2 / 3, 1 / 3))


def test_a_figure_counts_in_whole_numbers_and_has_plain_ones_on_a_log_axis(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs multiverse_hf[eval]")
    from multiverse_hf.evaluation.figures import count_axis, log_axis, make_figure, save_figure

    for name in ("one", "two"):
        figure, (counts, sizes) = make_figure(2)
        counts.hist([1, 1, 2, 2.5])
        count_axis(counts)
        sizes.plot([5.5, 7.5], [1, 2], label="a line")  # within one power of two
        sizes.legend()
        log_axis(sizes, [5.5, 7.5])
        save_figure(figure, tmp_path / name)
    assert all(label.get_text().isdecimal() for label in counts.get_yticklabels())
    assert counts.get_ylim()[0] == 0
    assert [label.get_text() for label in sizes.get_xticklabels(which="both")] == ["5.5", "7.5"]
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_json_has_null_for_numbers_it_does_not_have() -> None:
    value = {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}}
    assert json_text(value) == '{"a": [null, 1.5, [null]], "b": {"c": null, "d": "NaN"}}\n'
