"""``multiverse eval`` and ``multiverse compare``, after their options are read."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from multiverse_hf.checkpoints import quiet
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.evaluation import compare as comparing
from multiverse_hf.evaluation import run
from multiverse_hf.evaluation.answers import RULES_VERSION, AnswerKind
from multiverse_hf.evaluation.report import describe_sampling, show_metric, write_report
from multiverse_hf.evaluation.results import make_results, read_results
from multiverse_hf.evaluation.samples import Sample
from multiverse_hf.evaluation.settings import Evaluation
from multiverse_hf.judging.checker import get_checker
from multiverse_hf.outputs import EVERY_S, FIRST_S, check_output, json_text, write_output


def evaluate_and_report(evaluation: Evaluation, output: Path) -> dict[str, Any]:
    """Run the unfinished part of an evaluation. Write and return its results, and write the report.

    Raises:
        CommandError: as :func:`~multiverse_hf.evaluation.run.run_evaluation`.
        KeyboardInterrupt: on Ctrl-C; finished answers are kept.
    """
    check_packages()
    if any(task.kind is AnswerKind.MATH for task in evaluation.read_tasks()):
        get_checker()  # fail now, not at the first answer
    quiet()
    title = f"{evaluation.model or 'multiverse-tiny'}, {evaluation.mode}"
    with progress_bar(title) as (advance, state):
        try:
            finished = run.run_evaluation(evaluation, output, advance)
        except KeyboardInterrupt:
            if state:
                last = state[-1]
                print(
                    f"interrupted: {last.done} of {last.total} answers are done; the same command does the rest",
                    file=sys.stderr,
                )
            raise
        except OSError as err:  # usually a full disk
            raise CommandError(
                f"cannot write to {output}: {err.strerror or one_line(err)}; free disk space, then run it again",
                FAILURE,
            ) from err
    warn_of_refusals(finished.samples)
    results = make_results(finished, command_line())
    if finished.num_before == len(finished.samples) and (old := read_results(output)) is not None:
        # no answer is new: the earlier command's hardware and time stay
        results |= {name: old[name] for name in ("hardware", "seconds", "samples_before", "versions", "commit")}
    write_output(output / "results.json", json_text(results, indent=2))
    write_report(output, results, finished.samples)
    return results


def warn_of_refusals(samples: Sequence[Sample]) -> None:
    """Warn of refused prompts: they count as wrong, and have no answers."""
    if refused := [sample for sample in samples if sample.error is not None]:
        print(
            f"warning: {len(refused)} of {len(samples)} prompts were refused and count as wrong answers of no length; "
            f"the first, {refused[0].task} {refused[0].id}: {refused[0].error}",
            file=sys.stderr,
        )


def check_packages() -> None:
    """Check that the packages for results and reports are installed, before a run begins."""
    import importlib.util

    for module in ("pyarrow", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f"{module} is missing; {install_line('eval')}", FAILURE)


def command_line() -> str:
    """Return the command for publication: absolute paths keep only their last part."""
    arguments = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return shlex.join(["multiverse", *arguments])


@contextmanager
def progress_bar(title: str) -> Iterator[tuple[Callable[[run.RunProgress], None], list[run.RunProgress]]]:
    """Show a run's progress: a bar in a terminal, a line now and then in a log.

    Yields:
        The function to call, and a list with the last progress.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[right]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    state: list[run.RunProgress] = []
    console = Console(stderr=True)
    begin, due = time.monotonic(), FIRST_S
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, right="")

        def advance(progress: run.RunProgress) -> None:
            nonlocal due
            state[:] = [progress]
            share = f"{100 * progress.correct / progress.done:.1f} % right" if progress.done else ""
            bar.update(task, completed=progress.done, total=progress.total, right=share)
            seconds = time.monotonic() - begin
            if bar.disable and seconds >= due:
                due = seconds + EVERY_S
                print(f"{progress.done} of {progress.total} answers after {seconds:.0f} s", file=sys.stderr)

        yield advance, state


def print_results(results: dict[str, Any], output: Path) -> None:
    """Print a run's results for people."""
    print(f"{results['model']['name']}, {results['mode']}: {describe_sampling(results)}")
    has_scores = any("score" in task["metrics"] for task in results["tasks"].values())
    names = {"pass@1": "pass@1"} | ({"score": "score"} if has_scores else {})
    names |= {"parallelism": "# parallel", "length": "length", "well_formed": "well formed"}
    rows = [
        [title, str(of["problems"]), *(show_metric(metric, of["metrics"]) for metric in names)]
        for name, task in results["tasks"].items()
        for title, of in ((name, task), *((f"  {group}", of) for group, of in task["groups"].items()))
    ]
    _print_table(["task", "problems", *names.values()], rows)
    print(f"{output / 'report.html'}\n{output / 'results.json'}")


def compare_and_report(first: Path, second: Path, output: Path) -> dict[str, Any]:
    """Compare two runs. Write the report, and return the comparison.

    Raises:
        CommandError: as :func:`~multiverse_hf.evaluation.compare.compare_runs`.
    """
    check_packages()
    check_output(output, is_folder=True)
    comparison = comparing.compare_runs(first, second)
    if again := comparison["judged_again"]:
        print(
            f"judged again by version {RULES_VERSION} of the rules for answers: {', '.join(again).upper()}; its own "
            "results.json has the verdicts of an older version",
            file=sys.stderr,
        )
    comparing.write_comparison(output, comparison)
    return comparison


def print_comparison(comparison: dict[str, Any], output: Path) -> None:
    """Print a comparison for people."""
    for side in ("a", "b"):
        run_of = comparison[side]
        print(f"{side.upper()}: {run_of['model']['name']}, {run_of['mode']}, {describe_sampling(run_of)}")
    print("B - A, paired by problem")
    tasks = {name: task for name, task in comparison["tasks"].items() if task["problems"]}
    metrics = {"pass@1": "pass@1, points"} | ({"score": "score"} if comparing.has_scores(comparison) else {})
    metrics |= {"parallelism": "# parallel", "length": "length"}
    rows = [[name, *comparing.compared_cells(task, tuple(metrics))] for name, task in tasks.items()]
    _print_table(["task", "problems", *metrics.values(), "helped", "hurt"], rows)
    print(output / "comparison.html")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, folded to the width of a terminal."""
    table = Table(*(Column(name, overflow="fold") for name in columns), box=SIMPLE_HEAD)
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 1000).print(table)
