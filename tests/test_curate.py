"""``multiverse curate`` against a server that answers by rule, and badly: over real HTTP, in real processes."""
# ruff: noqa: E402 - without the extra these tests are skipped, with the reason

import contextlib
import glob
import importlib.util
import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("datatrove", "openai", "tenacity", "rapidfuzz", "math_verify"):
    pytest.importorskip(package, reason="needs multiverse_hf[curate]")

from multiverse_hf.cli import run
from multiverse_hf.curator.assembly import reasoning_of
from multiverse_hf.curator.checks import check_content, check_independence, paths_of
from multiverse_hf.curator.results import CurationFolder
from multiverse_hf.data.chains import Kind, document, is_correct, parse_problem, sample_problem
from multiverse_hf.documents import check, parse_document

pytestmark = pytest.mark.usefixtures("unquiet")

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "data" / "multiverse-1k-samples"
KEY = "sk-this-key-is-written-nowhere"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "COLUMNS": "80", "OPENAI_API_KEY": KEY}


class RuleServer:
    """A running rule server."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, ROOT / "tests" / "rule_server.py", *map(str, options)]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()

    def log(self) -> dict[str, int]:
        """Give what was asked so far."""
        with urllib.request.urlopen(f"{self.url}/log", timeout=30) as response:
            return json.load(response)

    def behave(self, **behaviour: Any) -> None:
        """Change its ways."""
        data = json.dumps(behaviour).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/behave", data), timeout=30).close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RuleServer]]:
    """Start servers, and end them with the test."""
    servers: list[RuleServer] = []

    def start(*options: object) -> RuleServer:
        servers.append(RuleServer(*options))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate()


def write_traces(path: Path, count: int, seed: int = 0, max_ops: int = 5) -> list[dict[str, Any]]:
    """Write chains as plain sequential traces."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        problem = sample_problem(rng, Kind.NESTED if number % 3 == 0 else Kind.FLAT, max_ops=max_ops)
        found = parse_document(document(problem).partition("\n\nAnswer")[0])
        row = {"id": f"row-{number}", "prompt": str(problem), "reasoning": reasoning_of(found)}
        rows.append(row | {"answer": str(problem.answer)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def options(source: Path, folder: Path, server: RuleServer, *more: object) -> list[str]:
    given = ["--input", source, "--output", folder, "--base-url", f"{server.url}/v1", "--model", "rule", *more]
    return ["curate", *map(str, given)]


def call(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in this process; with one worker the task runs in it too."""
    code = run(arguments)
    captured = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, code, captured.out, without_progress(captured.err))


def without_progress(text: str) -> str:
    """Leave out the lines that say how far a run is, which a slow machine has more of."""
    return re.sub(r"^\d+ of \d+ rows after .*\n", "", text, flags=re.MULTILINE)


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    command = [sys.executable, "-m", "multiverse_hf.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    process = start(arguments)
    out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(arguments, process.returncode, out, without_progress(err))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curated(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "curated.jsonl")


def rejected(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "rejected" / "rejected.jsonl")


def config(path: Path, **settings: Any) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(settings))
    return path


def check_all(rows: list[dict[str, Any]], traces: list[dict[str, Any]], limit: float = 0.2) -> None:
    """Check accepted rows anew, each against its trace: nothing that fails a check may be among them."""
    by_id = {trace["id"]: trace for trace in traces}
    for row in rows:
        trace = by_id[row["id"]]
        found = parse_document(row["document"])
        check(found, max_depth=2)
        assert found.num_paths >= 2
        check_content(trace["reasoning"], reasoning_of(found), limit)
        check_independence(found, trace["prompt"])
        assert is_correct(parse_problem(row["prompt"]), f"{row['document']}\n\nAnswer: {row['answer']}")
        assert reasoning_of(found).rpartition("\n")[2] == trace["reasoning"].rpartition("\n")[2]
        assert (row["prompt"], row["sequential"]) == (trace["prompt"], trace["reasoning"])
        provenance = row["provenance"]
        assert len(provenance["path_distances"]) == len(paths_of(found))
        assert max(provenance["distance"], *provenance["path_distances"]) <= limit


# End to end


@pytest.mark.slow
def test_300_traces_come_out_as_documents_that_build_a_dataset(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    traces = write_traces(source, 300)
    done = finish(options(source, folder, server, "--report"))
    assert done.returncode == 0, done.stderr
    assert "300 accepted, 0 rejected" in done.stdout
    rows = curated(folder)
    assert [row["id"] for row in rows] == [trace["id"] for trace in traces]
    assert rejected(folder) == []
    check_all(rows, traces, limit=0.01)
    for row in rows:  # the same blocks as the family's own documents
        ours = parse_document(row["document"])
        theirs = parse_document(document(parse_problem(row["prompt"])).partition("\n\nAnswer")[0])
        assert [len(block.paths) for block, _ in ours.blocks()] == [len(block.paths) for block, _ in theirs.blocks()]
        assert ours.sequential() == theirs.sequential()
    assert server.log()["answered"] == 5 * 300

    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "300 (100.0%)" in page
    assert "data:image/png;base64," in page
    assert not re.search(r"""(src|href)=["']?(http|//|[\w/]+\.(js|css|png))""", page)

    build = [
        sys.executable,
        ROOT / "datasets_scripts" / "build_multiverse_1k.py",
        "--curated",
        folder / "curated.jsonl",
    ]
    build += ["--license", "apache-2.0", "--output", tmp_path / "dataset"]
    built = subprocess.run(build, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800, check=False)
    assert built.returncode == 0, built.stderr
    assert re.search(r"285 train, 15 test rows, 0 dropped", built.stdout), built.stdout
    import datasets

    train = datasets.load_dataset(str(tmp_path / "dataset"), "multiverse", split="train")
    example = next(row for row in rows if row["id"] == train[0]["id"])
    assert json.loads(train[0]["provenance"])["model"] == "rule"
    assert example["document"] in train[0]["document"]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs published documents in {SAMPLES}")
def test_published_documents_come_through_with_their_structure(tmp_path: Path, serve, capfd):
    texts = {path: Path(path).read_text(encoding="utf-8").strip() for path in sorted(glob.glob(f"{SAMPLES}/*.xml"))}
    targets, source, folder = tmp_path / "targets.jsonl", tmp_path / "traces.jsonl", tmp_path / "out"
    rows = [{"prompt": f"Problem {Path(path).stem}", "document": text} for path, text in texts.items()]
    targets.write_text("".join(json.dumps(row) + "\n" for row in rows))
    traces = [{"prompt": row["prompt"], "reasoning": reasoning_of(parse_document(row["document"]))} for row in rows]
    source.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    done = call(capfd, options(source, folder, serve("--targets", targets)))
    assert (done.returncode, done.stderr) == (0, "")
    found = curated(folder)
    assert len(found) == len(rows) >= 7
    num_changed = 0
    for row, given in zip(found, rows, strict=True):
        ours, theirs = parse_document(row["document"]), parse_document(given["document"])
        assert shape(ours) == shape(theirs)
        if row["document"] != given["document"]:
            # a path of it mentions its sibling: that sentence was rewritten, and nothing else changed
            num_changed += 1
            assert [each["check"] for each in row["provenance"]["attempts"]].count("independence") == 1
            lines = zip(row["document"].splitlines(), given["document"].splitlines(), strict=True)
            assert sum(one != other for one, other in lines) == 1
    assert num_changed <= len(rows) // 4


def shape(found: Any) -> list[tuple[str, bool]]:
    """Give a document's tags, in order."""
    return [
        (piece.text, piece.closes) for piece in found.walk() if piece.text.startswith("<") and piece.text[-1] == ">"
    ]


@pytest.mark.slow
def test_the_commands_of_the_docs_run_as_pasted(tmp_path: Path, serve):
    (pasted,) = (
        text
        for text in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/curation.md").read_text(), re.DOTALL)
        if "curate.yaml" in text
    )
    traces = write_traces(tmp_path / "all.jsonl", 20)
    rows = [{"prompt": row["prompt"], "trace": row["reasoning"], "answer": row["answer"]} for row in traces]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, command in (("multiverse", "-m multiverse_hf.cli"), ("python", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "datasets_scripts").symlink_to(ROOT / "datasets_scripts")
    pasted = pasted.replace("http://localhost:8000", serve().url)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", pasted],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "20 accepted, 0 rejected" in done.stdout
    assert re.search(r"answered, \$0\.\d\d", done.stdout)
    assert "19 train, 1 test rows, 0 dropped" in done.stdout


# Badness


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_when_a_fifth_of_all_calls_fail_or_lie_no_bad_row_comes_out_and_each_rejection_is_explained(
    tmp_path: Path, serve, tasks: int
):
    source, folder = tmp_path / "traces.jsonl", tmp_path / "out"
    traces = write_traces(source, 150)
    kinds = ["429", "500", "503", "drop", "half", "hang"]
    server = serve("--behave", json.dumps({"lies": 0.2, "failures": 0.2, "failing": kinds}))
    settings = config(tmp_path / "c.yaml", timeout_s=1.0, prices={"rule": {"prompt": 1, "completion": 2}})
    done = finish(options(source, folder, server, "--config", settings, "--tasks", tasks, "--json"))
    assert done.returncode == 0, done.stderr
    report, log = json.loads(done.stdout), server.log()
    assert log["lies"] > 100
    assert min(log[kind] for kind in kinds) > 10
    rows, refused = curated(folder), rejected(folder)
    assert {row["id"] for row in (*rows, *refused)} == {trace["id"] for trace in traces}
    assert len(rows) + len(refused) == len(traces) == report["rows"]
    assert len(rows) > 0.95 * len(traces)
    check_all(rows, traces)
    for row in refused:
        last = [each for each in row["attempts"] if each["stage"] == row["stage"]]
        assert len(last) == 4  # asked as often as may be, each with its reason and its reply
        assert len({each["seed"] for each in last}) == 4
        assert all(each["check"] and each["detail"] and each["reply"] for each in last)
        assert (row["check"], row["detail"]) == (last[-1]["check"], last[-1]["detail"])
    attempts = [each for row in rows for each in row["provenance"]["attempts"]]
    everything = attempts + [each for row in refused for each in row["attempts"]]
    assert {"form", "content", "quotes", "blocks", "answer"} <= {each["check"] for each in everything}
    tokens = {kind: sum(each[f"{kind}_tokens"] for each in everything) for kind in ("prompt", "completion")}
    assert report["tokens"] == tokens
    assert report["cost"] == pytest.approx((tokens["prompt"] + 2 * tokens["completion"]) / 1e6)
    # no reply was paid for twice, but for those that came when they were no longer waited for
    status = json.loads(CurationFolder(folder, tasks).status(0).read_text()) if tasks == 1 else {}
    late = status.get("calls timeout", log["answered"]) - log["hang"]
    assert 0 <= log["answered"] - sum(report["asked"].values()) <= late


@pytest.mark.slow
def test_an_endpoint_that_is_down_for_a_while_costs_no_row(tmp_path: Path, serve):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve("--delay", 0.01)
    write_traces(source, 60)
    process = start(options(source, folder, server))
    while server.log().get("answered", 0) < 100:
        time.sleep(0.02)
    server.behave(status=500, message="out of order")
    told = f"calls to {server.url}/v1 fail: HTTP 500: out of order; trying again until 120 s have passed\n"
    while (line := process.stderr.readline()) != told:
        assert without_progress(line) == ""
    received = server.log()["received"]
    time.sleep(1)
    assert server.log()["received"] - received <= 3  # one call at a time tries it
    server.behave(status=None)
    _, err = process.communicate(timeout=1800)
    assert (process.returncode, without_progress(err)) == (0, "the endpoint answers again\n")
    assert len(curated(folder)) == 60
    assert all(each["check"] is None for row in curated(folder) for each in row["provenance"]["attempts"])
    status = json.loads(CurationFolder(folder, 1).status(0).read_text())
    assert status["outages"] == 1
    assert status["calls server error"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "rows", "words"),
    [
        ("http://127.0.0.1:{free}/v1", 20, "connection refused"),
        pytest.param("http://127.0.0.1:{free}/v1", 1, "connection refused", marks=pytest.mark.slow),
        pytest.param("http://nowhere.invalid/v1", 20, r"no such host \(.+\)", marks=pytest.mark.slow),
        pytest.param("{server}/v1", 20, "HTTP 500: out of order", marks=pytest.mark.slow),
    ],
)
def test_a_dead_endpoint_is_told_of_and_ends_the_run_in_a_line_and_the_same_command_goes_on(
    tmp_path: Path, serve, capfd, address: str, rows: int, words: str
):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, rows)
    server.behave(status=500, message="out of order")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = address.format(free=port, server=server.url)
    done = call(capfd, [*options(source, folder, server), "--base-url", url, "--max-outage", "5"])
    assert (done.returncode, done.stdout) == (1, "")
    told = rf"calls to {re.escape(url)} fail: {words}; trying again until 5 s have passed\n"
    ended = (
        rf"error: the endpoint {re.escape(url)} is down: no call was answered for \d+ s; the last one failed: {words}"
    )
    assert re.fullmatch(rf"{told}{ended}; start it.* again\n", done.stderr), done.stderr
    assert re.search(told, (folder / "logs" / "logs" / "task_00000.log").read_text())
    server.behave(status=None)
    assert f"{rows} accepted, 0 rejected" in call(capfd, options(source, folder, server)).stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", ["connection refused", "HTTP 500: out of order"])
def test_several_tasks_tell_of_a_dead_endpoint_once(tmp_path: Path, serve, words: str):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 20)
    server.behave(status=500, message="out of order")
    if words == "connection refused":
        server.process.kill()
        server.process.wait()
    command = options(source, folder, server, "--tasks", 2, "--workers", 2)
    done = finish([*command, "--max-outage", "6"])
    assert (done.returncode, done.stdout) == (1, "")
    told = f"calls to {server.url}/v1 fail: {words}; trying again until 6 s have passed\n"
    assert done.stderr.startswith(told)
    ended = rf"error: the endpoint {server.url}/v1 is down: no call was answered for \d+ s; .* again\n"
    assert re.fullmatch(ended, done.stderr.removeprefix(told)), done.stderr
    logs = [path.read_text() for path in (folder / "logs" / "logs").glob("task_*.log")]
    assert {1} <= {log.count(told) for log in logs} <= {0, 1}  # a task that starts late is ended with the first


@pytest.mark.slow
def test_a_dead_endpoint_is_told_of_in_a_terminal_too(tmp_path: Path, serve):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 20)
    server.behave(status=500, message="out of order")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "multiverse_hf.cli", *options(source, folder, server), "--max-outage", "5"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # when the other end is closed
        while data := os.read(ours, 4096):
            screen += data
    os.close(ours)
    assert process.wait() == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    assert f"calls to {server.url}/v1 fail: HTTP 500: out of order; trying again until 5 s have passed" in text
    assert "0/20 rows" in text
    assert "waiting for answers" in text
    assert re.search(r"error: the endpoint \S+ is down: no call was answered for \d+ s", text)


