"""The paper's experiments as commands: small runs of them, what they write and what they refuse."""

import json
from pathlib import Path

import pytest
from test_evaluation_answers import NEEDS_EVAL

from multiverse_hf.cli import run
from multiverse_hf.evaluation.experiments import paper
from multiverse_hf.evaluation.experiments.batches import cut
from multiverse_hf.evaluation.experiments.budget import rising_part
from multiverse_hf.evaluation.experiments.latency import fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unquiet"), NEEDS_EVAL]


def check_files(folder: Path, name: str) -> dict:
    """Check the figure, and give the numbers."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / f"{name}.svg").read_text()
    result = json.loads((folder / f"{name}.json").read_text())
    assert (result["schema"], result["experiment"]) == (1, name)
    assert {"versions", "hardware", "commit", "command"} <= result.keys()
    return result


def test_the_table_has_base_autoregressive_zero_and_parallel(tmp_path: Path, capfd) -> None:
    options = ["--limit", "3", "--max-new-tokens", "64", "--output", str(tmp_path), "--temperature", "0"]
    assert run(["eval", "--suite", "paper", *options]) == 0
    result = check_files(tmp_path, "table")
    rows = result["rows"]
    assert list(rows) == ["base", "autoregressive", "zero", "parallel"]
    assert [row["mode"] for row in rows.values()] == ["autoregressive", "autoregressive", "zero", "parallel"]
    assert rows["autoregressive"]["model"]["name"] == "multiverse-tiny-sequential"
    assert rows["base"]["model"]["fingerprint"] != rows["parallel"]["model"]["fingerprint"]
    suffixes = {name: row["prompts"]["suffix"] for name, row in rows.items()}
    assert suffixes["zero"] == suffixes["base"] == "Think step by step before answering."
    assert rows["parallel"]["sampling"]["structure"] == rows["zero"]["sampling"]["structure"] == "guided"
    page = (tmp_path / "table.md").read_text()
    assert page.count("mv:chains, 3 problems") == 1
    for name in rows:
        assert json.loads((tmp_path / name / "results.json").read_text())["tasks"] == rows[name]["tasks"]
        assert f"| {name} |" in page
    weights = (tmp_path / "base-model/model.safetensors").stat().st_mtime_ns
    assert run(["eval", "--suite", "paper", *options]) == 0  # goes on: nothing is left to do
    assert (tmp_path / "base-model/model.safetensors").stat().st_mtime_ns == weights


def test_the_papers_numbers_stand_beside_a_task_it_has(tmp_path: Path) -> None:
    (tmp_path / "aime25.jsonl").write_text('{"problem": "What is 1+1?", "answer": "2"}')
    options = ["--max-new-tokens", "16", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    assert run(["eval", "--suite", "paper", "--task", "mv:aime25", *options]) == 0
    page = (tmp_path / "out/table.md").read_text()
    assert "45.8 % | 1.15 |" in page  # parallel
    assert "44.2 % | 1.05 |" in page  # zero
    assert "45.0 % |  |" in page  # autoregressive


def test_a_budget_curve_pairs_both_models_at_every_budget(tmp_path: Path) -> None:
    options = ["--limit", "3", "--budgets", "160,40", "--temperature", "0", "--output", str(tmp_path)]
    assert run(["experiment", "budget", *options]) == 0
    result = check_files(tmp_path, "budget")
    assert [row["budget"] for row in result["rows"]] == [40, 160]
    for row in result["rows"]:
        for side in ("parallel", "autoregressive"):
            assert row[side]["length"]["high"] <= row["budget"]
            stored = json.loads((tmp_path / f"{side}-{row['budget']}/results.json").read_text())
            assert stored["sampling"]["max_new_tokens"] == row["budget"]
            assert stored["tasks"]["mv:chains"]["metrics"]["pass@1"] == row[side]["pass@1"]
        gain = row["parallel"]["pass@1"]["value"] - row["autoregressive"]["pass@1"]["value"]
        assert row["difference"]["value"] == pytest.approx(gain, abs=1e-5)
    assert result["paper"]["mean_gain"] == 1.87


def test_the_rising_part_is_where_a_model_still_gains() -> None:
    def row(budget: int, parallel: float, twin: float) -> dict:
        return {"budget": budget} | {
            side: {"pass@1": {"value": value}} for side, value in (("parallel", parallel), ("autoregressive", twin))
        }

    rows = [row(1, 0, 0), row(2, 0, 0), row(3, 0.5, 0), row(4, 0.9, 0.4), row(5, 0.9, 0.4), row(6, 0.8, 0.4)]
    assert rising_part(rows) == [2, 3, 4]


def test_latency_is_fitted_on_real_answers_and_the_share_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--limit", "3", "--repeats", "2", "--max-new-tokens", "200", "--output", str(tmp_path)]
    assert run(["experiment", "latency", *options]) == 0
    result = check_files(tmp_path, "latency")
    x = [point["parallelism"] for point in result["points"]]
    assert x[0] == 1
    assert max(x) > 1.2
    assert all(0 < point["min"] <= point["ms_per_token"] <= point["max"] for point in result["points"])
    again = fit(x, [point["ms_per_token"] for point in result["points"]])
    assert result["fit"]["share_percent"] == pytest.approx(again.share_percent, rel=1e-3, abs=1e-3)
    assert f"b/(a+b) = {result['fit']['share_percent']:.1f} %" in capfd.readouterr().out


def test_batches_answer_the_same_problems_at_every_size(tmp_path: Path) -> None:
    options = ["--limit", "4", "--sizes", "2,1", "--repeats", "1", "--max-new-tokens", "120"]
    assert run(["experiment", "batch", *options, "--output", str(tmp_path)]) == 0
    result = check_files(tmp_path, "batch")
    assert [(row["batch"], row["batches"], row["answers"]) for row in result["rows"]] == [(1, 4, 4), (2, 2, 4)]
    for row in result["rows"]:
        ratio = row["ms_per_token"]["autoregressive"] / row["ms_per_token"]["parallel"]
        assert row["speedup"] == pytest.approx(ratio, rel=1e-2)
        assert row["parallelism"] > 1


def test_prompts_are_cut_into_whole_batches() -> None:
    prompts = [[number] for number in range(5)]
    assert cut(prompts, 2) == [[[0], [1]], [[2], [3]]]
    assert cut(prompts, 5) == [prompts]
    assert cut(prompts, 7) == [[*prompts, [0], [1]]]


def test_the_papers_curves_have_the_shares_it_gives() -> None:
    for tokens, (a, b) in paper.LATENCY_CURVES.items():
        assert 100 * b / (a + b) == pytest.approx(paper.LATENCY_SHARES[tokens], abs=0.06)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["budget", "--model", "mine"], ["mine is compared with its autoregressive twin", "--autoregressive"]),
        (["budget", "--budgets", "1,x"], ["--budgets", "'1,x'"]),
        (["batch", "--sizes", "0"], ["--sizes", "'0'"]),
        (["latency", "--task", "mv:chain"], ["did you mean mv:chains"]),
        (["latency", "--limit", "1", "--repeats", "1", "--max-new-tokens", "4"], ["two degrees of parallelism"]),
    ],
)
def test_experiments_that_cannot_be_are_told_in_a_line(options, words, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["experiment", *options]) != 0
    *_, line = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
