"""The benchmarks of training, as a user runs them: what they compare, print, store and refuse."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_benchmarks import _scripts_find_their_siblings, is_picture, load, run  # noqa: F401 - a fixture

from multiverse_hf.modeling.layout import build_layout

pytestmark = pytest.mark.slow

TRAIN, MASK = "train_throughput", "mask_memory"


def call(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    load(script).main()


def test_rows_with_paths_train_beside_the_same_rows_as_plain_text(tmp_path: Path) -> None:
    sides = ["causal", "multiverse_sdpa", "sdpa"]
    result = run(TRAIN, "--lengths", "700", "600", "--layers", "1", "--threads", "1", cwd=tmp_path)
    assert [row["tokens"] for row in result["results"]] == [600, 700]
    for row in result["results"]:
        assert list(row["sides"]) == sides
        causal, ours, dense = (row["sides"][name] for name in sides)
        assert ours["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        assert ours["loss"] != causal["loss"]
        for side in (ours, dense):
            ratio = side["speed_to_causal"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
            assert side["peak_to_causal"] == pytest.approx(side["peak_bytes"] / causal["peak_bytes"], abs=1e-4)


def test_a_group_trains_as_a_tree_beside_a_row_for_each_completion(tmp_path: Path) -> None:
    options = ["--prompts", "60", "300", "--completion", "200", "--group", "3", "--path-tokens", "10", "30"]
    result = run("grpo_tree", *options, "--layers", "1", "--threads", "1", cwd=tmp_path)
    for row, length in zip(result["results"], (60, 300), strict=True):
        separate, tree = row["sides"]["separate"], row["sides"]["tree"]
        assert separate["tokens"] == 3 * (length + 200)
        # the prompt once, its last token in each row, and three completions
        assert tree["tokens"] == length + 2 + 3 * 200
        assert row["memory_ratio"] == pytest.approx(separate["peak_bytes"] / tree["peak_bytes"], abs=1e-4)
        assert 0 < row["speed_ratio"]["min"] <= row["speed_ratio"]["median"] <= row["speed_ratio"]["max"]


def test_trees_with_other_log_probabilities_are_not_the_same_work() -> None:
    side = load("grpo_tree").Side
    zeros = torch.zeros(2, 3)
    sides = {"separate": side(None, 6, logps=zeros, loss=1.0, norm=1.0)}
    for wrong in ({"logps": zeros + 0.01}, {"loss": 1.01}, {"norm": 0.99}, {"logps": zeros.log()}):
        sides["tree"] = replace(sides["separate"], **wrong)
        with pytest.raises(RuntimeError, match="not the same work"):
            load("grpo_tree").check(sides, 1e-3)


def test_masks_are_measured_against_the_length_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    options = ["--lengths", "2048", "1024", "4096", "--dense-up-to", "1024", "--repeats", "1", "--threads", "1"]
    call(monkeypatch, MASK, *options, "--plot", "a.png", "--output", "result.json")
    output = capsys.readouterr().out.splitlines()
    result = json.loads(output[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert is_picture(tmp_path / "a.png")
    assert [row["tokens"] for row in result["results"]] == [1024, 2048, 4096]
    for row in result["results"]:
        assert sum(row["ours"]["parts"].values()) == row["ours"]["bytes"] < row["ours"]["peak_bytes"]
        assert row["published"]["bytes"] == 8 * row["tokens"] ** 2
        assert row["published"]["built"] == (row["tokens"] == 1024) == ("peak_bytes" in row["published"])
    assert result["results"][0]["published"]["peak_bytes"] >= result["results"][0]["published"]["bytes"]
    # positions, segments and real tokens are 24 bytes a token; mask_mod keeps the last as bool besides
    assert result["results"][0]["ours"]["bytes"] > 25 * 1024
    assert result["growth"]["ours_bytes"] < 1.5 < result["growth"]["published_bytes"] == 2
    assert result["target"] is None
    assert sum("computed, not built" in line for line in output) == 2

    call(monkeypatch, MASK, "--stored", "result.json", "--plot", "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert set(capsys.readouterr().out.splitlines()) < set(output)


@pytest.mark.parametrize("length", [500, 1024, 5000])
def test_documents_have_the_length_asked_for_and_whole_blocks(length: int) -> None:
    workload = load("workload")
    tags = workload.make_tags(newlines=False)
    ids = workload.make_document(tags, length, 512, (20, 60), seed=3)
    assert len(ids) == length
    assert ids != workload.make_document(tags, length, 512, (20, 60), seed=4)
    visible = build_layout(ids, tags).visible
    assert len(visible) >= 4
    assert visible[-1].all(), "the last block is closed"
    assert ids.count(tags.open("parallel")) == ids.count(tags.close("parallel"))
    with pytest.raises(ValueError, match="shorter paths"):
        workload.make_document(tags, 60, 512)


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (TRAIN, ["--lengths", "0"], ["--lengths", "at least 1"]),
        (TRAIN, ["--lengths", "60"], ["60 tokens", "shorter paths"]),
        (TRAIN, ["--geometry", "tiny", "--lengths", "8192"], ["8192", "tiny has 4096"]),
        (TRAIN, ["--attn", "flex_attention"], ["flex_attention", "GPU", "sdpa"]),
        (TRAIN, ["--layers", "99"], ["--layers 99", "cpu-0.24b has 12"]),
        (TRAIN, ["--dtype", "float16"], ["--dtype", "float16"]),
        (MASK, ["--lengths", "none"], ["--lengths", "none"]),
        (MASK, ["--lengths", "50"], ["50 tokens", "shorter paths"]),
        (MASK, ["--path-tokens", "9", "3"], ["--path-tokens", "[9, 3]"]),
        (MASK, ["--plot", "a.bmp"], ["--plot", ".png"]),
        (MASK, ["--stored", "none.json"], ["none.json", "no result"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else None,
)
def test_bad_input_is_refused_in_one_line_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    options: list[str],
    words: list[str],
) -> None:
    device = ["--device", "cpu"] if script == TRAIN else []
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, script, *device, *options)
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, line
    assert "error: " in line
    assert all(word in line for word in words), line