def test_a_wait_longer_than_one_may_wait_ends_the_run_in_a_line(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 5)
    server.behave(failures=1, failing=["429"])
    done = call(capfd, options(source, folder, server, "--max-outage", "0.1"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: the endpoint \S+ is down: it asks to wait 0.2 s, longer than 0.1 s; raise --max-outage.* again\n",
        done.stderr,
    ), done.stderr


@pytest.mark.slow
def test_retry_after_is_kept_to(tmp_path: Path, serve, capfd):
    source, folder = tmp_path / "traces.jsonl", tmp_path / "out"
    write_traces(source, 2)
    server = serve("--behave", json.dumps({"failures": 1, "failing": ["429"]}))
    begin = time.monotonic()
    done = call(capfd, options(source, folder, server, "--concurrency", 1))
    assert done.returncode == 0, done.stderr
    # ten calls, one after the other, each told twice to wait for 0.2 s
    assert time.monotonic() - begin >= 10 * 2 * 0.2
    assert server.log() | {"429": 20, "answered": 10, "received": 30} == server.log()
    assert json.loads(CurationFolder(folder, 1).status(0).read_text())["calls rate limited"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "message", "words"),
    [
        (401, f"Incorrect API key provided: {KEY}", r"HTTP 401: Incorrect API key provided: \*\*\*"),
        (404, "no model rule", "HTTP 404: no model rule"),
        (402, "no credit left", "HTTP 402: no credit left"),
        (429, "insufficient_quota", "HTTP 429: insufficient_quota"),
        (400, "unknown field seed", "HTTP 400: unknown field seed"),
    ],
)
def test_an_endpoint_that_takes_no_call_ends_the_run_at_once_and_rejects_no_row(
    tmp_path: Path, serve, capfd, monkeypatch, status: int, message: str, words: str
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 30)
    server.behave(status=status, message=message)
    command = options(source, folder, server)
    done = call(capfd, command)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: the endpoint refuses all calls: {words}; correct that.*\n", done.stderr), done.stderr
    server.behave(status=None)
    assert "30 accepted, 0 rejected" in call(capfd, command).stdout


