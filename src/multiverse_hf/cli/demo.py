"""The demo: problems shown as they are solved, and the same model timed in parallel and one token after another."""

import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multiverse_hf.checkpoints import (
    Answer,
    Attention,
    Checkpoint,
    Dtype,
    answer_prompt,
    load_model,
    open_checkpoint,
    quiet,
)
from multiverse_hf.cli.display import LiveView, TextStream
from multiverse_hf.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LiveOption,
    MaxNewTokensOption,
    ModelOption,
    ThreadsOption,
    TracebackOption,
    print_json,
)
from multiverse_hf.cli.terminal import waiting, wants_live
from multiverse_hf.data.chains import MAX_CHAINS, Kind, Problem, is_correct, sample_problem

MODES = {"parallel": "guided", "sequential": "off"}  # mode of the demo -> structure
REPEATS = 3  # the fewest whose median passes over a run that something else on the machine slowed down
MOST_SECONDS = 20  # of timing; past them no further repeat begins, unless so many were asked for


def demo_problems(seed: int, num_problems: int) -> list[Problem]:
    """Draw the problems: first one with eight chains, then a nested one, a small one, and any."""
    rng = random.Random(seed)
    fixed = [(Kind.FLAT, MAX_CHAINS), (Kind.NESTED, 6), (Kind.FLAT, 4)]
    drawn = [(rng.choice([Kind.FLAT, Kind.NESTED]), None) for _ in range(num_problems - len(fixed))]
    return [sample_problem(rng, kind, num_chains) for kind, num_chains in [*fixed, *drawn][:num_problems]]


def show_problems(
    console: Console,
    model: Any,
    checkpoint: Checkpoint,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pace: float | None,
) -> None:
    """Show every problem being solved in parallel: live, or as the document once it is written if ``pace`` is None."""
    for number, (problem, prompt) in enumerate(zip(problems, prompts, strict=True), start=1):
        console.print(Text(f"Problem {number}: {problem}\n", "bold"))
        options = {"structure": "guided", "do_sample": False, "max_new_tokens": max_new_tokens}
        if pace is None:
            answer_prompt(model, checkpoint, prompt, TextStream(sys.stdout, checkpoint.decode), **options)
        else:
            with LiveView(console, checkpoint.decode, checkpoint.tags, pace) as view:
                answer_prompt(model, checkpoint, prompt, view, **options)
        console.print()


def time_modes(
    model: Any, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int | None
) -> list[dict[str, list[Answer]]]:
    """Answer every prompt in both modes in turn, greedily and undisturbed by a display, after a warm-up.

    Args:
        model: the model.
        checkpoint: what it was loaded from.
        prompts: token ids.
        max_new_tokens: bound on the length of an answer.
        repeats: rounds over all prompts; None for :data:`REPEATS`, or as many as begin within :data:`MOST_SECONDS`.

    Returns:
        For each prompt, by mode, the answers of all repeats.
    """
    for structure in MODES.values():
        answer_prompt(model, checkpoint, prompts[0], structure=structure, do_sample=False, max_new_tokens=32)
    runs: list[dict[str, list[Answer]]] = [{mode: [] for mode in MODES} for _ in prompts]
    begin = time.monotonic()
    for repeat in range(repeats or REPEATS):
        if repeats is None and repeat and time.monotonic() - begin > MOST_SECONDS:
            break
        for number, prompt in enumerate(prompts):
            # the mode that goes first alternates, so that neither always finds the machine cooler or the caches warmer
            for mode in list(MODES) if (repeat + number) % 2 == 0 else reversed(MODES):
                options = {"structure": MODES[mode], "do_sample": False, "max_new_tokens": max_new_tokens}
                runs[number][mode].append(answer_prompt(model, checkpoint, prompt, **options))
    return runs


