"""Table 2: base, autoregressive, zero and parallel, on the same problems."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import Checkpoint, open_checkpoint
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.experiments import paper
from multiverse_hf.evaluation.figures import error_bars, make_figure, save_figure
from multiverse_hf.evaluation.report import describe_sampling, markdown_table, show
from multiverse_hf.evaluation.settings import Evaluate, Evaluation
from multiverse_hf.evaluation.tasks import Mode
from multiverse_hf.outputs import new_folder

RANDOM = "random"  # base with the model's architecture and random weights, as multiverse-tiny began
ROWS = {
    "base": Mode.AUTOREGRESSIVE,
    "autoregressive": Mode.AUTOREGRESSIVE,
    "zero": Mode.ZERO,
    "parallel": Mode.PARALLEL,
}


def measure_suite(
    evaluation: Evaluation, base: str | None, autoregressive: str | None, output: Path, evaluate: Evaluate
) -> dict[str, Any]:
    """Run every row of the table, each in its folder. Finished runs are kept.

    Args:
        evaluation: settings of the parallel model.
        base: the model it was trained from; ``random`` for random weights; None omits the row.
        autoregressive: the model trained on the same data in sequential form; None omits the row.
        output: folder of the runs.
        evaluate: runs an evaluation in a folder and returns its results.

    Raises:
        CommandError: if a run fails, or the random base would be too large.
    """
    if base == RANDOM:
        base = str(make_random_base(open_checkpoint(evaluation.model, evaluation.revision), output / "base-model"))
    models = {"base": base, "autoregressive": autoregressive, "zero": evaluation.model, "parallel": evaluation.model}
    rows = {}
    for row, mode in ROWS.items():
        if models[row] is None and row in ("base", "autoregressive"):
            continue
        rows[row] = evaluate(replace(evaluation, model=models[row], mode=mode), output / row)
    head = rows["parallel"]
    return {
        "schema": 1,
        "experiment": "table",
        "rows": {
            row: {name: results[name] for name in ("model", "mode", "prompts", "sampling", "n", "seed", "tasks")}
            for row, results in rows.items()
        },
        "paper": {
            row: {task: [score.accuracy, score.parallelism] for task, score in scores.items() if task in head["tasks"]}
            for row, scores in paper.TABLE.items()
        },
        **{name: head[name] for name in ("versions", "hardware", "commit")},
    }


def make_random_base(checkpoint: Checkpoint, folder: Path) -> Path:
    """Save a model of a checkpoint's architecture with random weights (seed 0), unless it exists.

    Raises:
        CommandError: if a random model of this size would be useless.
    """
    if (folder / "config.json").is_file():
        return folder
    import torch

    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM

    with torch.device("meta"):
        count = MultiverseForCausalLM.from_config(checkpoint.config, checkpoint.tags).num_parameters()
    if count > 1e9:
        raise CommandError(f"a random base of {count / 1e9:.1f} B parameters measures nothing; name one with --base")
    torch.manual_seed(0)
    model = MultiverseForCausalLM.from_config(checkpoint.config, checkpoint.tags)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        checkpoint.tokenizer.save_pretrained(part)
    return folder


def _cells(row: str, task: str, results: Mapping[str, Any]) -> list[str]:
    metrics = results["tasks"][task]["metrics"]
    theirs = paper.TABLE.get(row, {}).get(task)
    shown = [show(name, metrics[name]) for name in ("pass@1", "parallelism", "length")]
    if theirs is None:
        return [*shown, "", ""]
    return [*shown, f"{theirs.accuracy} %", "" if theirs.parallelism is None else f"{theirs.parallelism}"]


def table_page(result: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with the paper's numbers for common tasks."""
    head = result["rows"]["parallel"]
    asked = [f"{row}: `{of['model']['name']}`, `{of['prompts']['template']}`." for row, of in result["rows"].items()]
    lines = [f"Sampling: {describe_sampling(head).rpartition(', structure')[0]}. {' '.join(asked)}", ""]
    for task, of in head["tasks"].items():
        lines += [f"{task}, {of['problems']} problems of {of['source']} (`{of['fingerprint']}`):", ""]
        columns = ["pass@1", "# parallel", "length", "paper, 32B: pass@1", "# parallel"]
        lines += markdown_table(["", *columns], ([row, *_cells(row, task, of)] for row, of in result["rows"].items()))
        lines.append("")
    machine = result["hardware"]
    lines.append(f"{machine['device']}, {machine['cores']} cores; commit {result['commit']}." if machine else "")
    return "\n".join(lines)


def summarize(result: Mapping[str, Any]) -> list[str]:
    """Return the results in lines for people."""
    return [
        f"{task} {row:15} {' '.join(f'{cell:26}' for cell in _cells(row, task, of)[:3])}"
        for task in result["rows"]["parallel"]["tasks"]
        for row, of in result["rows"].items()
    ]


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw pass@1 and # parallel with their intervals for each row and task, beside the paper's."""
    rows = [(row, task, of["tasks"][task]["metrics"]) for task in result["rows"]["parallel"]["tasks"]
            for row, of in result["rows"].items()]  # fmt: skip
    figure, (ours, widths, theirs) = make_figure(3, width=13, height=max(4.2, 1.2 + 0.3 * len(rows)))
    colors = dict(zip(ROWS, ("#718096", "#c05621", "#6b46c1", "#2b6cb0"), strict=True))
    names = [f"{row}, {task}" for row, task, _ in rows]
    for axes, metric, scale in ((ours, "pass@1", 100), (widths, "parallelism", 1)):
        for name, (row, _, metrics) in reversed(list(zip(names, rows, strict=True))):
            of = metrics[metric]
            axes.errorbar(
                [scale * of["value"]], [name], xerr=error_bars([of], scale), fmt="o", capsize=3, color=colors[row]
            )
        axes.margins(y=0.1)
    for axes in (widths, theirs):
        axes.locator_params(axis="x", nbins=5)
    widths.tick_params(labelleft=False)
    for row, scores in paper.TABLE.items():
        for task, marker in zip(scores, "osD^", strict=True):
            theirs.plot([scores[task].parallelism or 1.0], [scores[task].accuracy], marker, color=colors[row],
                        markerfacecolor="none")  # fmt: skip
    for task, marker in zip(paper.TABLE["parallel"], "osD^", strict=True):
        theirs.plot([], [], marker, color="gray", markerfacecolor="none", label=task.removeprefix("mv:"))
    for row in paper.TABLE:
        theirs.plot([], [], "-", color=colors[row], label=row)
    ours.set(xlabel="pass@1, percent", xlim=(-3, 105), title="here")
    widths.set(xlabel="# parallel", title="here")
    theirs.set(xlabel="# parallel", ylabel="pass@1, percent", ylim=(-3, 105), title="paper, Multiverse-32B")
    theirs.legend(frameon=False, fontsize="small", loc="lower center", ncols=2)
    save_figure(figure, path)