def test_a_row_that_the_endpoint_refuses_is_rejected_with_its_words_and_stops_nothing(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 3)
    server.behave(status=400, message="This model's maximum context length is 4096 tokens")
    done = call(capfd, options(source, folder, server))
    assert "0 accepted, 3 rejected" in done.stdout
    assert all("maximum context length" in row["detail"] and len(row["attempts"]) == 1 for row in rejected(folder))
    assert curated(folder) == []


def test_an_endpoint_without_schemas_is_asked_for_fenced_text_from_then_on(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 30)
    server.behave(schema=False)
    done = call(capfd, options(source, folder, server, "--concurrency", 4))
    assert "30 accepted, 0 rejected" in done.stdout, done.stderr
    assert server.log()["with schema"] <= 4  # those on their way when the first was refused
    assert server.log()["answered"] == 150


def test_traces_with_nothing_parallel_and_rows_that_are_none_are_rejected_without_further_calls(
    tmp_path: Path, serve, capfd
):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    (good,) = write_traces(source, 1)
    problem = sample_problem(random.Random(5), Kind.SINGLE)
    single = {"prompt": str(problem), "reasoning": reasoning_of(parse_document(document(problem).split("\n\nAns")[0]))}
    lines = [json.dumps(good), "", json.dumps(single), "no json", json.dumps({"prompt": "p"})]
    source.write_text("\n".join(lines) + "\n")
    done = call(capfd, options(source, folder, server))
    assert "1 accepted, 3 rejected" in done.stdout, done.stderr
    found = [(row["id"], row["stage"], row["check"]) for row in rejected(folder)]
    assert found == [("3", "groups", "no parallel group"), ("4", "input", "input"), ("5", "input", "input")]
    assert server.log()["answered"] == 5 + 2


