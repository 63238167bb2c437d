"""``multiverse experiment`` and ``multiverse eval --suite paper``, after their options are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import quiet
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.evaluation.commands import check_packages, command_line
from multiverse_hf.evaluation.experiments import batches, budget, latency, suite
from multiverse_hf.outputs import check_output, json_text, output_folder

MODULES = {"table": suite, "budget": budget, "latency": latency, "batch": batches}


def run_experiment(name: str, measure: Callable[[], dict[str, Any]], output: Path) -> None:
    """Run one of the paper's experiments. Write ``NAME.json``, ``.png`` and ``.svg``, and print the results.

    For a table, also write ``.md``.

    Args:
        name: ``table``, ``budget``, ``latency`` or ``batch``.
        measure: returns the experiment's result.
        output: folder to write to.
    """
    module = MODULES[name]
    check_packages()
    check_output(output, is_folder=True)
    quiet()
    try:
        result = measure() | {"command": command_line()}
    except ValueError as err:  # too few points to fit a curve
        raise CommandError(one_line(err)) from err
    with output_folder(output) as part:
        (part / f"{name}.json").write_text(json_text(result, indent=1), encoding="utf-8")
        if module is suite:
            (part / "table.md").write_text(suite.table_page(result), encoding="utf-8")
        module.draw(part / name, result)
    print(*module.summarize(result), output / f"{name}.png", sep="\n")
