"""How much of an endpoint's speed the curator uses, and how its memory grows with the rows that wait.

The endpoint is the tests' rule server, a process of its own that takes a second for each answer. What it could give is
measured in the same run, in turn with the curator: by a bare aiohttp client that makes the same calls, as many at
once, and does nothing else. The goal is 90 % of that. Rates are those of the middle four fifths of the answers, by
the clock of the server: starting up and the last rows, when fewer calls are on their way, are left out on both sides.
With 64 in flight the last rows are 320 calls, so a tenth of all has to be more than that.

    python benchmarks/curation.py --output benchmarks/results/curation_cpu.json
    python benchmarks/curation.py --tasks 2 --in-flight 64
    python benchmarks/curation.py --repeats 1 --queued 1000 100000
"""

import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
from report import announce, count, environment, finish, make_parser, show_environment, shown

from multiverse_hf.curator.assembly import reasoning_of
from multiverse_hf.curator.curation import write_messages
from multiverse_hf.curator.drafts import Draft, Limits
from multiverse_hf.curator.replies import schema_of
from multiverse_hf.curator.results import CurationFolder
from multiverse_hf.curator.stages import STAGES
from multiverse_hf.curator.traces import Trace
from multiverse_hf.data.chains import document, parse_problem, sample_problem
from multiverse_hf.documents import parse_document
from multiverse_hf.jobs.folders import count_lines
from multiverse_hf.outputs import write_output

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import rule_server  # noqa: E402 - it is one of the tests' files

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OPENAI_API_KEY": "none"}
GOAL = 0.9  # of the endpoint's rate, with a second a call and 64 in flight
MEMORY_S = 20  # about; to measure the memory at one number of rows
PROBLEMS = 40  # distinct ones: the server then knows its answers, and its speed is not what is measured


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--rows", type=count, default=700, help="of a timed run (default: %(default)s)")
    parser.add_argument("--in-flight", type=count, default=64, help="calls at once (default: %(default)s)")
    parser.add_argument("--tasks", type=count, default=1, help="that share them (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds an answer takes (default: %(default)s)")
    parser.add_argument(
        "--queued",
        type=count,
        nargs="*",
        default=[1000, 10_000, 100_000],
        help="rows that wait, for the memory; from 500",
    )
    args = parser.parse_args()
    if args.rows < PROBLEMS:
        parser.error(f"--rows must be at least {PROBLEMS}, the number of problems; got {args.rows}")
    if not args.delay > 0 or math.isinf(args.delay):
        parser.error(f"--delay takes a number of seconds above 0, got {args.delay}")
    if args.in_flight < args.tasks:
        parser.error(f"--in-flight {args.in_flight} gives {args.tasks} tasks no call each; raise it")
    if args.queued and min(args.queued) < 500:
        parser.error(f"--queued takes numbers from 500 on, got {min(args.queued)}")
    calls = 2 * args.repeats * 5 * args.rows + 10 * PROBLEMS
    announce(calls * args.delay / args.in_flight / GOAL + MEMORY_S * len(args.queued))
    with tempfile.TemporaryDirectory() as folder:
        names = ("rows", "in_flight", "tasks", "delay")
        result = {"benchmark": "curation", **environment(), **{name: getattr(args, name) for name in names}}
        result["throughput"] = measure_throughput(Path(folder), args)
        result["load_average_after"] = round(os.getloadavg()[0], 2)
        result["memory"] = measure_memory(Path(folder), args)
    show(result)
    finish(result, args.output)


def write_traces(path: Path, rows: int, seed: int) -> None:
    """Write rows of a few problems, each with an id of its own."""
    rng, known = random.Random(seed), []
    for _ in range(PROBLEMS):
        problem = sample_problem(rng, "flat")
        reasoning = reasoning_of(parse_document(document(problem).partition("\n\nAnswer")[0]))
        known.append({"prompt": str(problem), "reasoning": reasoning, "answer": str(problem.answer)})
    lines = (json.dumps({"id": f"row-{number}"} | known[number % PROBLEMS]) for number in range(rows))
    write_output(path, "".join(f"{line}\n" for line in lines))


def start_server(delay: float) -> tuple[subprocess.Popen, str]:
    """Start the rule server; return it and its address."""
    command = [sys.executable, ROOT / "tests" / "rule_server.py", "--delay", str(delay)]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip()