def test_a_judge_is_asked_if_wanted_and_what_it_finds_is_asked_again(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 4)
    done = call(capfd, options(source, folder, server, "--judge"))
    assert "4 accepted, 0 rejected" in done.stdout, done.stderr
    assert server.log()["judge"] == 4
    assert "judge" in curated(folder)[0]["provenance"]
    server.behave(dependent=True)
    done = call(capfd, options(source, tmp_path / "strict", server, "--judge", "--max-attempts", 2))
    assert "0 accepted, 4 rejected" in done.stdout, done.stderr
    for row in rejected(tmp_path / "strict"):
        assert row["check"] == "judge"
        assert "path 2 needs another path" in row["detail"]
        assert [each["stage"] for each in row["attempts"]][-4:] == ["mapreduce", "judge"] * 2


# Killed and gone on with


@pytest.mark.slow
def test_killed_five_times_a_run_repeats_only_the_calls_on_their_way(tmp_path: Path, serve):
    source, folder = tmp_path / "traces.jsonl", tmp_path / "out"
    write_traces(source, 300, max_ops=2)
    once = finish(options(source, tmp_path / "once", serve(), "--concurrency", 64))
    assert once.returncode == 0, once.stderr
    server, rng = serve("--delay", 0.01), random.Random(0)
    command = options(source, folder, server, "--concurrency", 8)
    for kill in range(5):
        process = start(command)
        goal = 5 * 300 * (kill + rng.random()) / 5.5
        while server.log().get("received", 0) < goal:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    part = CurationFolder(folder, 1).unfinished(0)
    with part.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"number": 7, "acc')
    done = finish(command)
    assert done.returncode == 0, done.stderr
    assert server.log()["received"] <= 1.03 * 5 * 300
    assert (folder / "curated.jsonl").read_bytes() == (tmp_path / "once" / "curated.jsonl").read_bytes()
    again = finish(command)
    assert "300 rows" in again.stdout
    assert "300 of them before" in again.stdout


