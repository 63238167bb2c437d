"""Latency per token against # parallel, and how much of it parallelism does not divide.

A model with random weights writes answers of a given number of tokens, all paths together, on 1, 2, 4, ... paths.
For each number of tokens the medians are fitted with y = a/x + b (Multiverse, section on efficiency): y is the latency
per token, x the # parallel, tokens over critical path, as measured. b is what every token costs however many are
written at once, and b/(a+b) its share of the latency at x = 1.

One path means ordinary autoregressive writing (``structure="off"``) on the same engine and weights: what a user would
have instead, without the tokens and the bookkeeping of a block. Latency counts from the first token chosen, as
# parallel leaves out the prompt. Each block is what the engine's own limits make of it: the prompt ends with the
outlines, the model can write nothing but ``</Goal>``, each path ends at max_path_tokens, and the conclusion, which
takes the tokens that the paths leave over, at max_new_tokens.

The share b/(a+b) is given four times:

- of the medians of all repeats: the figure to quote.
- of the least times: other work on the machine adds to some points and not to others, and lies least in these.
- of the weights' products alone: the linear layers of the model by themselves, for as many rows as each pass has,
  timed in the same process. What of b is here no engine can avoid on this device.
- of the medians, on tokens per forward pass in place of # parallel. The engine writes the start and the end of a path
  itself, in no pass of their own. Where paths are short these tokens are many, latency falls faster than # parallel
  rises, and b comes out too small, even negative. Such tokens gain nothing here.

    python benchmarks/latency_vs_parallelism.py
    python benchmarks/latency_vs_parallelism.py --lengths 512 --paths 1 4 16 --repeats 1 --plot latency.png
    python benchmarks/latency_vs_parallelism.py --geometry qwen2.5-7b --device cuda --plot latency.png
    python benchmarks/latency_vs_parallelism.py --geometry qwen2.5-32b --device cuda --lengths 8192 --paths 1 2 4 8 16
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from multiverse_hf.evaluation.experiments.latency import fit
from multiverse_hf.evaluation.experiments.paper import LATENCY_SHARES
from multiverse_hf.evaluation.experiments.timing import in_turns
from multiverse_hf.modeling.cpu import packed_weights, using
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

LENGTHS = {"cpu": [512, 1024, 2048], "cuda": [8192, 16_384, 32_768]}
WARM_UP = 16  # tokens a path


def measure(
    engine: MultiverseEngine, tags: TagSet, answers: list[list[Answer]], args: argparse.Namespace
) -> list[list[list[Run]]]:
    """Have the answers of each length written in turns; return the runs of each answer."""
    vocab_size = engine.model.config.vocab_size

    def run(answer: Answer) -> Run:
        end = make_goal(tags, answer.num_paths)[:-1] if answer.num_paths > 1 else []
        return write(engine, make_prompts(1, args.prompt, vocab_size, end), answer)

    total = len(answers[0]) * (1 + args.repeats * len(answers))
    with tqdm(total=total, unit="answer", file=sys.stderr) as bar:
        for answer in answers[0]:
            bar.set_description("warming up", refresh=False)
            run(plan_answer(tags, WARM_UP * (answer.num_paths + 1), answer.num_paths))
            bar.update()
        runs: list[list[list[Run]]] = []
        for same_length in answers:
            runs.append([[] for _ in same_length])
            for number in in_turns(range(len(same_length)), args.repeats):
                answer = same_length[number]
                bar.set_description(f"{answer.num_tokens} tokens, {answer.num_paths} paths", refresh=False)
                runs[-1][number].append(run(answer))
                bar.update()
    return runs


def time_products(model: Any, rows: list[int], is_packed: bool, repeats: int) -> dict[int, list[float]]:
    """Time one pass through all linear layers and nothing else, for each number of rows, in turns; in seconds."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    sizes = {layer.in_features for layer in layers}
    inputs = {
        (number, size): torch.randn(1, number, size, dtype=model.dtype, device=model.device)
        for number in rows
        for size in sizes
    }

    def finish_device() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    def run(number: int) -> float:
        finish_device()
        begin = time.perf_counter()
        for layer in layers:
            layer(inputs[number, layer.in_features])
        finish_device()
        return time.perf_counter() - begin

    with torch.no_grad(), using(packed_weights(model) if is_packed else []):
        for number in rows:
            run(number)
        seconds: dict[int, list[float]] = {number: [] for number in rows}
        for number in in_turns(rows, 10 * repeats):
            seconds[number].append(run(number))
    return seconds


