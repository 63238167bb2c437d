"""Many prompts: rows in, rows out, in real processes that are killed; and what is refused before any work begins."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_hf.batch.rows import (
    Folder,
    append_rows,
    check_input,
    merge_answers,
    read_prompt_rows,
    summarize_answers,
)
from multiverse_hf.cli import run
from multiverse_hf.data.chains import Kind, sample_problem
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, Suffix
from multiverse_hf.errors import CommandError, install_line
from multiverse_hf.jobs import watch
from multiverse_hf.jobs.folders import write_row

pytest.importorskip("datatrove", reason="needs multiverse_hf[batch]")

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "multiverse_hf.cli", "generate"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
SHORT = ("--max-new-tokens", "150", "--threads", "1")


pytestmark = pytest.mark.usefixtures("unquiet")


def write_problems(path: Path, count: int, num_chains: int = 2) -> list[dict[str, Any]]:
    """Write an input of problems for the embedded model; rows have an id and a field of their own."""
    rng = random.Random(0)
    problems = [str(sample_problem(rng, Kind.FLAT, num_chains)) for _ in range(count)]
    rows = [{"id": f"row-{i}", "prompt": text, "level": i % 3} for i, text in enumerate(problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has torch imported; with one worker the task runs in it too."""
    code = run(["generate", *map(str, arguments)])
    captured = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, code, captured.out, without_progress(captured.err))


def without_progress(text: str) -> str:
    """Drop the lines by which a run of more than some seconds says how far it is."""
    return re.sub(r"(?m)^\d+ of \d+ rows after .*\n", "", text)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    command = [*COMMAND, *map(str, arguments)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipe, **options)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(process.args, process.returncode, out, without_progress(err))


def answers(folder: Path) -> list[dict[str, Any]]:
    """Read the answers without what depends on the time and on what was batched with what."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def wait_for_rows(process: subprocess.Popen[str], folder: Path, each: int) -> list[Path]:
    """Wait until both of two tasks have finished some rows; give their parts, which must be unfinished."""
    parts = [folder / "parts" / f"{task:05d}.unfinished.jsonl" for task in range(2)]
    deadline = time.monotonic() + 1800
    while not all(path.exists() and path.read_bytes().count(b"\n") >= each for path in parts):
        assert process.poll() is None, f"it ended before it was to be killed: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return parts


def done_by(folder: Path) -> int:
    """Count the rows that the last run of each task answered, by datatrove's own statistics."""
    stats = [json.loads(path.read_text()) for path in (folder / "logs" / "stats").glob("*.json")]
    counts = [step["stats"].get("rows", 0) for (step,) in stats]  # a number, or where they differ a summary
    return sum(count if isinstance(count, int) else count["total"] for count in counts)


# Killed and gone on with


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--temperature", "0.8"], pytest.param(["--greedy"], marks=pytest.mark.long)],
    ids=["sampled", "greedy"],
)
def test_a_killed_run_goes_on_without_repeating_a_row_and_agrees_with_one_that_was_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]
):
    source, folder, other = tmp_path / "in.jsonl", tmp_path / "killed", tmp_path / "whole"
    rows = write_problems(source, 28)
    options = ["--input", str(source), "--max-new-tokens", "120", *options]
    command = [*options, "--output", folder, "--tasks", 2, "--max-num-seqs", 2]
    process = start(*command)
    parts = wait_for_rows(process, folder, each=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = [path.read_bytes() for path in parts]
    whole = [data[: data.rfind(b"\n") + 1] for data in before]
    num_before = sum(data.count(b"\n") for data in whole)
    assert 4 <= num_before < len(rows)
    assert not (folder / "answers.jsonl").exists()
    with parts[0].open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"id": "row-0", "docum')

    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    assert f"{len(rows)} rows" in done.stdout
    assert f"{num_before} of them before" in done.stdout
    for task, data in enumerate(whole):
        part = (folder / "parts" / f"{task:05d}.jsonl").read_bytes()
        assert part.startswith(data)
        assert part.count(b"\n") == len(rows) / 2
    assert done_by(folder) == len(rows) - num_before
    assert [row["id"] for row in answers(folder)] == [row["id"] for row in rows]

    seed = json.loads((folder / "run.json").read_text())["seed"]  # drawn by the first run, kept by the second
    once = call(capfd, *options, "--output", other, "--tasks", 1, "--threads", 1, "--seed", seed)
    assert once.returncode == 0, once.stderr
    assert answers(other) == answers(folder)
    assert any(row["stats"]["num_forks"] for row in answers(other))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "worker", "parent"])
