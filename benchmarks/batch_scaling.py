"""Speedup of parallel over autoregressive writing against the batch size, at a fixed length.

A model with random weights writes answers of as many tokens to 1, 2, 4, ... 128 prompts at once, on the same engine:

- parallel: each on 8 paths (``--paths``), written at the same time.
- autoregressive: ``structure="off"``.

The sides take turns. The speedup is the ratio of their median times from the first token chosen; all prompts are read
in one pass before it, and the result holds the ratio with that pass as well. The speedup stays as long as a step is
bound by reading the weights (Multiverse, section on efficiency): a step of the parallel side has 8 times as many
tokens, so it comes to be bound by computing at a smaller batch. Blocks are forced as in latency_vs_parallelism.py.

    python benchmarks/batch_scaling.py
    python benchmarks/batch_scaling.py --batch 1 4 --tokens 128 --paths 4 --repeats 1 --plot batch.png
    python benchmarks/batch_scaling.py --geometry qwen2.5-7b --device cuda --plot batch.png
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from geometry import (
    Load,
    add_model_arguments,
    count_parameters,
    describe_model,
    make_config,
    make_model,
    peak_memory,
    plan_cache,
)
from plots import make_axes, plot_file, save
from report import announce, count, environment, finish, make_parser, seconds_of_passes, show, show_environment, spread
from tqdm import tqdm
from workload import Answer, Run, make_goal, make_prompts, make_tags, plan_answer, write

from multiverse_hf.evaluation.experiments.timing import in_turns
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

TOKENS = {"cpu": 256, "cuda": 4096}
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 16, 32, 64, 128]}
SIDES = ("parallel", "autoregressive")
WARM_UP = 16  # tokens a path


def measure(
    engine: MultiverseEngine, tags: TagSet, answers: dict[str, Answer], args: argparse.Namespace
) -> dict[int, dict[str, list[Run]]]:
    """Have both sides write answers in turns; return their runs by batch size."""
    paths = args.paths
    vocab_size, end = engine.model.config.vocab_size, make_goal(tags, paths)[:-1]
    short = {1: plan_answer(tags, WARM_UP, 1), paths: plan_answer(tags, WARM_UP * (paths + 1), paths)}
    runs: dict[int, dict[str, list[Run]]] = {batch: {side: [] for side in SIDES} for batch in args.batch}
    with tqdm(total=len(runs) * len(SIDES) * (1 + args.repeats), unit="batch", file=sys.stderr) as bar:
        for batch, of in runs.items():
            prompts = make_prompts(batch, args.prompt, vocab_size, end)
            bar.set_description(f"batch of {batch}, warming up", refresh=False)
            for side in SIDES:
                write(engine, prompts, short[answers[side].num_paths])
                bar.update()
            for side in in_turns(SIDES, args.repeats):
                bar.set_description(f"batch of {batch}, {side}", refresh=False)
                of[side].append(write(engine, prompts, answers[side]))
                bar.update()
    return runs


def summarize(batch: int, num_tokens: int, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return the speeds and the ratio of one batch size."""
    written = batch * (num_tokens - 1)  # the prompts' pass chooses the first
    row: dict[str, Any] = {"batch": batch, "tokens": batch * num_tokens}
    for side, of in runs.items():
        row[side] = {
            "parallelism": round(of[0].stats.parallelism, 4),
            "forward_passes": of[0].stats.num_steps,
            "seconds": spread([run.seconds for run in of]),
            "tokens_per_s": spread([written / run.seconds for run in of]),
            "prompt_seconds": spread([run.prompt_seconds for run in of]),
        }
    seconds = [[run.seconds for run in runs[side]] for side in SIDES]
    whole = [[run.prompt_seconds + run.seconds for run in runs[side]] for side in SIDES]
    row["speedup"] = _ratio(*seconds)
    row["speedup_of_repeats"] = spread([slow / fast for fast, slow in zip(*seconds, strict=True)])
    row["speedup_with_prompts"] = _ratio(*whole)
    return row