def summarize(answers: list[Answer], runs: list[list[Run]], products: dict[int, list[float]]) -> dict[str, Any]:
    """Return the points and the curve of one length."""
    # the first token is chosen by the prompt's pass, so one less is written in the time that counts
    written = answers[0].num_tokens - 1
    latency = [[1000 * run.seconds / written for run in of] for of in runs]
    parallelism = [of[0].stats.parallelism for of in runs]
    per_pass = [written / of[0].stats.num_steps for of in runs]
    alone = [1000 * statistics.median(products[answer.num_paths]) for answer in answers]
    points = [
        {
            "paths": answer.num_paths,
            "parallelism": round(x, 4),
            "tokens_per_pass": round(tokens, 4),
            "length": answer.length,
            "forward_passes": of[0].stats.num_steps,
            "sampled_tokens": of[0].num_sampled,
            "ms_per_token": spread(y),
            "prompt_seconds": spread([run.prompt_seconds for run in of]),
            "ms_of_products": round(each, 4),
        }
        for answer, of, x, tokens, y, each in zip(answers, runs, parallelism, per_pass, latency, alone, strict=True)
    ]
    medians, least = [statistics.median(y) for y in latency], [min(y) for y in latency]
    shares = [fit(parallelism, list(repeat)).share_percent for repeat in zip(*latency, strict=True)]
    return {
        "tokens": answers[0].num_tokens,
        "points": points,
        "fit": fit(parallelism, medians).to_dict(),
        "share_percent_of_repeats": spread(shares),
        "fit_of_least": fit(parallelism, least).to_dict(),
        "fit_on_tokens_per_pass": fit(per_pass, medians).to_dict(),
        "fit_of_products": fit(
            parallelism, [each / tokens for each, tokens in zip(alone, per_pass, strict=True)]
        ).to_dict(),
        "share_percent_of_paper": LATENCY_SHARES.get(answers[0].num_tokens),
    }