def test_however_a_run_is_ended_nothing_is_left_running_and_the_same_command_does_the_rest(tmp_path: Path, how: str):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 60)
    command = ["--input", source, "--output", folder, "--tasks", 2, "--max-num-seqs", 2, "--workers", 2]
    command += ["--max-new-tokens", 120]
    process = start(*command)
    parts = wait_for_rows(process, folder, each=1)
    family = {pid: parent for pid, parent in processes().items() if pid != process.pid}
    children = {pid for pid, parent in family.items() if parent == process.pid}
    workers = {pid for pid, parent in family.items() if parent in children}
    assert len(workers) >= 2
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "worker":
        os.kill(min(workers), signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    done = finish(process)
    assert done.returncode == {"worker": 1, "parent": -signal.SIGKILL}.get(how, 130)
    assert "Traceback" not in done.stderr
    if how != "parent":
        assert "the same command does the rest" in done.stderr
        assert done.stderr.count("\n") == 1
    deadline = time.monotonic() + 1800
    while (left := (children | workers) & processes().keys()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    sizes = [path.stat().st_size for path in parts]
    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    assert len(answers(folder)) == 60
    assert all(size > 0 for size in sizes)


def processes() -> dict[int, int]:
    """Give the processes that run, with their parents; those that only wait to be reaped left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (path / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(path.name)] = int(parent)
    return found


@pytest.mark.long
def test_a_full_disk_ends_the_run_in_a_line_and_loses_nothing(tmp_path: Path):
    import resource

    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 30)
    command = ["--input", source, "--output", folder, "--max-new-tokens", 120]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    done = finish(start(*command, preexec_fn=limit))
    assert done.returncode == 1
    assert re.fullmatch(r"error: task 0 failed: .*File too large.*\n", done.stderr)
    part = (folder / "parts" / "00000.unfinished.jsonl").read_bytes()
    assert len(part) == 20_000  # it was cut off in the middle of a line
    whole = part[: part.rfind(b"\n") + 1]
    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    assert (folder / "parts" / "00000.jsonl").read_bytes().startswith(whole)
    assert len(answers(folder)) == 30


# Rows in, rows out


@pytest.mark.slow
def test_tasks_do_not_change_answers_and_rows_have_the_fields_of_one_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    source = tmp_path / "in.jsonl"
    rows = write_problems(source, 3)
    chat = [{"role": "user", "content": rows[0]["prompt"]}]
    with source.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": chat, "note": "déjà vu"}) + "\n")
    for tasks in (1, 6):  # two of the six have nothing to do
        done = call(
            capfd, "--input", source, "--output", tmp_path / str(tasks), "--tasks", tasks, "--workers", 1, *SHORT
        )
        assert (done.returncode, done.stderr) == (0, "")
    one, six = answers(tmp_path / "1"), answers(tmp_path / "6")
    assert one == six
    assert [row["id"] for row in one] == ["row-0", "row-1", "row-2", 4]  # its line
    assert one[3]["messages"] == chat
    assert one[3]["note"] == "déjà vu"
    single = json.loads(call(capfd, rows[0]["prompt"], "--json", *SHORT).stdout)
    del single["family"], single["of_record"]  # of the whole run: its settings have them
    expected = {"id": "row-0"} | single | {"prompt": rows[0]["prompt"], "level": 0, "error": None}
    del expected["seconds"]
    assert one[0] == expected
    assert {name: one[3][name] for name in ("document", "stats")} == {n: single[n] for n in ("document", "stats")}


@pytest.mark.slow
def test_equal_prompts_get_draws_of_their_own_by_their_ids(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    prompt = "A=19-7+12; B=8+15-3; total?"
    first.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i in "abc"), encoding="utf-8")
    second.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i in "cxa"), encoding="utf-8")
    draws = ("--temperature", "3", "--suffix", "none", "--seed", "5", *SHORT)
    for source in (first, second):
        done = call(capfd, "--input", source, "--output", source.with_suffix(""), *draws)
        assert done.returncode == 0, done.stderr
    a, b, c = (row["document"] for row in answers(tmp_path / "first"))
    assert len({a, b, c}) == 3
    assert [row["document"] for row in answers(tmp_path / "second")][::2] == [c, a]


@pytest.mark.slow
def test_a_row_that_can_never_be_answered_says_so_and_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    long, medium = "A=1+2; " * 5000, "A=1+2; " * 60
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("A=1+2; total?", long, medium)))
    done = call(capfd, "--input", source, "--output", folder, "--max-cache-tokens", 200, "--json", *SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["rows"], report["errors"]) == (3, 2)
    fine, too_long, too_large = answers(folder)
    assert fine["error"] is None
    assert fine["document"]
    assert re.search(r"\d+ tokens, the model's context \d+; shorten", too_long["error"])
    assert "max_cache_tokens" in too_large["error"]
    assert too_long.keys() == fine.keys()
    assert too_long["document"] is too_long["stats"] is None
    again = call(capfd, "--input", source, "--output", folder, "--max-cache-tokens", 200, *SHORT)
    assert "already complete: 3 rows" in again.stdout
    assert "2 could not be answered; first row 2: the prompt has" in again.stderr


def test_a_model_that_can_answer_nothing_fails_the_run_not_its_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source, model = tmp_path / "in.jsonl", tmp_path / "model"
    write_problems(source, 2)
    shutil.copytree(ROOT / "src/multiverse_hf/assets/multiverse-tiny", model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"num_beams": 4}))
    done = call(capfd, "--input", source, "--output", tmp_path / "out", "--model", model, *SHORT)
    assert done.returncode == 1
    assert re.fullmatch(r"error: task 0 failed: .*beam.*\n", done.stderr)
    assert (tmp_path / "out" / "parts" / "00000.unfinished.jsonl").read_bytes() == b""


@pytest.mark.slow
def test_a_complete_run_is_merged_again_from_its_parts_and_outlives_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 5)
    command = ("--input", source, "--output", folder, "--tasks", 2, "--workers", 1, *SHORT)
    assert call(capfd, *command).returncode == 0
    merged = (folder / "answers.jsonl").read_bytes()
    (folder / "answers.jsonl").unlink()  # as after a kill between the last row and the merge
    done = call(capfd, *command)
    assert "already complete: 5 rows" in done.stdout
    assert (folder / "answers.jsonl").read_bytes() == merged
    (folder / "answers.jsonl").unlink()
    (folder / "parts" / "00001.jsonl").unlink()  # datatrove's own mark says that this task is done
    assert "5 rows in" in call(capfd, *command).stdout
    assert len(answers(folder)) == 5
    shutil.rmtree(folder / "parts")
    assert "already complete: 5 rows" in call(capfd, *command).stdout


ROW = st.lists(st.tuples(st.one_of(st.integers(), st.text(min_size=1)), st.text()), min_size=1, max_size=12)


@given(
    rows=ROW.map(lambda rows: list({str(row_id): (row_id, text) for row_id, text in rows}.values())),
    tasks=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    cut=st.integers(0, 30),
)
def test_rows_finished_in_any_order_and_cut_anywhere_come_out_in_the_inputs_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, str]], tasks: int, seed: int, cut: int
):
    base = tmp_path_factory.mktemp("merge")
    source, folder, rng = base / "in.jsonl", Folder(base / "out", tasks), random.Random(seed)
    with source.open("w", encoding="utf-8", newline="") as file:
        for row_id, text in rows:
            record = {"id": row_id, "prompt": "p" + text.encode(errors="ignore").decode()}
            file.write(json.dumps(record, ensure_ascii=rng.random() < 0.5) + rng.choice(["\n", "\r\n", "\n \n"]))
    _, digest, _ = check_input(source)
    read = list(read_prompt_rows(source))
    for task in range(tasks):
        mine = [row for row in read if row.number % tasks == task]
        for attempt in range(2):  # the first is cut off
            with append_rows(folder.unfinished(task)) as (file, finished):
                todo = [row for row in mine if str(row.id) not in finished]
                rng.shuffle(todo)
                for row in todo:
                    write_row(file, {"id": row.id, **row.fields, "attempt": attempt, "error": "x"})
            if attempt == 0:
                size = folder.unfinished(task).stat().st_size
                os.truncate(folder.unfinished(task), max(0, size - cut))
        folder.unfinished(task).replace(folder.part(task))
    assert folder.open_tasks() == []
    merge_answers(folder, source, digest)
    merged = [json.loads(line) for line in folder.result.read_bytes().split(b"\n")[:-1]]
    assert [(row["id"], row["prompt"]) for row in merged] == [(row.id, row.fields["prompt"]) for row in read]
    assert summarize_answers(folder.result).errors == len(rows)


# What is refused


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["holds no rows"]),
        (b"\n \r\n", ["holds no rows"]),
        (b'{"prompt": "a"}\nprompt\n', ["line 2", "not JSON", "column 1"]),
        (b'{"prompt": "a"}\n\n["a"]\n', ["line 3", '["a"]', "not an object"]),
        (b'{"text": "a"}', ["line 1", "text", "another name"]),
        (b'{"question": "a"}', ["line 1", "prompt or messages"]),
        (b'{"prompt": "a", "messages": []}', ["line 1", "not both"]),
        (b'{"prompt": 7}', ["line 1", "must be text", "7"]),
        (b'{"prompt": " "}', ["line 1", "empty"]),
        (b'{"messages": "a"}', ["line 1", "must be a list"]),
        (b'{"messages": []}', ["line 1", "empty"]),
        (b'{"messages": [{"role": "user"}]}', ["line 1", "content must be text"]),
        (b'{"prompt": "a", "id": 1.5}', ["line 1", "id", "1.5"]),
        (b'{"prompt": "a", "id": true}', ["line 1", "id", "true"]),
        (b'{"prompt": "a", "id": "2"}\n{"prompt": "b"}', ["line 2", "id 2", "line 1"]),
        (b'{"prompt": "a", "x": NaN}', ["line 1", "NaN"]),
        (b'{"prompt": "a", "x": [1e400]}', ["line 1", "1e400", "write it as text"]),
        (b'{"prompt": null, "messages": null}', ["line 1", "prompt or messages"]),
        (b'{"prompt": "a\xff"}', ["line 1", "not UTF-8", "byte 13"]),
        (b'{"prompt": "a\\ud800"}', ["line 1", "half of a character"]),
        ('{"prompt": "a"}'.encode("utf-16"), ["line 1", "not UTF-8"]),
        (b'{"prompt": ' + b"[" * 100_000, ["line 1"]),
        (b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}", ["line 1"]),
    ],
)
def test_a_bad_input_is_refused_with_its_line_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], data: bytes, words: list[str]
):
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    done = call(capfd, "--input", source, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {source}")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


def test_rows_are_read_whatever_the_line_ends_and_the_byte_order_mark(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": " a "}\r\n\r\n{"id": "x", "prompt": "b"}')
    first, second = read_prompt_rows(source)
    assert (first.number, first.line, first.id, first.has_id) == (0, 1, 1, False)
    assert (second.number, second.line, second.id, second.has_id) == (1, 3, "x", True)
    assert (first.fields, second.fields) == ({"prompt": " a "}, {"prompt": "b"})
    assert first.question(Suffix.PARALLEL) == f"a {PARALLEL_SUFFIX}"


def test_the_suffix_ends_the_last_message_of_the_user(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    roles = ["user", "assistant", "user", "assistant"]
    source.write_text(json.dumps({"messages": [{"role": role, "content": "a"} for role in roles]}))
    (row,) = read_prompt_rows(source)
    assert [each["content"] for each in row.question(Suffix.PARALLEL)] == ["a", "a", f"a {PARALLEL_SUFFIX}", "a"]
    assert [each["content"] for each in row.fields["messages"]] == ["a"] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "IN"], ["--output"]),
        (["--output", "OUT"], ["--output", "--input"]),
        (["--tasks", "2", "prompt"], ["--tasks", "--input"]),
        (["--dry-run", "prompt"], ["--dry-run", "--input"]),
        (["prompt", "--input", "IN", "--output", "OUT"], ["PROMPT", "exclude"]),
        (["--file", "IN", "--input", "IN", "--output", "OUT"], ["--file", "exclude"]),
        (["--live", "--input", "IN", "--output", "OUT"], ["--live", "exclude"]),
        (["--partition", "p", "--input", "IN", "--output", "OUT"], ["--partition", "slurm"]),
        (["--mem-per-cpu", "1", "--input", "IN", "--output", "OUT"], ["--mem-per-cpu", "slurm or ray"]),
        (["--executor", "slurm", "--time", "1", "--input", "IN", "--output", "OUT"], ["--partition", "sinfo"]),
        (["--executor", "slum", "--input", "IN", "--output", "OUT"], ["slum", "slurm"]),
        (["--input", "NOWHERE", "--output", "OUT"], ["NOWHERE", "No such file"]),
        (["--input", ".", "--output", "OUT"], ["not a file"]),
        (["--input", "/dev/null", "--output", "OUT"], ["/dev/null is not a file"]),
        (["--input", "IN", "--output", "IN"], ["cannot write"]),
        (["--input", "IN", "--output", "OUT", "--model", "./nowhere"], ["./nowhere"]),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    words: list[str],
):
    monkeypatch.chdir(tmp_path)
    write_problems(Path("IN"), 1)
    done = call(capfd, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not Path("OUT", "run.json").exists()


@pytest.mark.slow
def test_a_folder_goes_on_with_the_run_it_was_begun_with_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 2)
    command = ["--input", source, "--output", folder, "--temperature", "0.5", *SHORT]
    assert call(capfd, *command).returncode == 0
    for options, words in (
        (["--tasks", "2"], ["--tasks 1", "--tasks 2"]),
        (["--seed", "1"], ["--seed", "--seed 1"]),
        (["--top-p", "0.5"], ["without --top-p"]),
        (["--temperature", "0.7"], ["--temperature 0.5", "--temperature 0.7"]),
        (["--max-new-tokens", "151"], ["--max-new-tokens 150", "--max-new-tokens 151"]),
        (["--suffix", "none"], ["--suffix parallel", "--suffix none"]),
        (["--model", "multiverse-tiny-sequential"], ["another model (multiverse-tiny)"]),
    ):
        done = call(capfd, *command, *options)
        assert (done.returncode, done.stdout) == (2, "")
        for word in [*words, "another --output"]:
            assert word in done.stderr
    assert call(capfd, *command, "--max-num-seqs", "3", "--device", "cpu").returncode == 0  # of no account
    source.write_text(source.read_text() + '{"prompt": "more"}\n')
    done = call(capfd, *command)
    assert (done.returncode, "begun with other rows" in done.stderr) == (2, True)
    (folder / "run.json").unlink()
    done = call(capfd, *command)
    assert (done.returncode, "no run.json" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_folder_whose_rows_were_counted_from_0_goes_on_only_if_all_rows_have_ids(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    for own_id, code in (('"id": "a", ', 0), ("", 2)):
        source.write_text(f'{{{own_id}"prompt": "A=1+2; total?"}}\n')
        assert call(capfd, "--input", source, "--output", folder, *SHORT).returncode == 0
        begun = json.loads((folder / "run.json").read_text())
        del begun["ids_count"]  # as earlier versions wrote it
        (folder / "run.json").write_text(json.dumps(begun))
        done = call(capfd, "--input", source, "--output", folder, *SHORT)
        assert done.returncode == code
        assert ("counted rows without an id from 0" in done.stderr) == (code == 2)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_other_weights_in_the_same_folder_are_another_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source, model = tmp_path / "in.jsonl", tmp_path / "model"
    write_problems(source, 1)
    shutil.copytree(ROOT / "src/multiverse_hf/assets/multiverse-tiny", model)
    command = ["--input", source, "--output", tmp_path / "out", "--model", model, *SHORT]
    assert call(capfd, *command).returncode == 0
    (model / "README.md").write_text("a note")
    assert call(capfd, *command).returncode == 0
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # trained on: the same size, another value
    weights.write_bytes(data)
    done = call(capfd, *command)
    assert (done.returncode, "another model" in done.stderr) == (2, True)


def test_an_input_that_changes_after_the_run_began_stops_it(tmp_path: Path):
    source, folder = tmp_path / "in.jsonl", Folder(tmp_path / "out", 1)
    write_problems(source, 2)
    _, digest, _ = check_input(source)
    with append_rows(folder.part(0)) as (file, _):
        for row in read_prompt_rows(source):
            write_row(file, {"id": row.id})
    write_problems(source, 3)
    with pytest.raises(CommandError, match="changed after the run began"):
        merge_answers(folder, source, digest)
    assert not folder.result.exists()


def test_a_part_without_one_of_its_rows_is_not_merged(tmp_path: Path):
    source, folder = tmp_path / "in.jsonl", Folder(tmp_path / "out", 1)
    write_problems(source, 2)
    with append_rows(folder.part(0)) as (file, _):
        write_row(file, {"id": "row-1"})
    with pytest.raises(CommandError, match=r"00000.jsonl lacks row row-0; delete it"):
        merge_answers(folder, source, check_input(source)[1])
    assert not folder.result.exists()


def test_a_damaged_part_is_told_of_by_line(tmp_path: Path):
    part = tmp_path / "part.jsonl"
    part.write_bytes(b'{"id": 1}\n{"id"\n{"id": 2}\n')
    with pytest.raises(CommandError, match=r"part.jsonl, line 2 is damaged"), append_rows(part):
        pass
    part.write_bytes(b'{"id": 1}\n{"id": "1"}\n')
    with pytest.raises(CommandError, match="line 2 repeats id 1"), append_rows(part):
        pass


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source = tmp_path / "in.jsonl"
    write_problems(source, 1)
    hold = (
        "import sys; from pathlib import Path; from multiverse_hf.batch.rows import Folder\n"
        "with Folder(Path(sys.argv[1]), 1).lock(sys.argv[2]):\n    print('held', flush=True); input()"
    )
    for name, words in (("run", "another run is at work"), ("00000", "another process is at work on task 0")):
        folder = tmp_path / name
        holder = subprocess.Popen(
            [sys.executable, "-c", hold, str(folder), name],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout.readline() == b"held\n"
        done = call(capfd, "--input", source, "--output", folder, *SHORT)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
        holder.communicate(b"\n")
        assert call(capfd, "--input", source, "--output", folder, *SHORT).returncode == 0


@pytest.mark.slow
def test_a_log_says_how_far_a_run_is(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(watch, "FIRST_S", 0)
    monkeypatch.setattr(watch, "EVERY_S", 0)
    source = tmp_path / "in.jsonl"
    write_problems(source, 2)
    command = ["generate", "--input", str(source), "--output", str(tmp_path / "out"), "--max-new-tokens", "40"]
    assert run(command) == 0
    assert re.search(r"^[0-2] of 2 rows after \d+ s", capfd.readouterr().err, re.MULTILINE)


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "in.jsonl"
    write_problems(source, 1)
    command = ("--input", source, "--output", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    done = call(capfd, *command, "--executor", "ray")
    assert (done.returncode, install_line("ray") in done.stderr) == (1, True)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    done = call(capfd, *command)
    assert (done.returncode, install_line("batch") in done.stderr) == (1, True)


def test_workers_of_a_machine_share_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from multiverse_hf.batch.launch import Batch, _make_step, num_threads, num_workers
    from multiverse_hf.checkpoints import Attention, Dtype

    def step(device: str, local_rank: int, **options: Any) -> str:
        model = (None, Suffix.NONE, {}, Dtype.AUTO, Attention.SDPA, device, None)
        made = _make_step(Batch(tmp_path, tmp_path, *model, **options), Folder(tmp_path, 1), tmp_path, "", {})
        made.local_rank = local_rank
        return made._device()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of the hardware, which tests cannot choose
    assert [step("auto", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [step("cuda:1", 0), step("cpu", 1)] == ["cuda:1", "cpu"]
    model = (None, Suffix.NONE, {}, Dtype.AUTO, Attention.SDPA)
    assert num_workers(Batch(tmp_path, tmp_path, *model, "auto", None, tasks=5)) == 2
    assert num_workers(Batch(tmp_path, tmp_path, *model, "auto", None, tasks=5, workers=4)) == 4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert num_workers(Batch(tmp_path, tmp_path, *model, "cpu", None, tasks=1000)) == cores
    assert num_threads(Batch(tmp_path, tmp_path, *model, "cpu", None, tasks=1000)) == 1
    assert num_threads(Batch(tmp_path, tmp_path, *model, "cpu", None, tasks=1)) == cores


# Slurm and Ray

# Stands in for the scheduler alone: starts the script that it is given once for every index of the array, with what
# Slurm would set. Options, script, srun's command and the tasks are the real ones.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
number = len(os.listdir({jobs!r})) + 1
open(os.path.join({jobs!r}, f"{{number}}.slurm"), "w").write(" ".join(sys.argv[1:-1]) + "\\n" + script)
offset = next((a.split("RUN_OFFSET=")[1] for a in sys.argv if "RUN_OFFSET" in a), "0")
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
log = re.search(r"--output=(.*)", script)[1]
for index in range(first, last + 1):
    more = {{"SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(number), "SLURM_NODELIST": "here"}}
    with open(log.replace("%A", str(number)).replace("%a", str(index)), "w") as out:
        subprocess.run(["bash"], input=script.encode(), stdout=out, stderr=out,
                       env=os.environ | more | {{"RUN_OFFSET": offset}})
print("Submitted batch job", number)
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "${@: -1}"\n'
SLURM = ["--executor", "slurm", "--partition", "short", "--time", "0:10:00", "--sbatch", "account=me"]


def test_a_dry_run_prints_slurms_script_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 3)
    options = ["--tasks", "3", "--workers", "2", "--cpus-per-task", "4", "--gpus-per-task", "1", "--mem-per-cpu", "8"]
    done = call(capfd, "--input", source, "--output", folder, *SLURM, *options, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        *("array=0-2%2", "partition=short", "time=0:10:00", "account=me", "cpus-per-task=4", "mem-per-cpu=8G"),
        "gpus=1",
    ):
        assert f"\n#SBATCH --{line}\n" in done.stdout
    assert "--qos" not in done.stdout
    assert f"launch_pickled_pipeline {folder}/logs/executor.pik" in done.stdout
    assert not folder.exists()


@pytest.mark.parametrize("name", ["my runs", "a$b", "it's", "50%"])
def test_a_folder_that_slurms_script_cannot_hold_is_refused_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
):
    source = tmp_path / "in.jsonl"
    write_problems(source, 1)
    done = call(capfd, "--input", source, "--output", tmp_path / name / "out", *SLURM, "--dry-run")
    assert done.returncode != 0
    assert "a Slurm script cannot take" in done.stderr


@pytest.mark.long
def test_slurm_runs_the_script_it_is_given_and_the_last_task_merges(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source, folder, jobs, commands = (tmp_path / name for name in ("in.jsonl", "out", "jobs", "bin"))
    write_problems(source, 4)
    jobs.mkdir()
    commands.mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(python=sys.executable, jobs=str(jobs))),
        ("srun", SRUN),
        ("scontrol", SCONTROL),
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    command = ["--input", source, "--output", folder, "--tasks", 2, *SLURM, "--max-new-tokens", 150]
    done = call(capfd, *command)
    assert (done.returncode, "no sbatch here" in done.stderr) == (1, True)

    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    dry = call(capfd, *command, "--dry-run")
    done = call(capfd, *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("job 1 submitted")
    assert (folder / "logs" / "launch_script.slurm").read_text() == dry.stdout
    assert (jobs / "1.slurm").read_text().endswith(dry.stdout)
    logs = "".join(path.read_text() for path in sorted((folder / "logs" / "slurm_logs").glob("*")))
    assert [row["id"] for row in answers(folder)] == [f"row-{i}" for i in range(4)], logs
    assert len((folder / "parts" / "00000.jsonl").read_text().splitlines()) == 2
    done = call(capfd, *command)
    assert "already complete: 4 rows" in done.stdout
    plain = call(capfd, "--input", source, "--output", tmp_path / "plain", *SHORT)
    assert plain.returncode == 0
    assert answers(tmp_path / "plain") == answers(folder)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs multiverse_hf[ray]")
def test_ray_runs_the_tasks_and_tells_of_one_that_failed(tmp_path: Path):
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    write_problems(source, 4)
    command = ["--input", source, "--output", folder, "--tasks", 2, "--executor", "ray", "--mem-per-cpu", 1]
    command += ["--max-new-tokens", 150]
    done = finish(start(*command, "--cpus-per-task", 1000))
    assert done.returncode == 2
    assert "1000 of CPU" in done.stderr
    (folder / "parts").mkdir()
    (folder / "parts" / "00001.unfinished.jsonl").write_text("damaged\n")
    done = finish(start(*command))
    assert done.returncode == 1
    assert "line 1 is damaged" in done.stderr
    assert (folder / "parts" / "00000.jsonl").exists()
    (folder / "parts" / "00001.unfinished.jsonl").unlink()
    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in answers(folder)] == [f"row-{i}" for i in range(4)]
    assert "2 of them before" in done.stdout