def demo_report(
    checkpoint: Checkpoint,
    model: Any,
    problems: Sequence[Problem],
    runs: Sequence[dict[str, list[Answer]]],
    seed: int,
) -> dict[str, Any]:
    """Put what was measured into the JSON form."""
    import torch

    rows = []
    for problem, modes in zip(problems, runs, strict=True):
        row: dict[str, Any] = {"problem": str(problem), "kind": problem.kind.value, "num_chains": len(problem.chains)}
        row["answer"] = problem.answer
        for mode, answers in modes.items():
            seconds = statistics.median(answer.seconds for answer in answers)
            correct = is_correct(problem, answers[0].document)
            row[mode] = {**answers[0].to_dict(), "seconds": seconds, "correct": correct}
        row["speedup"] = row["sequential"]["seconds"] / row["parallel"]["seconds"]
        rows.append(row)
    total: dict[str, Any] = {}
    for mode in MODES:
        counts = {key: sum(row[mode]["stats"][key] for row in rows) for key in ("num_tokens", "length", "num_steps")}
        total[mode] = {
            "correct": sum(row[mode]["correct"] for row in rows),
            **counts,
            "parallelism": counts["num_tokens"] / counts["length"] if counts["length"] else 1.0,
            "seconds": sum(row[mode]["seconds"] for row in rows),
        }
    total["speedup"] = total["sequential"]["seconds"] / total["parallel"]["seconds"]
    return {
        "model": checkpoint.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": seed,
        "repeats": len(runs[0]["parallel"]),
        "problems": rows,
        "total": total,
    }


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print what was measured as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("problem", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("right", "tokens", "length", "# par.", "steps", "seconds", "speedup"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, mode: str, right: str, counts: dict[str, Any], seconds: float, speedup: float) -> None:
        table.add_row(
            name if mode == "parallel" else "",
            mode,
            right,
            str(counts["num_tokens"]),
            str(counts["length"]),
            f"{counts['parallelism']:.2f}",
            str(counts["num_steps"]),
            f"{seconds:.2f}",
            f"{speedup:.2f}x" if mode == "parallel" else "",
            style="bold" if name == "total" else None,
        )

    for row in report["problems"]:
        name = f"{row['num_chains']} chains" + (", nested" if row["kind"] == Kind.NESTED.value else "")
        for mode in MODES:
            run = row[mode]
            right = "yes" if run["correct"] else "no"
            add(name, mode, right, run["stats"], run["seconds"], row["speedup"])
        table.add_section()
    for mode in MODES:
        run = report["total"][mode]
        right = f"{run['correct']}/{len(report['problems'])}"
        add("total", mode, right, run, run["seconds"], report["total"]["speedup"])
    console.print(table)
    threads, repeats = report["threads"], report["repeats"]
    console.print(
        f"\n{report['model']}, {report['dtype']}, on {report['device']} with {threads} thread{'s' * (threads > 1)}: "
        f"both modes answer the same prompts greedily, after a warm-up and without the display; "
        + ("one run each." if repeats == 1 else f"median of {repeats} runs each, in turns."),
        style="dim",
    )


def demo(
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="How many problems.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the problems.")] = 0,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Timed runs of each problem and mode; by default {REPEATS}, fewer on a slow machine.",
        ),
    ] = None,
    pace: Annotated[float, typer.Option(min=1, metavar="N", help="Steps a second the live view shows at most.")] = 60,
    model: ModelOption = None,
    max_new_tokens: MaxNewTokensOption = 2048,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    live: LiveOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Solve a few problems, show the branches, and time the same model in parallel and one token after the other.

    \b
    Examples:
      multiverse demo
      multiverse demo --problems 8 --seed 1 --repeats 5
      multiverse demo --json
    """
    shows_live = wants_live(live, as_json)
    with waiting("loading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        loaded = load_model(checkpoint, dtype, attn, device, threads)
    chosen = demo_problems(seed, problems)
    prompts = [checkpoint.encode(problem.prompt()) for problem in chosen]
    console = Console(force_terminal=True) if shows_live else Console(width=None if sys.stdout.isatty() else 100)
    if not as_json:
        show_problems(console, loaded, checkpoint, chosen, prompts, max_new_tokens, pace if shows_live else None)
    with waiting("timing both modes without the display"):
        runs = time_modes(loaded, checkpoint, prompts, max_new_tokens, repeats)
    report = demo_report(checkpoint, loaded, chosen, runs, seed)
    if as_json:
        print_json(report)
    else:
        print_report(console, report)
