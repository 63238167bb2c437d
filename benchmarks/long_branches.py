"""What long branches cost: a step of p paths against the step of a lone branch that sees as much.

Each path adds its own keys to the log, and no other path sees them; a step that met them only to mask them would cost
the square of the paths. So a model with random weights writes two answers to one prompt: one of p paths of n tokens,
and one of n tokens without a block, ordinary autoregressive writing. After the prompt, two engines take their steps in
turns, in one process and on the same weights, and a step is compared with the step of the other that came next to it:
machines vary by more than what is looked for. All branches see the prompt and what they wrote themselves.

Given are the times of a step along the answers, and the ratio over the last steps of the paths: the median of the
ratios of single steps. Mean times include what comes now and then, such as copying keys.

    python benchmarks/long_branches.py
    python benchmarks/long_branches.py --paths 2 8 --path-tokens 512 --repeats 1 --plot long_branches.png
    python benchmarks/long_branches.py --geometry qwen2.5-7b --device cuda --path-tokens 8192
"""

import argparse
import itertools
import statistics
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
from report import (
    announce,
    count,
    environment,
    finish,
    make_parser,
    seconds_of_passes,
    show,
    show_environment,
    spread,
    store,
)
from tqdm import tqdm
from workload import make_goal, make_prompts, make_tags, plan_block, steps_in_turns

from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

LAST = 64  # steps that are called the last ones
WINDOWS = 16  # along the answers


def measure(
    model: Any, tags: TagSet, num_paths: int, cache_tokens: int, args: argparse.Namespace
) -> list[list[tuple[float, float]]]:
    """Write both answers ``--repeats`` times.

    Returns:
        Of each repeat the seconds of each pair of steps while all paths are written: (lone branch, paths).

    Raises:
        RuntimeError: if an answer did not come out as asked.
    """
    goal = make_goal(tags, num_paths)
    prompt = make_prompts(1, args.prompt, make_config(args.geometry).vocab_size, goal[:-1])
    answers = plan_block(tags, 1, args.path_tokens), plan_block(tags, num_paths, args.path_tokens)
    runs = []
    for repeat in range(args.repeats):
        engines, sequences = [], []
        for answer in answers:
            asked = read_requests(model, prompt, None, None, None, 0, answer.options)
            cache = LogCache(model.config.num_hidden_layers, cache_tokens)
            decoding = "static" if args.device.type == "cuda" else "packed"
            engines.append(Engine(model, tags, cache, decoding=decoding))
            sequences.append(engines[-1].add(asked.requests[0]))
        pairs: list[tuple[float, float]] = []
        bar = tqdm(total=args.path_tokens, desc=f"{num_paths} paths, repeat {repeat + 1} of {args.repeats}")
        for seconds in steps_in_turns(engines, args.device):
            bar.update()
            if len(sequences[1].live) == num_paths and sequences[0].live:
                pairs.append((seconds[0], seconds[1]))
        bar.close()
        for answer, sequence, engine in zip(answers, sequences, engines, strict=True):
            answer.check(sequence.stats)
            engine.runner.free()
        runs.append(pairs)
    return runs


