"""``multiverse eval`` and ``multiverse compare`` as users run them: killed, resumed, misused, compared."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_evaluation_answers import GPQA_ROW, NEEDS_EVAL
from transformers import Qwen2Config, Qwen2ForCausalLM

from multiverse_hf import embedded_model
from multiverse_hf.cli import run
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import RULES_VERSION, AnswerKind, Rule, judge
from multiverse_hf.evaluation.report import markdown_table, report_page, to_html
from multiverse_hf.evaluation.results import read_results
from multiverse_hf.evaluation.samples import Sample, SampleStore, read_samples
from multiverse_hf.evaluation.task_files import find_task
from multiverse_hf.evaluation.tasks import load_problems
from multiverse_hf.judging.verifier import Verifier

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "multiverse_hf.cli", "eval"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
# float64: answers of other batches are then the same to the letter
SMALL = ("--limit", "6", "--max-new-tokens", "110", "--dtype", "float64", "--seed", "3")

pytestmark = [pytest.mark.usefixtures("unquiet"), NEEDS_EVAL]


def answers(folder: Path) -> dict[tuple[str, str, int], str]:
    return {sample.key: sample.document for sample in read_samples(folder / "samples")}


def error_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) != 0
    *_, line = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two samples a problem that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(["eval", *SMALL, "--n", "2", "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_results_say_what_was_asked_how_and_what_came_of_it(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["schema"] == 1
    assert (results["mode"], results["n"], results["seed"]) == ("parallel", 2, 3)
    assert results["prompts"]["template"] == "{problem} Think step by step and in parallel before answering."
    asked = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0}
    assert results["sampling"] == asked | {"max_new_tokens": 110, "structure": "guided"}
    assert results["model"]["name"] == "multiverse-tiny"
    assert {"versions", "hardware", "commit", "command", "seconds", "confidence"} <= results.keys()
    task = results["tasks"]["mv:chains"]
    assert (task["problems"], task["samples"], task["seen_in_training"]) == (6, 12, 0)
    assert set(task["groups"]) == {"single", "flat", "nested"}
    samples = read_samples(whole / "samples")
    expected = {
        "pass@1": sum(sample.correct for sample in samples) / 12,
        "avg@2": sum(sample.correct for sample in samples) / 12,
        "parallelism": sum(sample.parallelism for sample in samples) / 12,
        "length": sum(sample.length for sample in samples) / 12,
        "tokens": sum(sample.num_tokens for sample in samples) / 12,
        "steps": sum(sample.num_steps for sample in samples) / 12,
        "well_formed": sum(sample.well_formed for sample in samples) / 12,
        "parallel_rate": sum(sample.num_forks > 0 for sample in samples) / 12,
        "finished": sum(sample.finish_reason == "stop" for sample in samples) / 12,
    }
    for name, value in expected.items():
        assert task["metrics"][name]["value"] == pytest.approx(value, abs=1e-6), name
        assert task["metrics"][name]["low"] <= value + 1e-6
        assert task["metrics"][name]["high"] >= value - 1e-6
    assert task["metrics"]["pass@2"]["value"] >= task["metrics"]["pass@1"]["value"]
    assert sum(task["rules"].values()) == sum(task["finish_reasons"].values()) == 12


@pytest.mark.slow
def test_the_report_begins_with_prompt_sampling_model_versions_hardware_and_commit(whole: Path) -> None:
    page = (whole / "report.md").read_text()
    heads = [line.partition(":")[0] for line in page.splitlines()[2:8]]
    assert heads == ["- Prompt", "- Sampling", "- Model", "- Versions", "- Hardware", "- Commit"]
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (whole / "report.svg").read_text()
    html = (whole / "report.html").read_text()
    assert "<table>" in html
    assert "report.svg" in html


@pytest.mark.slow
def test_the_report_shows_problem_answer_and_verdict_of_what_was_wrong(whole: Path) -> None:
    wrong = [sample for sample in read_samples(whole / "samples") if not sample.correct]
    page, html = ((whole / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert 0 < len(wrong) < 12
    assert f"mv:chains: {len(wrong)} of 12 answers." in page
    for sample in wrong:
        title = f"### {sample.id} ({sample.group}), answer {sample.sample + 1}"
        entry = page.split(title)[1].split("\n### ")[0]
        assert sample.prompt.removesuffix(" Think step by step and in parallel before answering.") in entry
        said = "none" if sample.answer is None else f"`{sample.answer}`"
        assert f"- Right answer: `{sample.gold}`\n- Answer: {said}\n- Verdict: {sample.rule}, ended by" in entry
        assert sample.document[-200:].strip() in entry
        assert f"{sample.id} ({sample.group})" in html
    assert not any(
        sample.id in page for sample in read_samples(whole / "samples") if sample.id not in {s.id for s in wrong}
    )


@pytest.mark.slow
def test_no_text_of_an_answer_breaks_out_of_the_report(whole: Path) -> None:
    text = "```\n# A heading\n<script>``` `x`"
    sample = replace(read_samples(whole / "samples")[0], correct=False, document=text, answer=text, prompt=text)
    page = report_page(read_results(whole), [sample])
    html = to_html(page, "title")
    assert "<h1>A heading" not in html
    assert "<script>" not in html
    assert html.count("``` `x`") == 3
    assert to_html("\n".join(markdown_table(["a|b"], [["c|d"]])), "title").count("<td>c|d</td>") == 1


@pytest.mark.slow
def test_a_narrow_terminal_cuts_nothing_off_a_table(whole: Path) -> None:
    pty = pytest.importorskip("pty", reason="needs a terminal")
    ours, theirs = pty.openpty()
    command = [*COMMAND, *SMALL, "--n", "2", "--output", str(whole)]
    environment = ENVIRONMENT | {"COLUMNS": "60", "TERM": "xterm"}
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal with an error
        while data := os.read(ours, 4096):
            shown += data
    assert process.wait() == 0
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).splitlines()]
    table = lines[1 : next(number for number, line in enumerate(lines) if line.endswith("report.html"))]
    assert max(map(len, table)) <= 60
    assert "…" not in "".join(table)
    metrics = read_results(whole)["tasks"]["mv:chains"]["metrics"]
    for name in ("pass@1", "well_formed"):
        assert all(f"{100 * metrics[name][end]:.1f}" in "".join(table) for end in ("value", "low", "high"))


@pytest.mark.slow
def test_samples_are_parquet_with_prompt_document_answer_verdict_stats_and_seed(whole: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(whole / "samples/00000.parquet")
    columns = {
        "task",
        "id",
        "sample",
        "seed",
        "prompt",
        "document",
        "gold",
        "answer",
        "correct",
        "rule",
        "well_formed",
    }
    assert columns | {"num_tokens", "length", "parallelism", "num_steps", "finish_reason"} <= set(table.column_names)
    rows = table.to_pylist()
    assert len(rows) == 12
    assert len({row["seed"] for row in rows}) == 2
    assert all(row["prompt"].endswith("in parallel before answering.") for row in rows)


@pytest.mark.slow
def test_answers_depend_neither_on_the_batch_nor_on_a_kill_and_none_is_repeated(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [*COMMAND, *SMALL, "--n", "2", "--output", str(folder)]
    process = subprocess.Popen([*command, "--max-num-seqs", "1"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    journal = folder / "samples/unfinished.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {sample.key: sample for sample in read_samples(folder / "samples")}
    assert 3 <= len(before) < 12
    with journal.open("ab") as file:
        file.write(b'{"task": "mv:chains", "id": "torn')  # as a kill leaves it
    assert run([*command[3:], "--max-num-seqs", "7"]) == 0
    after = {sample.key: sample for sample in read_samples(folder / "samples")}
    assert {key: after[key] for key in before} == before  # with their seconds: they were not written again
    assert answers(folder) == answers(whole)
    assert read_results(folder)["samples_before"] == len(before)
    ours, theirs = (read_results(each)["tasks"]["mv:chains"]["metrics"] for each in (folder, whole))
    assert ours == theirs


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    before = (folder / "results.json").read_text()
    shards = {path.name: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    assert run(["eval", *SMALL, "--n", "2", "--output", str(folder)]) == 0
    assert json.loads((folder / "results.json").read_text()) | {"command": None} == json.loads(before) | {
        "command": None
    }
    now = {path.name: path.stat().st_mtime_ns for path in (folder / "samples").glob("*.parquet")}
    assert now == {name: shards[name] for name in now}


@pytest.mark.slow
def test_a_greater_limit_extends_a_run_and_repeats_nothing(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "extended"
    options = ["--max-new-tokens", "110", "--dtype", "float64", "--seed", "3", "--n", "2", "--output", str(folder)]
    assert run(["eval", "--limit", "2", *options]) == 0
    before = {sample.key: sample for sample in read_samples(folder / "samples")}
    assert run(["eval", "--limit", "6", *options]) == 0
    after = {sample.key: sample for sample in read_samples(folder / "samples")}
    assert len(before) == 4
    assert {key: after[key] for key in before} == before  # with their seconds: they were not written again
    assert answers(folder) == answers(whole)
    results, expected = (read_results(each) for each in (folder, whole))
    assert results["samples_before"] == 4
    assert results["tasks"] == expected["tasks"]
    assert (folder / "run.json").read_text() == (whole / "run.json").read_text()
    assert "begun with --limit 6, now it is --limit 5; it continues with as many" in error_of(
        capfd, "eval", "--limit", "5", *options
    )
    begun = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(begun | {"problems": {"mv:chains": "others"}}))
    assert "begun with other problems" in error_of(capfd, "eval", "--limit", "7", *options)


# A user's own rows


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_a_file_of_ones_own_is_asked_judged_resumed_extended_and_compared_like_any_task(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"problem": "A=19-7+12; B=8+15-3; total?", "answer": 44, "group": "flat"},
        {"prompt": "A=5+6; B=7+8; total? Think step by step and in parallel before answering.", "answer": "26"},
        {"problem": "A=2+3; total?", "answer": 6.0},  # a wrong one
    ]
    name = "my own sums, which have a name that is longer than a terminal is wide as a rule " + "x" * 40 + ".jsonl"
    file = write_rows(tmp_path / name, *rows)
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--task", str(file), "--temperature", "0", "--max-new-tokens", "512"]
    assert run(["eval", *options, "--limit", "2", "--output", str(first)]) == 0
    assert name in capfd.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    file = file.rename(tmp_path / "elsewhere" / name)  # what counts is what it holds
    options[1] = str(file)
    assert run(["eval", *options, "--output", str(first)]) == 0
    assert run(["eval", *options, "--mode", "autoregressive", "--output", str(second)]) == 0
    results = read_results(first)
    task = results["tasks"][name]
    assert (task["source"], task["rule"], task["dataset"], task["problems"]) == (name, "math", None, 3)
    assert results["samples_before"] == 2
    assert task["groups"]["flat"]["problems"] == 1
    for folder, end in ((first, "step and in parallel before"), (second, "by step before")):
        samples = {sample.gold: sample for sample in read_samples(folder / "samples")}
        assert [samples[gold].correct for gold in ("44", "26", "6")] == [True, True, False]
        assert all(sample.prompt.endswith(f"{end} answering.") for sample in samples.values())
        assert samples["26"].prompt.count("before answering.") == 1
    assert "- Right answer: `6`\n- Answer: `5`\n- Verdict: different" in (first / "report.md").read_text()
    assert run(["compare", str(second), str(first), "--output", str(tmp_path / "out")]) == 0
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())["tasks"][name]
    assert (comparison["problems"], comparison["differences"]["pass@1"]["value"]) == (3, 0)
    message = error_of(capfd, "eval", *options, "--rule", "exact", "--output", str(first))
    assert "begun with --rule math, now it is --rule exact" in message
    write_rows(file, rows[0], rows[2])
    assert "begun with other problems" in error_of(capfd, "eval", *options, "--output", str(first))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"problem": "x", "answer": "1"}\n\n{"problem": "y"', ["my.jsonl, line 3", "no JSON"]),
        ('[1, "x"]', ["my.jsonl, line 1", "an object with problem and answer", '[1, "x"]']),
        ('{"question": "x", "answer": "1"}', ["line 1", "problem or prompt", "it has question, answer"]),
        ('\n{"problem": "x", "answer": null}', ["line 2", "a row needs answer", "it has problem"]),
        ('{"problem": "x", "answer": ["1"]}', ["line 1", "answer is text or a number", '["1"]']),
        ('{"problem": "x", "answer": true}', ["line 1", "answer is text or a number", "true"]),
        ('{"problem": "x", "answer": 1e400}', ["line 1", "answer is text or a number", "Infinity"]),
        ('{"problem": "x", "answer": NaN}', ["line 1", "answer is text or a number", "NaN"]),
        ('{"problem": " ", "answer": "1"}', ["line 1", "problem is empty"]),
        ('{"problem": "a\\ud800", "answer": "1"}', ["line 1", "half a character", "\\ud800"]),
        (
            '{"problem": "x  y", "answer": "1"}\n{"prompt": "x y", "answer": "1"}',
            ["line 2 asks what line 1 does", "'x y'"],
        ),
        ("", ["my.jsonl holds no rows"]),
    ],
)
def test_rows_of_ones_own_that_cannot_be_asked_are_told_with_file_line_and_value(
    content: str, words: list[str], tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(content)
    line = error_of(capfd, "eval", "--task", "my.jsonl")
    assert all(word in line for word in words), line
    assert not Path("runs/eval/run.json").exists()


def test_what_is_wrong_with_a_file_of_ones_own_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{}")
    script = (
        "import sys; from multiverse_hf import cli; code = cli.run(['eval', '--task', 'my.jsonl']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, "my.jsonl, line 1: " in done.stderr) == ("2 False\n", True), done.stderr


def test_a_log_says_now_and_then_how_far_a_run_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from multiverse_hf.evaluation import commands
    from multiverse_hf.evaluation.run import RunProgress

    clock = iter([0.0, 4.0, 6.0, 7.0, 37.0])  # the first one begins
    monkeypatch.setattr(commands, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with commands.progress_bar("model") as (advance, _):
        for done in range(4):
            advance(RunProgress(done, 4, done))
    assert capsys.readouterr().err == "1 of 4 answers after 6 s\n3 of 4 answers after 37 s\n"


@pytest.mark.parametrize(
    ("rule", "answer", "text", "correct"),
    [
        (AnswerKind.EXACT, "a  B", "Answer: a B", True),
        (AnswerKind.EXACT, "aB", "Answer: ab", False),
        (AnswerKind.EXACT, "0.5", "Answer: 1/2", False),
        (AnswerKind.MATH, 0.5, "Answer: 1/2", True),
        (AnswerKind.LETTER, "b", "Answer: (B), a reagent", True),
        (AnswerKind.LETTER, "E", None, None),
        (AnswerKind.CHAINS, "007", "Answer: 7", True),
        (AnswerKind.CHAINS, "7.5", None, None),
    ],
)
def test_the_rule_of_ones_own_rows_judges_them(rule, answer, text, correct, tmp_path: Path) -> None:
    task = find_task(str(write_rows(tmp_path / "my.jsonl", {"problem": "x", "answer": answer})), rule)
    if text is None:
        with pytest.raises(CommandError, match=rf"my\.jsonl, line 1: for --rule {rule} .* got '{answer}'"):
            load_problems(task)
        return
    (problem,) = load_problems(task).problems
    with Verifier() as verifier:
        assert judge(rule, problem.gold, text, verifier).correct is correct


@pytest.mark.slow
def test_a_store_keeps_every_sample_wherever_it_is_cut_off(whole: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    samples = read_samples(whole / "samples")
    folder = tmp_path / "samples"
    with SampleStore(folder, shard_rows=4) as store:
        for sample in samples[:10]:
            store.add(sample)
        with pytest.raises(CommandError, match="another run is at work"):
            lock_in_other_process(folder)
        assert len(list(folder.glob("*.parquet"))) == 2
        # a kill between the shard's rename and the journal's end: lines that are in a shard already
        journal = (folder / "unfinished.jsonl").read_bytes()
    (folder / "00002.parquet").rename(folder / "00009.parquet")
    (folder / "unfinished.jsonl").write_bytes(journal)
    (folder / ".00010.parquet.writing").write_bytes(b"PAR1 torn")
    assert sorted(s.key for s in read_samples(folder)) == sorted(s.key for s in samples[:10])
    with SampleStore(folder, shard_rows=4) as store:
        for sample in samples[10:]:
            store.add(sample)
    rows = [row for shard in folder.glob("[0-9]*.parquet") for row in pyarrow.parquet.read_table(shard).to_pylist()]
    assert sorted((row["id"], row["sample"]) for row in rows) == sorted((s.id, s.sample) for s in samples)
    (folder / "00000.parquet").write_bytes((folder / "00000.parquet").read_bytes()[:-20])
    with pytest.raises(CommandError, match=r"00000\.parquet is damaged .* delete it and run again"):
        read_samples(folder)


def lock_in_other_process(folder: Path) -> None:
    """Open a store in another process: locks do not keep a process from itself."""
    code = "import sys; from pathlib import Path; from multiverse_hf.evaluation.samples import SampleStore"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; SampleStore(Path(sys.argv[1]))", str(folder)],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise CommandError(done.stderr.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_with_what_differs(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        return error_of(capfd, "eval", *SMALL, "--n", "2", "--output", str(whole), *options)

    assert "begun with --temperature 0.6, now it is --temperature 0.5" in refused("--temperature", "0.5")
    assert "begun with --mode parallel, now it is --mode zero" in refused("--mode", "zero")
    assert "another model (multiverse-tiny)" in refused("--model", "multiverse-tiny-sequential")
    assert "begun with --n 2, now it is --n 4" in refused("--n", "4")
    shutil.copytree(whole, tmp_path / "older")
    begun = json.loads((whole / "run.json").read_text())
    assert begun.pop("rules_version") == RULES_VERSION
    (tmp_path / "older/run.json").write_text(json.dumps(begun))
    message = error_of(capfd, "eval", *SMALL, "--n", "2", "--output", str(tmp_path / "older"))
    assert f"begun with version 1 of the rules for answers, this is version {RULES_VERSION}" in message
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/00000.parquet").touch()
    assert "holds samples, but no run.json" in error_of(capfd, "eval", *SMALL, "--output", str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "mv:math500"], ["mv:math500", "did you mean mv:math_500?"]),
        (["--task", "mv:aime25", "--data-dir", "nowhere"], ["no folder nowhere"]),
        (["--temperature", "0", "--n", "4"], ["4 greedy answers", "--temperature"]),
        (["--top-p", "1.5"], ["--top-p", "1.5"]),
        (["--temperature", "1e-9"], ["--temperature 0"]),
        (["--mode", "serial"], ["serial", "autoregressive"]),
        (["--base", "random"], ["--base", "--suite paper"]),
        (["--task", "nothing.jsonl"], ["no file nothing.jsonl", "mv:aime24"]),
        (["--rule", "exact"], ["--rule exact", "--task FILE.jsonl"]),
        (["--task", "mv:chains", "--rule", "regex"], ["regex", "exact"]),
        (["--model", "./nothing"], ["no model folder ./nothing"]),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_line(
    options: list[str], words: list[str], tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_of(capfd, "eval", *options)
    assert all(word in line for word in words), line


def test_a_plain_model_is_evaluated_one_token_after_the_other_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = save_plain_model(tmp_path / "plain")
    options = ["--model", str(plain), "--limit", "3", "--max-new-tokens", "20", "--output", str(tmp_path / "run")]
    assert "--mode autoregressive" in error_of(capfd, "eval", *options)
    assert run(["eval", *options, "--mode", "autoregressive", "--temperature", "0"]) == 0
    results = read_results(tmp_path / "run")
    assert results["model"]["architecture"] == "Qwen2ForCausalLM"
    assert results["tasks"]["mv:chains"]["metrics"]["parallelism"]["value"] == 1
    assert results["sampling"]["structure"] == "off"
    # the same ids as transformers' own generate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    for sample in read_samples(tmp_path / "run/samples"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.prompt}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        hidden = set(tokenizer.all_special_ids)
        assert sample.document == tokenizer.decode([i for i in output[0, ids.shape[1] :].tolist() if i not in hidden])


def save_plain_model(folder: Path, max_positions: int = 1024) -> Path:
    """Save a random qwen2 with the embedded tokenizer's pieces, but without its tags."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tags = {token["content"] for token in state["added_tokens"] if not token["special"]}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    state["model"]["vocab"] = {
        (f"no{token[1:-1]}" if token in tags else token): number for token, number in state["model"]["vocab"].items()
    }
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=max_positions, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that greedy choices have no ties
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_problem_too_long_for_the_context_is_wrong_and_stops_nothing(tmp_path: Path) -> None:
    rows = [{"problem": "1 + 1", "answer": "2"}, {"problem": "1 + 1" * 3000, "answer": "3000"}]
    (tmp_path / "aime25.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data-dir", str(tmp_path), "--max-new-tokens", "30", "--output", str(tmp_path / "run")]
    assert run(["eval", "--task", "mv:aime25", *options]) == 0
    short, long = sorted(read_samples(tmp_path / "run/samples"), key=lambda sample: len(sample.prompt))
    assert short.error is None
    assert (long.correct, long.finish_reason) == (False, "refused")
    assert "shorten the prompt" in long.error


