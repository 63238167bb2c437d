"""The demo: it shows how problems are solved, and times the same model in parallel and autoregressively."""

import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
from multiverse_hf.cli.smollm2 import PROBLEMS
from multiverse_hf.cli.terminal import waiting, wants_live
from multiverse_hf.data.chains import MAX_CHAINS, ChainsProblem, Kind, is_correct, sample_problem
from multiverse_hf.data.records import read_answer
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.tasks import SIDES

HEADINGS = ("problem", "mode", "right", "tokens", "length", "# par.", "steps", "seconds", "speedup")
REPEATS = 3  # the fewest whose median ignores one run that other work slowed down
# Seconds after the start of the command, for slow machines: later no further problem is shown, and no further run is
# timed, unless --repeats asks for it.
SHOW_SECONDS = 18
MOST_SECONDS = 32


@dataclass(frozen=True, slots=True)
class DemoProblem:
    """A problem of the demo.

    Attributes:
        title: its name in the table.
        text: the question as people read it.
        prompt: what the model is asked.
        facts: what its row of the JSON output says of it.
        is_right: whether an answer's document is right.
    """

    title: str
    text: str
    prompt: str | list[dict[str, str]]
    facts: dict[str, Any]
    is_right: Callable[[str], bool]


def demo_problems(seed: int, num_problems: int) -> list[ChainsProblem]:
    """Return the problems: one with eight chains, a nested one, a small one, and random ones."""
    rng = random.Random(seed)
    fixed = [(Kind.FLAT, MAX_CHAINS), (Kind.NESTED, 6), (Kind.FLAT, 4)]
    drawn = [(rng.choice([Kind.FLAT, Kind.NESTED]), None) for _ in range(num_problems - len(fixed))]
    return [sample_problem(rng, kind, num_chains) for kind, num_chains in [*fixed, *drawn][:num_problems]]


def show_chains(problem: ChainsProblem) -> DemoProblem:
    """Return a problem of chains as the demo takes it."""
    title = f"{len(problem.chains)} chains{', nested' if problem.kind is Kind.NESTED else ''}"
    facts = {"kind": problem.kind.value, "num_chains": len(problem.chains), "answer": problem.answer}
    return DemoProblem(title, str(problem), problem.prompt(), facts, functools.partial(is_correct, problem))


def read_problems(folder: str) -> list[DemoProblem]:
    """Return the problems that a model's folder brings, none if it brings none.

    Each line of its file has ``kind``, ``question`` and ``answer``. An answer is right if it is the same text.

    Raises:
        CommandError: if a line has not.
    """
    file = Path(folder).expanduser() / PROBLEMS
    problems = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], start=1):
        try:
            row = json.loads(line)
            kind, question, answer = (str(row[name]) for name in ("kind", "question", "answer"))
        except (ValueError, KeyError, TypeError) as err:
            raise CommandError(f"{file}, line {number}: it needs kind, question and answer; mend it") from err
        prompt = [{"role": "user", "content": Suffix.PARALLEL.end(question)}]
        facts = {"kind": kind, "answer": answer}
        problems.append(DemoProblem(kind, question, prompt, facts, functools.partial(_says, answer)))
    return problems


def _says(answer: str, document: str) -> bool:
    return (read_answer(document) or "").strip() == answer


def show_problem(
    console: Console,
    model: Any,
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    max_new_tokens: int,
    pace: float | None,
) -> None:
    """Show how a problem is solved in parallel: live, or as plain text if ``pace`` is None."""
    options = {"structure": "guided", "do_sample": False, "max_new_tokens": max_new_tokens}
    if pace is None:
        answer_prompt(model, checkpoint, prompt, TextStream(sys.stdout, checkpoint.decode), **options)
    else:
        with LiveView(console, checkpoint.decode, checkpoint.tags.roles, pace) as view:
            answer_prompt(model, checkpoint, prompt, view, **options)
    console.print()


