"""Figure 7: accuracy against the length budget, the parallel model and its autoregressive twin, on the same problems.

A budget is a value of ``max_new_tokens``: positions past the prompt, and so the time of an answer, not the tokens of
all its paths. An answer that does not fit is cut off and wrong. Every point is a separate run.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.compare import compare_runs
from multiverse_hf.evaluation.experiments import paper
from multiverse_hf.evaluation.figures import error_bars, log_axis, make_figure, save_figure
from multiverse_hf.evaluation.report import show
from multiverse_hf.evaluation.settings import Evaluate, Evaluation
from multiverse_hf.evaluation.tasks import SIDES

BUDGETS = (128, 192, 256, 320, 384, 512, 768, 1024, 1536)


def measure_budgets(
    evaluation: Evaluation, autoregressive: str, budgets: Sequence[int], output: Path, evaluate: Evaluate
) -> dict[str, Any]:
    """Run both models at every budget, each in its folder. Finished runs are kept.

    Args:
        evaluation: settings of the parallel model, with one task.
        autoregressive: the other model.
        budgets: values of ``max_new_tokens``.
        output: folder of the runs.
        evaluate: runs an evaluation in a folder and returns its results.

    Raises:
        CommandError: if there is more than one task, or a run fails.
    """
    if len(evaluation.tasks) != 1:
        raise CommandError(f"a budget curve is of one task, got {', '.join(evaluation.tasks)}; name one")
    models = dict(zip(SIDES, (evaluation.model, autoregressive), strict=True))
    task, rows, runs = evaluation.read_tasks()[0].name, [], {}
    for budget in sorted(set(budgets)):
        row: dict[str, Any] = {"budget": budget}
        for side in SIDES:
            folder = output / f"{side}-{budget}"
            asked = replace(evaluation, model=models[side], mode=side, max_new_tokens=budget)
            runs[side] = evaluate(asked, folder)
            metrics = runs[side]["tasks"][task]["metrics"]
            row[side] = {name: metrics[name] for name in ("pass@1", "parallelism", "length", "tokens", "finished")}
        compared = compare_runs(output / f"autoregressive-{budget}", output / f"parallel-{budget}")["tasks"][task]
        row["difference"] = compared["differences"]["pass@1"]
        rows.append(row)
    head = runs["parallel"]
    return {
        "schema": 1,
        "experiment": "budget",
        "models": {side: run["model"] for side, run in runs.items()},
        "task": task,
        "problems": head["tasks"][task]["problems"],
        "fingerprint": head["tasks"][task]["fingerprint"],
        "n": head["n"],
        "sampling": {name: value for name, value in head["sampling"].items() if name != "max_new_tokens"},
        "rows": rows,
        "paper": {"gains": paper.BUDGET_GAINS, "mean_gain": paper.MEAN_BUDGET_GAIN, "budgets": [1024, 4096]},
        **{name: head[name] for name in ("versions", "hardware", "commit")},
    }


def rising_part(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the budgets of the rising part: those from which either model gains by the next budget, and that one."""
    rising: set[int] = set()
    for row, following in itertools.pairwise(rows):
        if any(following[side]["pass@1"]["value"] > row[side]["pass@1"]["value"] for side in SIDES):
            rising |= {row["budget"], following["budget"]}
    return sorted(rising)


def summarize(result: Mapping[str, Any]) -> list[str]:
    """Return the results in lines for people."""
    lines = [
        f"length {row['budget']:5}: parallel {show('pass@1', row['parallel']['pass@1'])}, autoregressive "
        f"{show('pass@1', row['autoregressive']['pass@1'])}, difference {100 * row['difference']['value']:+.1f} "
        f"[{100 * row['difference']['low']:+.1f}, {100 * row['difference']['high']:+.1f}]"
        for row in result["rows"]
    ]
    rising = set(rising_part(result["rows"]))
    gains = [100 * row["difference"]["value"] for row in result["rows"] if row["budget"] in rising]
    if gains:
        lines.append(
            f"rising part, {min(rising)} to {max(rising)}: {sum(gains) / len(gains):+.1f} points on average, "
            f"least {min(gains):+.1f}"
        )
    return [*lines, f"the paper, 32B, 1k to 4k: {paper.MEAN_BUDGET_GAIN:+} points on average"]


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw both curves with their intervals, and the paired difference with the paper's mean gain."""
    figure, (curves, differences) = make_figure(2, width=10.5)
    rows = result["rows"]
    budgets = [row["budget"] for row in rows]
    # the second line is dashed with hollow marks, so that an equal first line shows through
    styles = {"parallel": ("o-", "#2b6cb0", {}), "autoregressive": ("s--", "#c05621", {"markerfacecolor": "none"})}
    for side, (style, color, face) in styles.items():
        of = [row[side]["pass@1"] for row in rows]
        low, middle, high = ([100 * each[end] for each in of] for end in ("low", "value", "high"))
        name = f"{side}: {result['models'][side]['name']}"
        curves.plot(budgets, middle, style, markersize=6 if face else 4, color=color, label=name, **face)
        curves.fill_between(budgets, low, high, color=color, alpha=0.15, linewidth=0)
    curves.set(xlabel="length budget (positions)", ylabel="pass@1, percent", ylim=(-2, 102))
    of = [row["difference"] for row in rows]
    middle, ends = [100 * each["value"] for each in of], error_bars(of, 100)
    differences.errorbar(budgets, middle, ends, fmt="o-", markersize=4, capsize=3, color="#2b6cb0", label="here")
    label = f"paper, 32B, 1k to 4k: {paper.MEAN_BUDGET_GAIN:+} on average"
    differences.axhline(paper.MEAN_BUDGET_GAIN, linestyle="--", color="gray", label=label)
    differences.axhline(0, linestyle=":", color="gray")
    differences.set(xlabel="length budget (positions)", ylabel="parallel - autoregressive, points")
    differences.margins(y=0.15)  # room for the legend
    curves.legend(frameon=False, fontsize="small", loc="lower right")
    differences.legend(frameon=False, fontsize="small", loc="upper left")
    for axes in (curves, differences):
        log_axis(axes, budgets, rotation=45)
    save_figure(figure, path)