def _ratio(fast: list[float], slow: list[float]) -> float:
    return round(statistics.median(slow) / statistics.median(fast), 3)


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print all batch sizes, for people."""
    print(f"\n{'batch':>6}   {'parallel tok/s':30} {'autoregressive tok/s':30} {'speedup':20} with prompts")
    for row in rows:
        repeats = row["speedup_of_repeats"]
        speedup = f"{row['speedup']:.2f} [{repeats['min']:.2f}, {repeats['max']:.2f}]"
        print(
            f"{row['batch']:6}   {show(row['parallel']['tokens_per_s']):30} "
            f"{show(row['autoregressive']['tokens_per_s']):30} {speedup:20} {row['speedup_with_prompts']:.2f}"
        )


def plot(rows: list[dict[str, Any]], num_tokens: int, num_paths: int, path: Path) -> None:
    """Draw the speedups, the range of their repeats, and # parallel, which they cannot pass by much."""
    figure, axes = make_axes("batch size (answers at once)", "speedup (autoregressive / parallel time)")
    batch, speedup = [row["batch"] for row in rows], [row["speedup"] for row in rows]
    repeats = [row["speedup_of_repeats"] for row in rows]
    # a ratio of medians may lie outside the ratios of single repeats
    below = [max(each - of["min"], 0) for each, of in zip(speedup, repeats, strict=True)]
    above = [max(of["max"] - each, 0) for each, of in zip(speedup, repeats, strict=True)]
    label = f"{num_paths} paths, answers of {num_tokens:,} tokens"
    axes.errorbar(batch, speedup, [below, above], fmt="o-", markersize=4, linewidth=1, capsize=3, label=label)
    parallelism = rows[0]["parallel"]["parallelism"]
    axes.axhline(parallelism, color="gray", linestyle="--", linewidth=1, label=f"# parallel = {parallelism:.1f}")
    axes.axhline(1, color="gray", linestyle=":", linewidth=1, label="no speedup")
    axes.set_xticks(batch)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, path)


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument(
        "--batch",
        type=count,
        nargs="+",
        help="prompts answered at once (default: 1 2 4 8 on a CPU, and 16 32 64 128 as well on a GPU)",
    )
    parser.add_argument(
        "--tokens", type=count, help="tokens of an answer, all paths together (default: 256 on a CPU, 4096 on a GPU)"
    )
    parser.add_argument("--paths", type=count, default=8, help="paths of an answer, 2 or more (default: %(default)s)")
    parser.add_argument("--prompt", type=count, default=64, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--plot", type=plot_file, default=None, help="also draw the speedups to this PNG file")
    args = parser.parse_args()
    if args.paths < 2:
        parser.error(f"--paths must be at least 2 to write in parallel, got {args.paths}")
    if args.threads is not None:
        set_threads(args.threads)
    args.batch = sorted(set(args.batch or BATCHES[args.device.type]))
    num_tokens = args.tokens or TOKENS[args.device.type]

    tags = make_tags(newlines=False)
    try:
        answers = {
            "parallel": plan_answer(tags, num_tokens, args.paths),
            "autoregressive": plan_answer(tags, num_tokens, 1),
        }
        make_prompts(1, args.prompt, make_config(args.geometry).vocab_size, make_goal(tags, args.paths)[:-1])
        num_parameters = count_parameters(args.geometry, tags)
        load = Load(args.batch[-1], args.paths, args.prompt, num_tokens)
        cache_tokens = plan_cache(args.geometry, args.device, num_parameters, load)
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "batch_scaling", **environment(args.device)}
    show_environment(result)
    print(
        f"random {args.geometry}, {num_parameters / 1e9:.2f} B parameters, bfloat16, prompts of {args.prompt} tokens, "
        f"answers of {num_tokens}"
    )
    model = make_model(args.geometry, args.device, tags, args.seed)
    result |= describe_model(args.geometry, model, num_parameters)
    result |= {"prompt_tokens": args.prompt, "answer_tokens": num_tokens, "paths": args.paths}
    result |= {"repeats": args.repeats, "cache_tokens": cache_tokens}
    passes = [
        (args.repeats * answer.length, args.repeats * batch * (args.prompt + answer.num_tokens))
        for batch in args.batch
        for answer in answers.values()
    ]
    announce(seconds_of_passes(model, passes))
    most = args.batch[-1]
    # all prompts of a batch in one pass, so that its answers begin together
    with MultiverseEngine(
        model, max_num_seqs=most, max_cache_tokens=cache_tokens, prefill_chunk=most * args.prompt
    ) as engine:
        runs = measure(engine, tags, answers, args)
    result["results"] = [summarize(batch, num_tokens, of) for batch, of in runs.items()]
    result["peak_memory_bytes"] = peak_memory(args.device)
    print_results(result["results"])
    if args.plot is not None:
        plot(result["results"], num_tokens, args.paths, args.plot)
    finish(result, args.output)


if __name__ == "__main__":
    main()