def time_modes(
    model: Any,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int | None,
    begin: float | None = None,
    modes: Sequence[str] = tuple(SIDES),
) -> Iterator[dict[str, list[Answer]]]:
    """Answer every prompt in all modes in turns, greedily and without a display, after a warm-up.

    Args:
        model: the model.
        checkpoint: what it was loaded from.
        prompts: token ids.
        max_new_tokens: limit of an answer's length.
        repeats: repeats of each prompt. With None there are up to :data:`REPEATS`, and none begins after the prompt's
            share of :data:`MOST_SECONDS`. After that time no further prompt is answered, except the first.
        begin: start of these seconds by ``time.monotonic``; None for now.
        modes: "parallel" and "autoregressive", or one of them.

    Yields:
        For each prompt, by mode, the answers of all repeats. If one CPU thread computes, their seconds are its
        processor time, which does not include other work on the machine.
    """
    end = (time.monotonic() if begin is None else begin) + MOST_SECONDS
    sides = [side for side in SIDES if side in modes]
    for side in sides:
        answer_prompt(model, checkpoint, prompts[0], structure=side.structure, do_sample=False, max_new_tokens=32)
    for number, prompt in enumerate(prompts):
        now = time.monotonic()
        if repeats is None and number and now > end:
            return
        share = now + (end - now) / (len(prompts) - number)
        runs: dict[str, list[Answer]] = {side: [] for side in sides}
        for repeat in range(repeats or REPEATS):
            if repeats is None and repeat and time.monotonic() > share:
                break
            # the first mode alternates, so that no mode always has a cooler machine or warmer caches
            for side in sides if (repeat + number) % 2 == 0 else reversed(sides):
                options = {"structure": side.structure, "do_sample": False, "max_new_tokens": max_new_tokens}
                busy = time.thread_time()
                answer = answer_prompt(model, checkpoint, prompt, **options)
                busy = time.thread_time() - busy
                runs[side].append(replace(answer, seconds=busy) if is_alone(model) else answer)
        yield runs


def is_alone(model: Any) -> bool:
    """Return whether one CPU thread computes, so that its processor time is the time on an idle machine."""
    from multiverse_hf.modeling.threads import step_threads

    return model.device.type == "cpu" and step_threads(model) == 1


def problem_row(problem: DemoProblem, modes: dict[str, list[Answer]]) -> dict[str, Any]:
    """Return a problem's measurements in JSON form."""
    row: dict[str, Any] = {"problem": problem.text, **problem.facts}
    for mode, answers in modes.items():
        seconds = statistics.median(answer.seconds for answer in answers)
        correct = problem.is_right(answers[0].document)
        row[mode] = {**answers[0].to_dict(), "seconds": seconds, "correct": correct}
    row["repeats"] = len(modes["parallel"])
    if "autoregressive" in row:
        row["speedup"] = row["autoregressive"]["seconds"] / row["parallel"]["seconds"]
    return row