def print_results(results: list[dict[str, Any]]) -> None:
    """Print points and curves, for people."""
    print(f"\n{'tokens':>7} {'paths':>6} {'# parallel':>11} {'passes':>7}   ms per token [least, greatest]")
    for row in results:
        for point in row["points"]:
            print(
                f"{row['tokens']:7} {point['paths']:6} {point['parallelism']:11.2f} {point['forward_passes']:7}   "
                f"{show(point['ms_per_token'])}"
            )
    print(
        "\ny = a/x + b by least squares, and b/(a+b): of medians [single repeats], of least times, by passes, of the "
        "weights' products alone, paper's"
    )
    print(
        f"{'tokens':>7} {'a (ms)':>9} {'b (ms)':>9} {'R²':>8} {'farthest':>9}   {'b/(a+b)':25} {'least':>8} "
        f"{'passes':>8} {'products':>10} {'paper':>8}"
    )
    for row in results:
        curve, repeats, paper = row["fit"], row["share_percent_of_repeats"], row["share_percent_of_paper"]
        share = f"{curve['share_percent']:.2f} % [{repeats['min']:.2f}, {repeats['max']:.2f}]"
        names = ("fit_of_least", "fit_on_tokens_per_pass", "fit_of_products")
        others = [row[name]["share_percent"] for name in names]
        print(
            f"{row['tokens']:7} {curve['a_ms']:9.4g} {curve['b_ms']:9.3g} {curve['r_squared']:8.5f} "
            f"{curve['residual_percent']:7.1f} %   {share:25} {others[0]:6.2f} % {others[1]:6.2f} % "
            f"{others[2]:8.2f} % "
            f"{'-' if paper is None else f'{paper} %':>8}"
        )
    shares = " and ".join(f"{share} % at {tokens // 1024}k" for tokens, share in LATENCY_SHARES.items())
    lengths = ", ".join(str(row["tokens"]) for row in results)
    print(
        f"The paper's engine has b/(a+b) = {shares} tokens, with another model on other hardware; here it is at "
        f"{lengths} tokens. The share grows with the length: only equal lengths compare."
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the points, the range of their repeats, and the curves."""
    figure, axes = make_axes("# parallel (tokens / critical path)", "latency per token (ms)")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    for row in results:
        x = np.array([point["parallelism"] for point in row["points"]])
        y = [point["ms_per_token"] for point in row["points"]]
        middle = np.array([each["median"] for each in y])
        bars = [middle - [each["min"] for each in y], [each["max"] for each in y] - middle]
        label = f"{row['tokens']:,} tokens: b/(a+b) = {row['fit']['share_percent']:.1f} %"
        container = axes.errorbar(x, middle, bars, fmt="o", markersize=4, capsize=3, label=label)
        along = np.geomspace(x.min(), x.max(), 200)
        curve = row["fit"]["a_ms"] / along + row["fit"]["b_ms"]
        axes.plot(along, curve, linewidth=1, color=container.lines[0].get_color())
    axes.legend(title="median, least and greatest; y = a/x + b", frameon=False)
    save(figure, path)


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths",
        type=count,
        nargs="+",
        help="tokens of an answer, all paths together (default: 512 1024 2048 on a CPU, 8192 16384 32768 on a GPU)",
    )
    parser.add_argument(
        "--paths",
        type=count,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="paths of the block; 1 is ordinary autoregressive writing (default: 1 2 4 8 16 32)",
    )
    parser.add_argument("--prompt", type=count, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--plot", type=plot_file, default=None, help="also draw points and curves to this PNG file")
    args = parser.parse_args()
    lengths, paths = sorted(set(args.lengths or LENGTHS[args.device.type])), sorted(set(args.paths))
    if len(paths) < 2:
        parser.error(f"--paths needs at least two different numbers to fit a curve to, got {args.paths}")
    if args.threads is not None:
        set_threads(args.threads)

    tags = make_tags(newlines=False)
    try:
        answers = [[plan_answer(tags, tokens, num_paths) for num_paths in paths] for tokens in lengths]
        make_prompts(1, args.prompt, make_config(args.geometry).vocab_size, make_goal(tags, paths[-1])[:-1])
        num_parameters = count_parameters(args.geometry, tags)
        load = Load(1, paths[-1], args.prompt, lengths[-1])
        cache_tokens = plan_cache(args.geometry, args.device, num_parameters, load)
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "latency_vs_parallelism", **environment(args.device)}
    show_environment(result)
    print(f"random {args.geometry}, {num_parameters / 1e9:.2f} B parameters, bfloat16, prompt of {args.prompt} tokens")
    model = make_model(args.geometry, args.device, tags, args.seed)
    result |= describe_model(args.geometry, model, num_parameters)
    result |= {"prompt_tokens": args.prompt, "repeats": args.repeats, "cache_tokens": cache_tokens}
    written = [answer for same_length in answers for answer in same_length] * args.repeats
    announce(seconds_of_passes(model, [(answer.length, args.prompt + answer.num_tokens) for answer in written]))
    with MultiverseEngine(model, max_cache_tokens=cache_tokens) as engine:
        runs = measure(engine, tags, answers, args)
    products = time_products(model, paths, engine.pack_weights, args.repeats)
    result["results"] = [summarize(*each, products) for each in zip(answers, runs, strict=True)]
    result["peak_memory_bytes"] = peak_memory(args.device)
    print_results(result["results"])
    if args.plot is not None:
        plot(result["results"], args.plot)
    finish(result, args.output)


if __name__ == "__main__":
    main()
