"""The benchmarks that take a geometry, as a user runs them: on a tiny model, what they print, store and refuse."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LATENCY, BATCH, LONG, STEP = "latency_vs_parallelism", "batch_scaling", "long_branches", "decode_step"


@pytest.fixture(scope="module", autouse=True)
def _scripts_find_their_siblings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(script: str, *options: str, cwd: Path) -> dict:
    """Run a script on the tiny geometry and give its result, which is its last line and its file alike."""
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), "--geometry", "tiny", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, "--repeats", "2", "--output", "result.json", *options],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this will take about" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((cwd / "result.json").read_text())
    assert result["benchmark"] == script
    assert result["geometry"] == "tiny"
    assert {"device", "versions", "commit", "command", "parameters", "dtype"} <= result.keys()
    return result


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_how_long_passes_take_is_known_from_two_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    report, clock = load("report"), types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(report, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))

    def model(input_ids: torch.Tensor, use_cache: bool) -> types.SimpleNamespace:
        clock.now += 0.9 + 0.1 * input_ids.numel()
        return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))

    model.device = torch.device("cpu")
    # 10 passes of 100 tokens in all, and one of 50
    assert report.seconds_of_passes(model, [(10, 100), (1, 50)]) == pytest.approx(9 + 10 + 0.9 + 5)


def test_latency_is_measured_fitted_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(LATENCY, "--lengths", "96", "64", "--paths", "4", "1", "2", "--plot", "a.png", cwd=tmp_path)
    assert is_picture(tmp_path / "a.png")
    assert [row["tokens"] for row in result["results"]] == [64, 96]
    for row in result["results"]:
        assert [point["paths"] for point in row["points"]] == [1, 2, 4]
        for point in row["points"]:
            assert point["parallelism"] == pytest.approx(row["tokens"] / point["length"], abs=1e-4)
            assert 0 < point["ms_per_token"]["min"] <= point["ms_per_token"]["median"] <= point["ms_per_token"]["max"]
        assert row["points"][0]["parallelism"] == 1
        for name in ("fit", "fit_of_least", "fit_on_tokens_per_pass"):
            curve = row[name]
            assert curve["share_percent"] == pytest.approx(
                100 * curve["b_ms"] / (curve["a_ms"] + curve["b_ms"]), rel=1e-2, abs=1e-2
            )


def test_batches_are_measured_on_both_sides_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(BATCH, "--batch", "3", "1", "--tokens", "64", "--paths", "4", "--plot", "a.png", cwd=tmp_path)
    assert is_picture(tmp_path / "a.png")
    assert [(row["batch"], row["tokens"]) for row in result["results"]] == [(1, 64), (3, 192)]
    for row in result["results"]:
        assert row["autoregressive"]["forward_passes"] == 63  # the prompt's own pass gives the first token
        assert row["parallel"]["forward_passes"] < 32
        assert row["parallel"]["parallelism"] > 2
        times = row["autoregressive"]["seconds"]["median"], row["parallel"]["seconds"]["median"]
        assert row["speedup"] == pytest.approx(times[0] / times[1], rel=0.02)


def test_long_branches_are_measured_step_beside_step_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(LONG, "--paths", "2", "4", "--path-tokens", "80", "--plot", "a.png", cwd=tmp_path)
    assert is_picture(tmp_path / "a.png")
    assert [row["paths"] for row in result["results"]] == [2, 4]
    for row in result["results"]:
        assert 70 <= row["steps"] <= 80  # the starts of the paths are written without a pass of their own
        seen = [point["visible_tokens"] for point in row["curve"]]
        assert seen == sorted(seen)
        assert 256 < seen[0] < seen[-1] < row["visible_tokens"] <= 256 + 1 + 80
        times = row["lone_ms_of_last_steps"], row["paths_ms_of_last_steps"]
        assert all(0 < each["min"] <= each["median"] <= each["max"] for each in times)
        assert row["ratio_of_repeats"]["min"] <= row["ratio_of_last_steps"] <= row["ratio_of_repeats"]["max"]


def test_a_step_is_measured_beside_the_floor_and_transformers(tmp_path: Path) -> None:
    result = run(STEP, "--contexts", "200", "100", "--branches", "4", "1", "--steps", "12", cwd=tmp_path)
    assert result["copy_bytes_per_s"] > 0 < result["matrix_flop_per_s"]
    assert [row["context"] for row in result["results"]] == [100, 200]
    for row in result["results"]:
        # 2 layers, 2 key heads of 16, keys and values, 2 bytes each
        assert row["state_bytes"] == row["context"] * 2 * 2 * 16 * 2 * 2
        embeddings = 512 * 64
        assert row["weight_bytes"] == 2 * (result["parameters"] - embeddings)
        assert row["floor_ms"] == pytest.approx(
            1000 * (row["weight_bytes"] + row["state_bytes"]) / result["copy_bytes_per_s"], abs=1e-4
        )
        assert row["errors"] == {}
        peers = [row[side]["ms_per_step"]["median"] for side in ("generate", "static", "continuous")]
        assert [each["branches"] for each in row["engine"]] == [1, 4]
        for each in row["engine"]:
            median = each["ms_per_step"]["median"]
            assert each["steps"] == 2 * 12
            assert each["against_transformers"] == pytest.approx(each["branches"] * min(peers) / median, abs=0.01)
        assert row["engine"][0]["of_one_branch"] == 1


def test_the_engine_adds_nothing_to_the_rounding_of_low_precision(tmp_path: Path) -> None:
    result = run("replay_precision", "--paths", "3", "--path-tokens", "40", cwd=tmp_path)
    assert result["errors"] == {}
    assert result["engine"].keys() == {"packed", "simple"}
    assert result["document"].keys() == result["backward"].keys() == {"sdpa", "eager", "multiverse_sdpa"}
    assert 0 < result["chosen_tokens"] < result["tokens"]
    assert 0 < result["plain"] < 0.05
    for each in (*result["engine"].values(), *result["document"].values()):
        assert 0 < each < 1.5 * result["plain"]
    for each in result["backward"].values():
        assert 0 < each < 1.5 * result["plain_backward"]


def test_a_way_that_does_not_run_here_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load(STEP)
    time_transformers = script.time_transformers

    def breaks(side: str, *args: object) -> list[float]:
        if side == "static":
            raise RuntimeError("no compiler here")
        return time_transformers(side, *args)

    monkeypatch.setattr(script, "time_transformers", breaks)
    options = ["--geometry", "tiny", "--device", "cpu", "--contexts", "100", "--branches", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [f"{STEP}.py", *options, "--output", str(tmp_path / "result.json")])
    script.main()
    (row,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert row["errors"] == {"static": "RuntimeError: no compiler here"}
    assert row["generate"]["ms_per_step"]["median"] > 0 < row["engine"][0]["ms_per_step"]["median"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("autoregressive_cpu", ["--batch", "2", "--prompt", "64", "--tokens", "8", "--repeats", "1"]),
        ("decode_cpu", ["--paths", "2", "--prompt", "64", "--path-tokens", "16", "--repeats", "1"]),
        ("serving", ["--clients", "2", "--requests", "1", "--repeats", "1", "--transformers"]),
    ],
)
def test_benchmarks_of_a_whole_model_run(script: str, options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), *options, "--output", "result.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["benchmark"] == script
    assert len(result["results"]) == 1


@given(
    a=st.floats(0.01, 1e3),
    b=st.floats(-5, 1e2),
    parallelism=st.lists(st.floats(1, 64), min_size=2, max_size=8, unique_by=lambda x: round(x, 1)),
)
def test_the_curve_through_points_made_from_a_and_b_has_them(a: float, b: float, parallelism: list[float]) -> None:
    curve = load(LATENCY).fit(parallelism, [a / x + b for x in parallelism])
    size = a + abs(b)
    assert curve.a_ms == pytest.approx(a, abs=1e-6 * size)
    assert curve.b_ms == pytest.approx(b, abs=1e-6 * size)
    if abs(a + b) > 1e-3 * size:
        assert curve.share_percent == pytest.approx(100 * b / (a + b), rel=1e-2, abs=1e-2)


def test_a_curve_between_points_is_the_least_squares_one() -> None:
    # 1/x = 1, 1/2, 1/4, 1/4 has mean 1/2 and sum of squares 0.375 about it, y has mean 2, and their products sum up to
    # 0.5 * 1.1 + 0.25 * 0.6 + 0.25 * 0.5 = 0.825: a = 0.825 / 0.375 = 2.2, b = 2 - 2.2 / 2 = 0.9
    curve = load(LATENCY).fit([1, 2, 4, 4], [3.1, 2.0, 1.4, 1.5])
    assert (curve.a_ms, curve.b_ms) == pytest.approx((2.2, 0.9))
    assert 0.98 < curve.r_squared < 1
    assert curve.residual_percent == pytest.approx(100 * 0.05 / 1.4)  # 1.45 on the curve


def test_a_single_degree_of_parallelism_makes_no_curve() -> None:
    with pytest.raises(ValueError, match="at least two degrees"):
        load(LATENCY).fit([2.0, 2.0], [1.0, 1.1])


@given(num_tokens=st.integers(1, 5000), num_paths=st.integers(2, 64))
def test_an_answer_is_laid_out_to_the_token_or_refused(num_tokens: int, num_paths: int) -> None:
    workload = load("workload")
    tags = workload.make_tags(newlines=False)
    try:
        answer = workload.plan_answer(tags, num_tokens, num_paths)
    except ValueError as err:
        assert "fewer paths" in str(err)  # noqa: PT017 - either outcome is right
        return
    # <Conclusion>, a token, </Conclusion>, </Parallel>, and less than one token more for every path
    conclusion = num_tokens - 1 - num_paths * answer.path_tokens
    assert 4 <= conclusion < 4 + num_paths
    assert answer.length == 1 + answer.path_tokens + conclusion


def test_logarithmic_axes_have_plain_labels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = load("plots")
    figure, axes = plots.make_axes("x", "y")
    axes.set_yscale("log", base=10)
    axes.plot([1, 2, 4], [5.5, 6, 9])  # no power of ten in view
    plots.save(figure, tmp_path / "plot.png")
    for labels, shown in ((axes.get_xticklabels(which="both"), "2"), (axes.get_yticklabels(which="both"), "7")):
        texts = {label.get_text() for label in labels} - {""}
        assert shown in texts
        assert all(float(text) > 0 for text in texts)


def test_items_take_turns_and_each_repeat_begins_with_another() -> None:
    assert "".join(load("multiverse_hf.evaluation.experiments.timing").in_turns("abc", 4)) == "abcbcacababc"


@pytest.mark.parametrize(
    ("geometry", "parameters"),
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512), ("qwen2.5-32b", 32_763_876_352)],
)
def test_geometries_have_the_parameters_of_the_models_they_are_named_after(geometry: str, parameters: int) -> None:
    tags = load("workload").make_tags()
    assert load("geometry").count_parameters(geometry, tags) == parameters


def test_what_does_not_fit_the_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    geometry = load("geometry")
    asked = geometry.Load(batch=1, num_paths=16, prompt_tokens=256, answer_tokens=32_512)
    # 64 layers of 8 heads of 128 values of 2 bytes, keys and values: 256 KiB a token, so 8 GiB for 2**15 tokens
    monkeypatch.setattr(geometry, "free_memory", lambda device: 80 << 30)
    tokens = geometry.plan_cache("qwen2.5-32b", torch.device("cpu"), 32_763_876_352, asked)
    assert (1 << 15) < tokens < (2 << 15) + geometry.SPARE_TOKENS
    monkeypatch.setattr(geometry, "free_memory", lambda device: 64 << 30)
    with pytest.raises(ValueError, match=r"weights 61\.0, a cache of 32768 tokens 8\.0, .* 64\.0 GiB are free; take"):
        geometry.plan_cache("qwen2.5-32b", torch.device("cpu"), 32_763_876_352, asked)


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (LATENCY, ["--geometry", "gpt-5"], ["--geometry", "gpt-5", "qwen2.5-7b"]),
        (LATENCY, ["--device", "tpu"], ["--device", "cuda:N", "tpu"]),
        (LATENCY, ["--device", "cuda:99"], ["cuda:99", "CUDA devices"]),
        (LATENCY, ["--lengths", "100", "--paths", "1", "16"], ["16 paths", "100 tokens", "at least", "fewer paths"]),
        (LATENCY, ["--lengths", "0"], ["--lengths", "at least 1"]),
        (LATENCY, ["--lengths", "4000", "--paths", "1", "2"], ["4256 positions", "tiny has 4096"]),
        (LATENCY, ["--paths", "4", "4"], ["--paths", "two different"]),
        (LATENCY, ["--prompt", "100"], ["prompt of 100", "--prompt"]),
        (LATENCY, ["--plot", "a.bmp"], ["--plot", ".png"]),
        (LATENCY, ["--plot", "a-file/a.png"], ["cannot write"]),
        (LATENCY, ["--repeats", "0"], ["--repeats", "at least 1"]),
        (BATCH, ["--geometry", "gpt-5"], ["--geometry", "gpt-5", "qwen2.5-7b"]),
        (BATCH, ["--paths", "1"], ["--paths", "at least 2"]),
        (BATCH, ["--batch", "none"], ["--batch", "none"]),
        (BATCH, ["--tokens", "20"], ["8 paths", "20 tokens", "fewer paths"]),
        (BATCH, ["--prompt", "8"], ["prompt of 8", "--prompt"]),
        (LONG, ["--paths", "8", "1"], ["--paths", "2 or more", "got 1"]),
        (LONG, ["--path-tokens", "2"], ["8 paths", "at least"]),
        (LONG, ["--path-tokens", "4096"], ["4357 positions", "tiny has 4096"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else None,
)
def test_bad_input_is_refused_in_one_line_before_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    monkeypatch.setattr(sys, "argv", [script, "--geometry", "tiny", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as stop:
        load(script).main()
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, line
    assert "error: " in line
    assert all(word in line for word in words), line