def demo_report(checkpoint: Checkpoint, model: Any, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Return the measurements of all problems in JSON form."""
    import torch

    from multiverse_hf.modeling.threads import step_threads

    total: dict[str, Any] = {}
    for mode in [side for side in SIDES if side in rows[0]]:
        counts = {key: sum(row[mode]["stats"][key] for row in rows) for key in ("num_tokens", "length", "num_steps")}
        total[mode] = {
            "correct": sum(row[mode]["correct"] for row in rows),
            **counts,
            "parallelism": counts["num_tokens"] / counts["length"] if counts["length"] else 1.0,
            "seconds": sum(row[mode]["seconds"] for row in rows),
        }
    if "autoregressive" in total:
        total["speedup"] = total["autoregressive"]["seconds"] / total["parallel"]["seconds"]
    return {
        "model": checkpoint.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": step_threads(model),
        "clock": "processor" if is_alone(model) else "wall",
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "seed": seed,
        "repeats": min(row["repeats"] for row in rows),
        "problems": rows,
        "total": total,
    }


def print_row(console: Console, cells: Sequence[str], style: str | None = None) -> None:
    """Print a line of the table: the first two cells left-aligned, the others right-aligned."""
    widths = (16, 14, 5, 6, 6, 6, 5, 7, 7)  # 80 with the spaces between
    aligned = [
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    console.print(Text(" ".join(aligned).rstrip(), style or ""), soft_wrap=True)


def print_modes(console: Console, name: str, row: dict[str, Any], num_problems: int | None = None) -> None:
    """Print the lines of a problem, or of the totals of ``num_problems``, one for each mode."""
    for mode in [side for side in SIDES if side in row]:
        run = row[mode]
        counts = run["stats"] if num_problems is None else run
        right = ("yes" if run["correct"] else "no") if num_problems is None else f"{run['correct']}/{num_problems}"
        is_first = mode == "parallel"
        numbers = [str(counts["num_tokens"]), str(counts["length"]), f"{counts['parallelism']:.2f}"]
        numbers += [
            str(counts["num_steps"]),
            f"{run['seconds']:.2f}",
            f"{row['speedup']:.2f}x" if is_first and "speedup" in row else "",
        ]
        style = None if num_problems is None else "bold"
        print_row(console, [name if is_first else "", mode, right, *numbers], style)


def print_end(console: Console, report: dict[str, Any], num_problems: int) -> None:
    """Print the totals, and how they were measured."""
    num_timed = len(report["problems"])
    print_modes(console, "total", report["total"], num_timed)
    threads, repeats, load, cores = (report[name] for name in ("threads", "repeats", "load_average", "cores"))
    how = "one run each" if repeats == 1 else f"medians of {repeats}{' or more' * (repeats < REPEATS)} runs each"
    text = (
        f"{report['model']}, {report['dtype']}, on {report['device']} with {threads} thread{'s' * (threads > 1)}: "
        f"{'both modes answer' if 'speedup' in report['total'] else 'it answers'} the same prompts greedily, after a "
        f"warm-up and without the display; {how}{', in turns' if 'speedup' in report['total'] else ''}."
    )
    if load is not None and cores:
        text += f" Load of the last minute: {load:.1f} on {cores} cores"
        text += ": other work slows it down." if load > cores + 0.5 else "."
    if report["clock"] == "processor":
        text += " Seconds are processor time, without other work."
    if num_timed < num_problems:
        text += f" Timed within {MOST_SECONDS} s: {num_timed} of {num_problems} problems; --repeats 1 times all."
    console.print(Text(f"\n{text}"), style="dim")


def demo(
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="Number of problems.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the problems.")] = 0,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Timed runs of each problem and mode; by default {REPEATS}, fewer on a slow machine.",
        ),
    ] = None,
    pace: Annotated[float, typer.Option(min=1, metavar="N", help="Most steps per second in the live view.")] = 60,
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
    """Solve a few problems, show the branches, and time the same model in parallel and autoregressively.

    \b
    Examples:
      multiverse demo
      multiverse demo --problems 8 --seed 1 --repeats 5
      multiverse demo --model smollm2
      multiverse demo --json
    """
    begin = time.monotonic()
    shows_live = wants_live(live, as_json)
    console = Console(force_terminal=True) if shows_live else Console(width=None if sys.stdout.isatty() else 100)
    if as_json:
        console.quiet = True
    with waiting("opening the model"):
        quiet()
        checkpoint = open_checkpoint(model)
    own = read_problems(checkpoint.path)
    if own and problems > len(own):
        raise CommandError(f"--problems must be at most {len(own)} for this model, got {problems}")
    if own and seed:
        random.Random(seed).shuffle(own)
    chosen = own[:problems] or [show_chains(problem) for problem in demo_problems(seed, problems)]
    console.print(Text(f"Problem 1: {chosen[0].text}\n", "bold"))
    sys.stdout.flush()
    with waiting("loading the model"):
        loaded = load_model(checkpoint, dtype, attn, device, threads)
    prompts = [checkpoint.encode(problem.prompt) for problem in chosen]
    for number, (problem, prompt) in enumerate(zip(chosen, prompts, strict=True), start=1):
        if as_json or (number > 1 and time.monotonic() - begin > SHOW_SECONDS):
            break
        if number > 1:
            console.print(Text(f"Problem {number}: {problem.text}\n", "bold"))
        show_problem(console, loaded, checkpoint, prompt, max_new_tokens, pace if shows_live else None)
    # A model with problems of its own need not have learned to answer them in sequence.
    modes = ("parallel",) if own else tuple(SIDES)
    console.print(f"The same problems timed{'' if own else ' in both modes'}, without the display:\n")
    print_row(console, HEADINGS, "bold")
    sys.stdout.flush()
    rows: list[dict[str, Any]] = []
    timed = time_modes(loaded, checkpoint, prompts, max_new_tokens, repeats, begin, modes)
    for problem in chosen:
        with waiting(f"timing problem {len(rows) + 1} of {problems}"):
            runs = next(timed, None)
        if runs is None:
            break
        rows.append(problem_row(problem, runs))
        print_modes(console, problem.title, rows[-1])
        sys.stdout.flush()
    report = demo_report(checkpoint, loaded, rows, seed)
    if as_json:
        print_json(report)
    else:
        print_end(console, report, problems)
