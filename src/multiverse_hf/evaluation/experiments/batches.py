"""Figure 8b: speedup of parallel writing against the batch size.

The same model and engine answer the same problems in batches of each size, in parallel and with
``structure="off"``, which writes the same documents autoregressively. The speedup is the ratio of seconds per
token, from the first token chosen. It is constant as long as reading the weights bounds a step (paper, section on
efficiency). ``benchmarks/batch_scaling.py`` measures the same with random weights of any size, on blocks of a given
shape.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.evaluation.experiments import paper
from multiverse_hf.evaluation.experiments.subject import Subject, describe, shown
from multiverse_hf.evaluation.experiments.timing import Timed, in_turns
from multiverse_hf.evaluation.figures import log_axis, make_figure, save_figure
from multiverse_hf.evaluation.metrics import parallelism, speedup
from multiverse_hf.evaluation.tasks import SIDES

SIZES = (1, 2, 4, 8, 16)


def measure_batches(subject: Subject, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Answer all problems in batches of each size, on both sides in turns. Every size has the same work.

    A size above the number of problems has one batch, which repeats the problems.
    """
    prompts, rows = subject.prompts(), []
    for size in sizes:
        batches = cut(prompts, size)
        runs: dict[str, list[list[Timed]]] = {side: [] for side in SIDES}
        with subject.engine(max_num_seqs=size) as time_answers:
            time_answers(prompts[:1])
            for side in shown(in_turns(SIDES, repeats), len(SIDES) * repeats, f"batch {size}"):
                runs[side].append([time_answers(batch, structure=side.structure) for batch in batches])
        rows.append({"batch": size, "batches": len(batches)} | _summarize_size(runs))
    return describe(subject, "batch") | {"repeats": repeats, "rows": rows}


def cut(prompts: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Return prompts in batches of one size, without an incomplete last batch."""
    if size > len(prompts):
        return [[prompts[number % len(prompts)] for number in range(size)]]
    return [list(prompts[begin : begin + size]) for begin in range(0, len(prompts) - size + 1, size)]


def _summarize_size(runs: Mapping[str, Sequence[Sequence[Timed]]]) -> dict[str, Any]:
    """Return speeds of both sides, and their ratio."""

    def total(of: Sequence[Timed], name: str) -> float:
        return sum(getattr(timed, name) for timed in of)

    per_token = {
        side: [total(of, "seconds") / total(of, "num_tokens") for of in turns] for side, turns in runs.items()
    }
    ratios = [
        speedup(slow, fast) for slow, fast in zip(per_token["autoregressive"], per_token["parallel"], strict=True)
    ]
    first = {side: turns[0] for side, turns in runs.items()}
    answers = {side: [result for timed in of for result in timed.results] for side, of in first.items()}
    return {
        "answers": len(answers["parallel"]),
        "parallelism": round(
            parallelism(total(first["parallel"], "num_tokens"), total(first["parallel"], "length")), 4
        ),
        "same_documents": sum(one.ids == other.ids for one, other in zip(*answers.values(), strict=True)),
        "ms_per_token": {side: round(1000 * statistics.median(of), 4) for side, of in per_token.items()},
        "tokens": {side: total(of, "num_tokens") for side, of in first.items()},
        "seconds": {
            side: round(statistics.median(total(of, "prompt_seconds") + total(of, "seconds") for of in turns), 4)
            for side, turns in runs.items()
        },
        "speedup": round(speedup(*(statistics.median(per_token[side]) for side in ("autoregressive", "parallel"))), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
    }


def summarize(result: Mapping[str, Any]) -> list[str]:
    """Return the results in lines for people."""
    lines = [
        f"batch {row['batch']:3}: {row['speedup']:.2f} times as fast per token [{row['min']:.2f}, {row['max']:.2f}], "
        f"# parallel {row['parallelism']:.2f}; {row['answers']} answers in {row['seconds']['parallel']:.1f} s, "
        f"autoregressive in {row['seconds']['autoregressive']:.1f} s, {row['same_documents']} of them the same"
        for row in result["rows"]
    ]
    return [*lines, f"the paper's engine: about the same at batch {paper.BATCH_SIZES[0]} to {paper.BATCH_SIZES[1]}"]


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw the speedups with the range of their repeats, and # parallel as their limit."""
    figure, (axes,) = make_figure()
    rows = result["rows"]
    sizes, values = [row["batch"] for row in rows], [row["speedup"] for row in rows]
    # a ratio of medians may be outside the range of single repeats
    below = [max(row["speedup"] - row["min"], 0) for row in rows]
    above = [max(row["max"] - row["speedup"], 0) for row in rows]
    name = f"{result['model']['name']}, {result['task']}"
    axes.errorbar(sizes, values, [below, above], fmt="o-", capsize=3, linewidth=1, color="#2b6cb0", label=name)
    axes.plot(sizes, [row["parallelism"] for row in rows], "--", color="gray", label="# parallel of the answers")
    axes.axhline(1, color="gray", linestyle=":", label="no speedup")
    low, high = paper.BATCH_SIZES
    axes.plot([], [], " ", label=f"paper, 32B: flat from batch {low} to {high}")
    log_axis(axes, sizes)
    axes.set(xlabel="batch size", ylabel="speedup per token")
    axes.set_ylim(0, 1.4 * max(row["max"] for row in rows))  # room for the legend
    axes.legend(frameon=False, fontsize="small", loc="upper right")
    save_figure(figure, path)
