"""The report of a run: its rows, its loss and its answers, in Markdown with one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.data.rows import TokenKind
from multiverse_hf.outputs import write_output


def finish_run(record: dict[str, Any], trainer: Any, metrics: dict[str, Any]) -> None:
    """Write ``run.json`` and the report to the folder of a finished run.

    Args:
        record: settings and rows, from :func:`~.runs.describe_run`.
        trainer: a :class:`~.trainer.MultiverseSFTTrainer` after its training.
        metrics: metrics of the training.
    """
    output, history = Path(trainer.args.output_dir), trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:  # after a resume, the trainer's own loss covers only the last part
        metrics = metrics | {"train_loss": sum(losses) / len(losses)}
    last = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    evaluation = {k: v for entry in last if entry["step"] == last[-1]["step"] for k, v in entry.items()}
    text = json.dumps(record | {"metrics": metrics, "last_evaluation": evaluation}, indent=1, default=str)
    num_epochs = max(1, round(trainer.state.epoch or 1))
    draw_run(output / "report.png", history, [trainer.sampler.parallel_share(epoch) for epoch in range(num_epochs)])
    write_output(output / "report.md", run_page(json.loads(text), "report.png"))
    write_output(output / "run.json", text + "\n")
    (output / "begun.json").unlink(missing_ok=True)
    print(f"report: {output / 'report.md'}")


def draw_run(path: Path, history: Sequence[Mapping[str, float]], shares: Sequence[float]) -> None:
    """Draw a run: loss, loss by kind of token, share of parallel rows by epoch, and measures of its answers.

    Args:
        path: PNG or SVG file to write.
        history: the trainer's log (``trainer.state.log_history``).
        shares: drawn share of rows in parallel form, by epoch.
    """
    from matplotlib.figure import Figure

    steps = [entry for entry in history if "loss" in entry]
    evals = [entry for entry in history if "eval_loss" in entry]
    answers = [entry for entry in history if "eval_generated_parallelism" in entry]
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, kinds), (curriculum, generated) = figure.subplots(2, 2)

    def curve(axes: Any, entries: Sequence[Mapping[str, float]], name: str, label: str, **style: Any) -> None:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None, **style)

    curve(loss, steps, "loss", "training")
    curve(loss, evals, "eval_loss", "evaluation")
    loss.set(title="Loss", xlabel="step", ylabel="nats per token")
    for kind in (each.name.lower() for each in TokenKind):
        curve(kinds, steps, f"loss_{kind}", kind)
    kinds.set(title="Loss by kind of token", xlabel="step", ylabel="nats per token", yscale="log")
    epochs = range(1, len(shares) + 1)
    curriculum.bar(epochs, [100 * share for share in shares], color="tab:green")
    curriculum.set(title="Rows in parallel form", xlabel="epoch", ylabel="percent", ylim=(0, 105), xticks=list(epochs))
    for name in ("accuracy", "well_formed", "forks"):
        curve(generated, answers, f"eval_generated_{name}", name.replace("_", "-"))
    generated.set(title="Answers at evaluation", xlabel="step", ylabel="share", ylim=(-0.03, 1.03))
    width = generated.twinx()
    curve(width, answers, "eval_generated_parallelism", "# parallel", color="black", linestyle=":")
    width.set_ylabel("# parallel")
    for axes in (loss, kinds, generated):
        lines = axes.get_lines() + (width.get_lines() if axes is generated else [])
        if lines:
            axes.legend(lines, [line.get_label() for line in lines], fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="gray")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def run_page(record: Mapping[str, Any], picture: str) -> str:
    """Return a run's report in Markdown.

    Args:
        record: the run's ``run.json``.
        picture: name of the picture's file.
    """
    data, training, metrics = record["data"], record["training"], record["metrics"]
    rows = data["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    last = {name: value for name, value in record["last_evaluation"].items() if name.startswith("eval_")}
    table = [f"| {name} | {value:.4g} |" for name, value in sorted({**metrics, **last}.items())]
    settings = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed", "max_length")
    said = ("dataset_name", "parallel_share", "pack_rows", "overlong", "eval_rows", "system_prompt")
    lora = f"LoRA of rank {record['model']['lora_r']}" if record["model"]["use_peft"] else "all weights trained"
    processes = f"{record['processes']} process{'es' if record['processes'] > 1 else ''}"
    return "\n".join(
        [
            f"# Run {Path(training['output_dir']).name}",
            "",
            f"Base: `{record['model']['model_name_or_path']}`, attention {record['model']['attn_implementation']}, "
            f"{lora}, {processes}.",
            "",
            f"Rows: {_counts(rows)}, {data['trained_on']} trained on; dropped: {_dropped(rows)} "
            f"(`dropped_rows.jsonl`). Fingerprint {data['fingerprint']}.",
            *_about_test_rows(data),
            "",
            ", ".join(f"{name} {data[name]}" for name in said) + ".",
            "",
            ", ".join(f"{name} {training[name]}" for name in settings) + f". {versions}. All of it: `run.json`.",
            "",
            f"![Loss, loss by kind of token, curriculum, answers]({picture})",
            "",
            "| metric | value |",
            "|---|---|",
            *table,
            "",
        ]
    )


def _counts(rows: Mapping[str, Any]) -> str:
    return f"{rows['rows']} read, {rows['kept']} kept, {rows.get('cut', 0)} of them cut"


def _dropped(rows: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items()) or "none"


def _about_test_rows(data: Mapping[str, Any]) -> list[str]:
    """Return the lines about a separate split for evaluation, none without one."""
    rows = data.get("test_rows")
    if not rows:
        return []
    split = f"`{data['dataset_test_split']}`"
    return ["", f"Evaluated on {split}: {_counts(rows)}; dropped: {_dropped(rows)} (`dropped_test_rows.jsonl`)."]
