"""Throughput of `multiverse serve` against the engine alone, and against `transformers serve`.

So many clients each ask one question after the other, greedy and streamed. The sides take turns:

- server: `multiverse serve` in a process of its own, asked by OpenAI's asynchronous client.
- engine: ``MultiverseEngine`` in this process, with as many requests on their way, and no HTTP.
- transformers: `transformers serve` of the same checkpoint, with ``--transformers``.

Prints for each side and number of clients tokens a second, and of the servers the time to the first token and between
chunks. All sides answer the same prompts; the benchmark ends with an error if their answers differ in length.

    python benchmarks/serving.py
    python benchmarks/serving.py --clients 1 8 32 --requests 4 --transformers --repeats 3
"""

import asyncio
import contextlib
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import AsyncOpenAI
from report import announce, count, environment, finish, make_parser, show, show_environment, shown, spread, store

from multiverse_hf import MultiverseEngine, embedded_model
from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX
from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.modeling.threads import set_threads

START_S = 300  # for a server to be ready


def make_prompts(number: int, seed: int) -> list[str]:
    """Return sums of chains, which the embedded model solves in parallel."""
    draw = random.Random(seed)
    prompts = []
    for _ in range(number):
        chains = ["+".join(str(draw.randint(1, 19)) for _ in range(3)) for _ in range(draw.randint(2, 5))]
        named = "; ".join(f"{name}={chain}" for name, chain in zip("ABCDE", chains, strict=False))
        prompts.append(f"{named}; total? {PARALLEL_SUFFIX}")
    return prompts


@contextlib.contextmanager
def run_server(command: list[str], port: int) -> Iterator[str]:
    """Run a server, and yield its address once it is ready.

    Raises:
        CommandError: if it ends, or is not ready in time.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_S
            path = "ready" if "multiverse_hf.cli" in command else "health"
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5).close()
                    break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise CommandError(f"{' '.join(command[1:4])} does not start: {last}", FAILURE)
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


async def ask_server(url: str, model: str, prompts: list[str], clients: int, most: int) -> dict[str, Any]:
    """Ask a server all prompts, ``clients`` at a time, and time it."""
    left, first, between, counts = list(enumerate(prompts)), [], [], {}

    async def work(client: AsyncOpenAI) -> None:
        while left:
            number, prompt = left.pop(0)
            begun = last = time.perf_counter()
            stream = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=most,
                stream=True, **({} if "/" in model else {"stream_options": {"include_usage": True}}),
            )  # fmt: skip
            has_begun = False
            async for chunk in stream:
                if chunk.usage is not None:
                    counts[number] = chunk.usage.completion_tokens
                delta = chunk.choices[0].delta if chunk.choices else None
                if delta is None or not (delta.content or getattr(delta, "reasoning_content", None)):
                    continue
                now = time.perf_counter()
                (between if has_begun else first).append(now - (last if has_begun else begun))
                has_begun, last = True, now

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": counts, "first": first, "between": between}


def ask_engine(engine: MultiverseEngine, prompts: list[str], clients: int, most: int) -> dict[str, Any]:
    """Ask the engine all prompts, ``clients`` at a time, and time it."""

    def work(prompt: str) -> int:
        handle = engine.submit(prompt, do_sample=False, max_new_tokens=most, max_total_tokens=most)
        return handle.result().stats.num_tokens

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        counts = list(pool.map(work, prompts))
    return {"seconds": time.perf_counter() - begun, "tokens": dict(enumerate(counts))}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return tokens a second of each side, the server's share of the engine's, and times of the servers.

    Raises:
        CommandError: if sides that hold the same limits wrote different numbers of tokens.
    """
    result: dict[str, Any] = {}
    for name, side in runs.items():
        if side[0]["tokens"] != runs["engine"][0]["tokens"]:
            raise CommandError(f"{name} and the engine did not write the same numbers of tokens", FAILURE)
        result[name] = {"tokens_per_second": spread([sum(run["tokens"].values()) / run["seconds"] for run in side])}
        if "first" in side[0]:
            for key in ("first", "between"):
                values = sorted(value for run in side for value in run[key])
                last = values[min(len(values) - 1, round(0.99 * len(values)))]
                result[name][key] = {"median": round(statistics.median(values), 5), "p99": round(last, 5)}
        if name != "server":
            pairs = zip(side, runs["server"], strict=True)
            result[name]["server_is_faster_by"] = spread([own["seconds"] / server["seconds"] for own, server in pairs])
    return result


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--model", default=None, help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--clients", type=count, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--requests", type=count, default=2, help="of each client (default: %(default)s)")
    parser.add_argument("--max-tokens", type=count, default=600, help="of an answer (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--transformers", action="store_true", help="measure transformers serve, too")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        checkpoint = open_checkpoint(args.model)
        model = load_model(checkpoint, Dtype(args.dtype), Attention.SDPA, "cpu", args.threads)
        folder, name = str(args.model or embedded_model()), re.sub(r".*/", "", checkpoint.name)
        result = {"benchmark": "serving", **environment(), "dtype": args.dtype, "results": []}
        show_environment(result)
        with contextlib.ExitStack() as stack:
            port = free_port()
            threads = [] if args.threads is None else ["--threads", str(args.threads)]
            own = [sys.executable, "-m", "multiverse_hf.cli", "serve", folder, "--port", str(port), *threads]
            urls = {"server": (stack.enter_context(run_server([*own, "--dtype", args.dtype], port)), name)}
            if args.transformers:
                port = free_port()
                theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--port", str(port)]
                theirs += ["--trust-remote-code", "--host", "127.0.0.1", "--dtype", args.dtype]
                urls["transformers"] = stack.enter_context(run_server(theirs, port)), folder
            if args.threads is not None:
                set_threads(args.threads)
            engine = stack.enter_context(MultiverseEngine(model, checkpoint.tokenizer))

            def side(name: str) -> Callable[[list[str], int], dict[str, Any]]:
                if name == "engine":
                    return lambda prompts, clients: ask_engine(engine, prompts, clients, args.max_tokens)
                return lambda prompts, clients: asyncio.run(ask_server(*urls[name], prompts, clients, args.max_tokens))

            names = [*urls, "engine"]
            warm = [side(each)(make_prompts(1, args.seed), 1)["seconds"] for each in names]
            announce(sum(warm) * args.requests * sum(args.clients) * args.repeats / 2)
            for clients in args.clients:
                runs: dict[str, list[dict[str, Any]]] = {each: [] for each in names}
                for repeat in shown(range(args.repeats), f"turn of {clients} clients"):
                    prompts = make_prompts(clients * args.requests, args.seed + clients)
                    for each in names[repeat % len(names) :] + names[: repeat % len(names)]:
                        runs[each].append(side(each)(prompts, clients))
                summary = summarize(runs)
                result["results"].append({"clients": clients, **summary})
                store(result, args.output)
                print(f"\n{clients} clients, {clients * args.requests} requests")
                for each, values in summary.items():
                    line = f"{each:14}{show(values['tokens_per_second'], ' tokens/s'):38}"
                    if "first" in values:
                        first, gap = values["first"], values["between"]
                        line += f"first {first['median']:.3f} s (p99 {first['p99']:.3f}), "
                        line += f"between {1000 * gap['median']:.1f} ms (p99 {1000 * gap['p99']:.1f})"
                    if "server_is_faster_by" in values:
                        line += f"  server is faster by {show(values['server_is_faster_by'])}"
                    print(line)
    except CommandError as err:
        parser.exit(err.code, f"error: {err}\n")
    finish(result, args.output)


if __name__ == "__main__":
    main()