def curate(source: Path, folder: Path, url: str, args: Any) -> subprocess.Popen:
    """Start the real command."""
    options = ["--input", source, "--output", folder, "--base-url", f"{url}/v1", "--model", "rule"]
    options += ["--tasks", args.tasks, "--concurrency", args.in_flight // args.tasks]
    command = [sys.executable, "-m", "multiverse_hf.cli", "curate", *map(str, options)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# Throughput


def measure_throughput(folder: Path, args: Any) -> dict[str, Any]:
    """Time both sides in turn; return calls a second of each, and their ratio."""
    source, calls = folder / "traces.jsonl", 5 * args.rows
    write_traces(source, args.rows, args.seed)
    bodies = request_bodies(source)
    server, url = start_server(args.delay)
    rates: dict[str, list[float]] = {"bare": [], "curator": []}
    try:
        asyncio.run(bare_client(url, bodies, 10 * PROBLEMS, args.in_flight))  # the server learns its answers
        rate(url, 10 * PROBLEMS)
        for repeat in shown(range(args.repeats), "repeat"):
            asyncio.run(bare_client(url, bodies, calls, args.in_flight))
            rates["bare"].append(rate(url, calls))
            if curate(source, folder / f"out-{repeat}", url, args).wait():
                raise SystemExit("the curator failed")
            rates["curator"].append(rate(url, calls))
    finally:
        server.kill()
    ratios = [ours / bare for ours, bare in zip(rates["curator"], rates["bare"], strict=True)]
    return {
        "calls": calls,
        "possible": args.in_flight / args.delay,
        **{f"{name}_calls_per_s": [round(each, 1) for each in found] for name, found in rates.items()},
        "ratios": [round(each, 3) for each in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "goal": GOAL,
    }


def request_bodies(source: Path) -> list[bytes]:
    """Return the requests that the curator makes for each problem, one for each stage."""
    bodies = []
    with source.open() as file:
        rows = [json.loads(next(file)) for _ in range(PROBLEMS)]
    for row in rows:
        draft = Draft.begin(Trace(1, "1", row["prompt"], row["reasoning"]), Limits())
        target = parse_document(document(parse_problem(row["prompt"])))
        for stage in STAGES:
            body: dict[str, Any] = {"model": "rule", "messages": write_messages(stage, draft), "temperature": 0.6}
            schema = {"name": stage.name, "strict": True, "schema": schema_of(stage.form)}
            body |= {"seed": 0, "response_format": {"type": "json_schema", "json_schema": schema}}
            bodies.append(json.dumps(body).encode())
            said = rule_server.answer(stage.name, target, [each.strip() for each in draft.sentences])
            draft = stage.check(draft, stage.form.model_validate(said))
    return bodies


async def bare_client(url: str, bodies: list[bytes], calls: int, in_flight: int) -> None:
    """Make calls and read their answers, and nothing else."""
    numbers = iter(range(calls))
    connector = aiohttp.TCPConnector(limit=in_flight)

    async def work(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with session.post(f"{url}/v1/chat/completions", data=bodies[number % len(bodies)]) as response:
                json.loads(await response.read())

    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(work(session) for _ in range(in_flight)))


def rate(url: str, calls: int) -> float:
    """Return the answers a second in the middle of those since the server was last asked; check that all were made."""
    with urllib.request.urlopen(f"{url}/times", timeout=60) as response:
        times = sorted(json.load(response))
    if len(times) != calls:
        raise SystemExit(f"the server gave {len(times)} answers, not {calls}: both sides have to do the same work")
    first, last = len(times) // 10, len(times) - len(times) // 10 - 1
    return (last - first) / (times[last] - times[first])


# Memory


def measure_memory(folder: Path, args: Any) -> list[dict[str, int]]:
    """Return the most memory the process took until 500 rows were done, by the number of rows that waited."""
    found = []
    server, url = start_server(0.0)
    args.tasks = 1  # which this process then does itself
    try:
        for queued in shown(args.queued, "size"):
            source, output = folder / f"queued-{queued}.jsonl", folder / f"memory-{queued}"
            write_traces(source, queued, args.seed)
            process = curate(source, output, url, args)
            part = CurationFolder(output, 1).unfinished(0)
            while (done := count_lines(part)[0]) < 500 and process.poll() is None:
                time.sleep(0.05)
            status = Path(f"/proc/{process.pid}/status").read_text()
            process.kill()
            process.wait()
            peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            found.append({"queued": queued, "done": done, "peak_bytes": peak})
            source.unlink()
    finally:
        server.kill()
    return found


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    throughput = result["throughput"]
    show_environment(result)
    print(f"load {result['load_average_after']} at the end of the timing, which is itself part of it")
    for name in ("bare", "curator"):
        print(f"{name:8} {throughput[f'{name}_calls_per_s']} calls/s of {throughput['possible']:.0f} possible")
    reached = "reached" if throughput["ratio"] >= GOAL else "missed"
    print(f"ratio {throughput['ratio']}, of {throughput['ratios']}; the goal of {GOAL} is {reached}")
    for each in result["memory"]:
        print(f"{each['queued']:7} rows queued: {each['peak_bytes'] / 2**20:.1f} MiB at {each['done']} rows done")


if __name__ == "__main__":
    main()