def summarize(runs: list[list[tuple[float, float]]], num_paths: int, first: int) -> dict[str, Any]:
    """Give times along the answers, and over the last steps.

    Args:
        runs: of each repeat the seconds of each pair of steps: (lone branch, paths).
        num_paths: paths of the one side.
        first: tokens a branch sees at the first pair.
    """
    steps = len(runs[0])
    bounds = [round(steps * each / WINDOWS) for each in range(WINDOWS + 1)]
    curve = []
    for begin, end in itertools.pairwise(bounds):
        pairs = [pair for run in runs for pair in run[begin:end]]
        lone, paths = zip(*pairs, strict=True)
        curve.append(
            {
                "visible_tokens": first + (begin + end) // 2,
                "lone_ms": {"median": _ms(statistics.median(lone)), "mean": _ms(statistics.mean(lone))},
                "paths_ms": {"median": _ms(statistics.median(paths)), "mean": _ms(statistics.mean(paths))},
                "ratio": round(statistics.median(paths / lone for lone, paths in pairs), 3),
            }
        )
    last = [run[-LAST:] for run in runs]
    every = [pair for run in last for pair in run]
    return {
        "paths": num_paths,
        "steps": steps,
        "visible_tokens": first + steps,
        "lone_ms_of_last_steps": spread([1000 * statistics.median(lone for lone, _ in run) for run in last]),
        "paths_ms_of_last_steps": spread([1000 * statistics.median(paths for _, paths in run) for run in last]),
        "ratio_of_last_steps": round(statistics.median(paths / lone for lone, paths in every), 3),
        "ratio_of_repeats": spread([statistics.median(paths / lone for lone, paths in run) for run in last]),
        "ratio_of_all_steps": spread([sum(p for _, p in run) / sum(lone for lone, _ in run) for run in runs]),
        "curve": curve,
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the times of a step against what a branch sees."""
    figure, axes = make_axes("tokens a branch sees", "time of a step (ms)")
    axes.set_xscale("linear")
    for row in results:
        seen = [point["visible_tokens"] for point in row["curve"]]
        label = f"{row['paths']} paths: {row['ratio_of_last_steps']:.2f} times at the end"
        (line,) = axes.plot(seen, [point["paths_ms"]["median"] for point in row["curve"]], label=label)
        lone = [point["lone_ms"]["median"] for point in row["curve"]]
        axes.plot(seen, lone, color=line.get_color(), linestyle="--", label="lone branch beside it")
    axes.set_ylim(bottom=0)
    axes.legend(title="medians", frameon=False)
    save(figure, path)


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument("--paths", type=count, nargs="+", default=[8], help="paths of the block (default: 8)")
    parser.add_argument("--path-tokens", type=count, default=2048, help="tokens a path (default: %(default)s)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--plot", type=plot_file, default=None, help="also draw times and ratio to this PNG file")
    args = parser.parse_args()
    if min(args.paths) < 2:
        parser.error(f"--paths needs 2 or more, got {min(args.paths)}: a lone branch is the other side")
    if args.threads is not None:
        set_threads(args.threads)

    tags = make_tags(newlines=False)
    try:
        answers = [plan_block(tags, num_paths, args.path_tokens) for num_paths in args.paths]
        make_prompts(1, args.prompt, make_config(args.geometry).vocab_size, make_goal(tags, max(args.paths))[:-1])
        num_parameters = count_parameters(args.geometry, tags)
        most, length = max(answer.num_tokens for answer in answers), max(answer.length for answer in answers)
        load = Load(2, max(args.paths), args.prompt, most, length)
        cache_tokens = plan_cache(args.geometry, args.device, num_parameters, load)
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "long_branches", **environment(args.device)}
    show_environment(result)
    print(f"random {args.geometry}, {num_parameters / 1e9:.2f} B parameters, bfloat16, prompt of {args.prompt} tokens")
    model = make_model(args.geometry, args.device, tags, args.seed)
    result |= describe_model(args.geometry, model, num_parameters)
    result |= {"prompt_tokens": args.prompt, "path_tokens": args.path_tokens, "repeats": args.repeats, "results": []}
    written = [plan_block(tags, 1, args.path_tokens), *answers] * args.repeats
    announce(seconds_of_passes(model, [(each.length, args.prompt + each.num_tokens) for each in written]))
    for num_paths in args.paths:
        runs = measure(model, tags, num_paths, cache_tokens // 2, args)
        row = summarize(runs, num_paths, args.prompt + 1)
        result["results"].append(row)
        store(result, args.output)
        print(f"\n{num_paths} paths of {args.path_tokens} tokens")
        print(f"  {'a branch sees':>13} {'lone branch':>12} {'paths':>10} {'ratio':>6}")
        for point in row["curve"]:
            lone, paths = point["lone_ms"]["median"], point["paths_ms"]["median"]
            print(f"  {point['visible_tokens']:13} {lone:9.1f} ms {paths:7.1f} ms {point['ratio']:6.2f}")
        print(
            f"  last {LAST} steps: {row['ratio_of_last_steps']:.2f} times the lone branch's, by repeat "
            f"{show(row['ratio_of_repeats'])}; all steps together {show(row['ratio_of_all_steps'])}"
        )
    result["peak_memory_bytes"] = peak_memory(args.device)
    if args.plot is not None:
        plot(result["results"], args.plot)
    finish(result, args.output)


if __name__ == "__main__":
    main()