@pytest.mark.slow
def test_two_tasks_give_the_rows_of_one(tmp_path: Path, serve):
    source, server = tmp_path / "traces.jsonl", serve("--behave", '{"lies": 0.2}')
    write_traces(source, 60)
    for tasks in (1, 2):
        done = finish(options(source, tmp_path / str(tasks), server, "--tasks", tasks))
        assert done.returncode == 0, done.stderr
    for name in ("curated.jsonl", "rejected/rejected.jsonl", "summary.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs multiverse_hf[ray]")
def test_two_tasks_of_ray_give_the_rows_of_one(tmp_path: Path, serve):
    source, server = tmp_path / "traces.jsonl", serve("--behave", '{"lies": 0.2}')
    write_traces(source, 60)
    for name, more in (("one", ()), ("ray", ("--tasks", 2, "--executor", "ray", "--mem-per-cpu", 1))):
        done = finish(options(source, tmp_path / name, server, *more))
        assert done.returncode == 0, done.stderr
    for name in ("curated.jsonl", "rejected/rejected.jsonl", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()


def test_slurms_script_is_shown_and_holds_no_key(tmp_path: Path, serve, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    source, folder = tmp_path / "traces.jsonl", tmp_path / "out"
    write_traces(source, 10)
    slurm = ("--executor", "slurm", "--partition", "cpu", "--time", "1:00:00", "--tasks", 4, "--dry-run")
    done = call(capfd, options(source, folder, serve(), *slurm))
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-3" in done.stdout
    assert KEY not in done.stdout
    assert not (folder / "run.json").exists()


# What is read, written and refused


def test_rows_come_from_parquet_and_datasets_as_well(tmp_path: Path, serve, capfd):
    import datasets

    source, server = tmp_path / "traces.jsonl", serve()
    traces = write_traces(source, 7)
    table = datasets.Dataset.from_list(
        [{"question": t["prompt"], "cot": t["reasoning"], "id": t["id"]} for t in traces]
    )
    table.to_parquet(tmp_path / "traces.parquet")
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    settings = config(tmp_path / "c.yaml", columns={"reasoning": "cot"})
    for given, tasks in ((tmp_path / "traces.parquet", 2), (tmp_path / "set", 1)):
        folder = tmp_path / f"out-{given.stem}"
        done = call(capfd, options(given, folder, server, "--config", settings, "--tasks", tasks, "--workers", 1))
        assert "7 accepted, 0 rejected" in done.stdout, done.stderr
        assert [row["id"] for row in curated(folder)] == [trace["id"] for trace in traces]


@pytest.mark.slow
def test_no_key_is_written_anywhere(tmp_path: Path, serve):
    source, server = tmp_path / "traces.jsonl", serve()
    write_traces(source, 5)
    refused = {"status": 401, "message": f"Incorrect API key provided: {KEY}"}
    dead = {"status": 500, "message": f"no such key: {KEY}"}
    odd = dead | {"status": 200}
    for name, behaviour, code in (
        ("bad", {"failures": 0.2, "failing": ["500", "drop"], "lies": 0.3}, 0),
        ("refused", refused, 1),
        ("dead", dead, 1),
        ("odd", odd, 1),
        ("silent", {"down": True}, 1),
    ):
        server.behave(**behaviour)
        more = ("--tasks", 2, "--traceback", "--max-outage", 4, *(("--report",) if code == 0 else ()))
        done = finish(options(source, tmp_path / name, server, *more))
        assert done.returncode == code, done.stderr
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert len(files) > 8
        for data in (done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in files)):
            assert KEY.encode() not in data, name


def test_a_folder_goes_on_with_the_run_it_was_begun_with_only(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 3)
    assert call(capfd, options(source, folder, server)).returncode == 0
    for more, words in (
        (("--seed", "1"), "with seed 0, now it is 1"),
        (("--tasks", "2"), "with --tasks 1, now it is --tasks 2"),
        (("--max-attempts", "2"), "with max_attempts 4, now it is 2"),
        (("--model", "other"), 'with model "rule", now it is "other"'),
    ):
        done = call(capfd, options(source, folder, server, *more))
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert call(capfd, options(source, folder, server, "--concurrency", 3)).returncode == 0  # of no account
    write_traces(source, 4)
    done = call(capfd, options(source, folder, server))
    assert (done.returncode, "with other rows" in done.stderr) == (2, True)


def test_a_finished_folder_whose_rows_were_cut_short_is_noticed_and_written_anew(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve()
    write_traces(source, 3)
    assert call(capfd, options(source, folder, server)).returncode == 0
    whole = (folder / "curated.jsonl").read_bytes()
    (folder / "curated.jsonl").write_bytes(whole[: len(whole) // 2])
    done = call(capfd, options(source, folder, server))
    assert (done.returncode, "curated.jsonl has 1 rows, and 3 were written; delete" in done.stderr) == (2, True)
    (folder / "curated.jsonl").unlink()
    assert call(capfd, options(source, folder, server)).returncode == 0
    assert (folder / "curated.jsonl").read_bytes() == whole
    assert server.log()["received"] == 15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "OUT"], "--input, or write the report"),
        (["--input", "IN"], "--output"),
        (["--input", "IN", "--output", "OUT"], "no model"),
        (["--input", "NOWHERE.jsonl", "--output", "OUT", "--model", "m"], "no file NOWHERE.jsonl"),
        (["--input", "EMPTY.jsonl", "--output", "OUT", "--model", "m"], "holds no rows"),
        (["--input", "ODD.jsonl", "--output", "OUT", "--model", "m"], "ODD.jsonl, line 1: wrong columns: no text for"),
        (["--input", "", "--output", "OUT", "--model", "m"], "the name of the file or dataset is empty"),
        (["--input", "IN", "--output", "OUT", "--model", "m", "--conncurrency", "3"], "Did you mean --concurrency"),
        (["--input", "IN", "--output", "OUT", "--model", "m", "--partition", "p"], "is for --executor slurm"),
        (["--input", "IN", "--output", "OUT", "--model", "m", "--config", "NOWHERE"], "cannot read NOWHERE"),
        (["--output", "OUT", "--report"], "holds no curation"),
        (["--input", "IN.jsonl", "--output", "OUT", "--model", "m"], "needs a token: set HF_TOKEN"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_before_any_call(
    tmp_path: Path, monkeypatch, capfd, arguments: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    write_traces(Path("IN.jsonl"), 1)
    Path("EMPTY.jsonl").touch()
    Path("ODD.jsonl").write_text('{"prompt": "p"}\n')
    done = call(capfd, ["curate", *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not Path("OUT", "run.json").exists()


@pytest.mark.slow
def test_a_report_is_drawn_of_a_run_that_is_not_complete(tmp_path: Path, serve, capfd):
    source, folder, server = tmp_path / "traces.jsonl", tmp_path / "out", serve("--delay", 0.05)
    write_traces(source, 200)
    process = start(options(source, folder, server))
    part = CurationFolder(folder, 1).unfinished(0)
    while not part.exists() or part.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 130
    assert "the same command does the rest" in err
    assert without_progress(err).count("\n") == 1
    done = call(capfd, ["curate", "--output", str(folder), "--report"])
    assert done.returncode == 0, done.stderr
    assert "of 200 rows" in (folder / "report.html").read_text()