def test_thinking_that_the_chat_template_opens_is_thinking(tmp_path: Path) -> None:
    model = save_plain_model(tmp_path / "plain")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>\n{% endif %}")
    (tmp_path / "aime25.jsonl").write_text(json.dumps({"problem": "1 + 1", "answer": "2"}))
    options = ["--model", str(model), "--mode", "autoregressive", "--max-new-tokens", "8", "--data-dir", str(tmp_path)]
    assert run(["eval", "--task", "mv:aime25", *options, "--output", str(tmp_path / "run")]) == 0
    (sample,) = read_samples(tmp_path / "run/samples")
    assert sample.document.startswith("<think>\n")
    with Verifier() as verifier:  # what it wrote is cut off in its thinking, whatever it holds
        verdict = judge(AnswerKind.MATH, "2", sample.document + "\\boxed{2}", verifier)
    assert verdict.rule is Rule.NO_ANSWER


def test_the_report_of_a_gated_task_holds_none_of_its_questions(tmp_path: Path) -> None:
    (tmp_path / "gpqa_diamond.jsonl").write_text(json.dumps(GPQA_ROW))
    options = ["--data-dir", str(tmp_path), "--max-new-tokens", "30", "--output", str(tmp_path / "run")]
    assert run(["eval", "--task", "mv:gpqa_diamond", *options]) == 0
    (sample,) = read_samples(tmp_path / "run/samples")
    assert "boson" in sample.prompt
    for name in ("report.md", "report.html", "report.svg", "results.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "boson" not in text, name
        assert "plinkton" not in text, name
    assert "must not be published" in (tmp_path / "run/report.md").read_text()


# Comparison


def changed_run(whole: Path, folder: Path, change) -> Path:
    """Copy a run with its samples changed."""
    samples = read_samples(whole / "samples")
    (folder / "samples").mkdir(parents=True)
    with SampleStore(folder / "samples") as store:
        for sample in change(samples):
            store.add(sample)
    shutil.copy(whole / "results.json", folder)
    return folder


@pytest.mark.slow
def test_a_comparison_pairs_problems_and_lists_who_changed_sides(whole: Path, tmp_path: Path) -> None:
    samples = sorted(read_samples(whole / "samples"), key=lambda sample: sample.key)
    hurt, helped = (next(s.id for s in samples if s.correct is correct) for correct in (True, False))

    def change(samples: list[Sample]) -> list[Sample]:
        return [replace(s, correct=s.id == helped) if s.id in (hurt, helped) else s for s in samples]

    other = changed_run(whole, tmp_path / "other", change)
    assert run(["compare", str(whole), str(other), "--output", str(tmp_path / "out")]) == 0
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    task = comparison["tasks"]["mv:chains"]
    assert (task["problems"], task["only_a"], task["only_b"]) == (6, 0, 0)
    assert [flip["id"] for flip in task["helped"]] == [helped]
    assert [flip["id"] for flip in task["hurt"]] == [hurt]
    shares = {id: [s.correct for s in samples if s.id == id] for id in (hurt, helped)}
    gained = 1 - sum(shares[helped]) / 2 - sum(shares[hurt]) / 2
    assert task["differences"]["pass@1"]["value"] == pytest.approx(gained / 6)
    assert task["differences"]["parallelism"] == {"value": 0, "low": 0, "high": 0}
    assert sum(of["problems"] for of in task["by_forking"].values()) == 6
    page = (tmp_path / "out/comparison.md").read_text()
    assert hurt in page
    assert helped in page
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_answers_that_other_rules_judged_are_judged_again(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = changed_run(
        whole, tmp_path / "other", lambda samples: [replace(s, correct=not s.correct, rule="old") for s in samples]
    )
    results = json.loads((whole / "results.json").read_text())
    assert results.pop("rules_version") == RULES_VERSION
    (other / "results.json").write_text(json.dumps(results))
    assert run(["compare", str(whole), str(other), "--output", str(tmp_path / "out")]) == 0
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert comparison["judged_again"] == ["b"]
    assert comparison["tasks"]["mv:chains"]["helped"] == comparison["tasks"]["mv:chains"]["hurt"] == []
    assert f"judged again by version {RULES_VERSION} of the rules for answers: B" in capfd.readouterr().err
    assert "- B was judged again" in (tmp_path / "out/comparison.md").read_text()


@pytest.mark.slow
def test_problems_that_only_one_run_has_are_left_out_and_counted(whole: Path, tmp_path: Path) -> None:
    some = {sample.id for sample in read_samples(whole / "samples")[:3]}
    part = changed_run(whole, tmp_path / "part", lambda samples: [s for s in samples if s.id in some])
    assert run(["compare", str(part), str(whole), "--output", str(tmp_path / "out")]) == 0
    task = json.loads((tmp_path / "out/comparison.json").read_text())["tasks"]["mv:chains"]
    assert (task["problems"], task["only_a"], task["only_b"]) == (len(some), 0, 6 - len(some))


@pytest.mark.slow
def test_what_cannot_be_compared_is_told_in_a_line(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "holds no results.json" in error_of(capfd, "compare", str(whole), str(tmp_path))
    nothing = changed_run(whole, tmp_path / "nothing", lambda samples: [])
    assert "no problem in common" in error_of(capfd, "compare", str(whole), str(nothing))
    (nothing / "results.json").write_text('{"schema": 99, "tasks": {}}')
    assert "schema 99" in error_of(capfd, "compare", str(whole), str(nothing))


@pytest.mark.slow
def test_refused_prompts_are_told_of_and_are_not_well_formed(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    options = ["--limit", "2", "--max-cache-tokens", "10", "--temperature", "0", "--output", str(tmp_path / "run")]
    assert run(["eval", "--task", "mv:chains", *options]) == 0
    assert "warning: 2 of 2 prompts were refused and count as wrong answers of no length" in capfd.readouterr().err
    metrics = json.loads((tmp_path / "run/results.json").read_text())["tasks"]["mv:chains"]["metrics"]
    assert (metrics["pass@1"]["value"], metrics["well_formed"]["value"]) == (0.0, 0.0)


def test_the_paper_suite_takes_no_mode_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run(["eval", "--suite", "paper", "--mode", "zero", "--output", str(tmp_path)]) == 2
    assert "leave out --mode zero" in capfd.readouterr().err
