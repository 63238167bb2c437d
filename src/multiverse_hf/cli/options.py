"""Options and output that several commands share. Its imports are light, so that ``--help`` answers at once."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.checkpoints import MIN_TEMPERATURE, Attention, Dtype
from multiverse_hf.cli.smollm2 import model_callback
from multiverse_hf.errors import CommandError
from multiverse_hf.jobs.options import JobOutcome
from multiverse_hf.outputs import json_text

CLUSTER = "Slurm and Ray"  # a panel of the help
TRACEBACK = "MULTIVERSE_TRACEBACK"  # environment variable: show where an error came from


def _show_traceback(value: bool) -> bool:
    if value:
        os.environ[TRACEBACK] = "1"
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Checkpoint folder or repository. Built in are multiverse-tiny (default) and multiverse-tiny-sequential, "
        "which only solve sums of chains; smollm2 is SmolLM2-135M with an adapter of this package.",
        callback=model_callback,
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Most tokens along the longest path, within the context.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(metavar="TYPE", help="auto (the checkpoint's), float32, bfloat16, float16 or float64."),
]
AttentionOption = Annotated[Attention, typer.Option(metavar="KIND", help="Attention implementation: sdpa or eager.")]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes CUDA if there is any.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, metavar="N", help="CPU threads; by default one if that is faster, else torch's choice."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
LiveOption = Annotated[
    bool | None, typer.Option("--live/--plain", help="Branches side by side, or plain text; live in a terminal.")
]
PartitionOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Slurm's partition.", rich_help_panel=CLUSTER)
]
TimeOption = Annotated[
    str | None, typer.Option(metavar="H:MM:SS", help="Slurm's time limit per task.", rich_help_panel=CLUSTER)
]
CpusOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPUs per task; by default 1.", rich_help_panel=CLUSTER)
]
MemoryOption = Annotated[
    int | None, typer.Option(min=1, metavar="GB", help="Memory per CPU; by default 2.", rich_help_panel=CLUSTER)
]
SbatchOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Other options for Slurm, such as account=me.", rich_help_panel=CLUSTER),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print Slurm's script and start nothing.", rich_help_panel=CLUSTER)
]
TracebackOption = Annotated[
    bool,
    typer.Option(
        "--traceback",
        callback=_show_traceback,
        is_eager=True,  # before the callbacks of other options, which may fail
        help=f"Show where an error came from ({TRACEBACK}=1).",
    ),
]


def flowing(command: Callable[..., None]) -> Callable[..., None]:
    """Join the lines of each paragraph in a command's help, as typer would keep the source's line breaks.

    Examples, after ``\\b``, keep their lines.
    """
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    command.__doc__ = "\n\n".join(text if text.startswith("\b") else text.replace("\n", " ") for text in paragraphs)
    return command


def check_sampling(temperature: float | None, top_p: float | None, greedy: str) -> None:
    """Check the options of sampling.

    Args:
        temperature, top_p: the options.
        greedy: option for greedy decoding, which the error names.

    Raises:
        CommandError: if one is out of range.
    """
    if temperature is not None and not MIN_TEMPERATURE <= temperature < float("inf"):
        raise CommandError(
            f"--temperature must be at least {MIN_TEMPERATURE:g}, got {temperature}; "
            f"for the likeliest token use {greedy}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise CommandError(f"--top-p must be above 0 and at most 1, got {top_p}")


def read_speculate(value: str | None) -> int | str | None:
    """Return the value of ``--speculate``.

    Raises:
        CommandError: if it is neither a number nor ``auto`` nor ``off``.
    """
    if value is None or value in ("auto", "off"):
        return value
    if not value.isascii() or not value.isdigit():
        raise CommandError(f"--speculate must be auto, off or a number of tokens, got {value}")
    return int(value)


def print_job(outcome: JobOutcome, output: Path, as_json: bool, totals: Mapping[str, Any] | None) -> bool:
    """Print how a job ended, for programs or where tasks are still to run. Return whether it printed anything.

    Args:
        outcome: how it ended.
        output: folder of the job.
        as_json: print JSON.
        totals: the job's summary; None while tasks are still to run.
    """
    if outcome.script is not None:
        print(outcome.script, end="")
    elif as_json:
        known = {"output": str(outcome.result), "job": outcome.job, "finished_before": outcome.finished_before}
        print_json(known | dict(totals or {}) | {"seconds": round(outcome.seconds, 4)})
    elif totals is None:
        print(f"job {outcome.job} submitted; its last task writes {outcome.result}")
        print(f"log: {output / 'logs'}. If tasks fail, the same command again does what is missing.")
    else:
        return False
    return True


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object to standard output."""
    print(json_text(value), end="", flush=True)
