"""Shared output of benchmarks: device, versions and commit, and a median with its spread."""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from multiverse_hf.errors import CommandError, ScriptParser
from multiverse_hf.outputs import check_output, write_output
from multiverse_hf.provenance import commit, hardware, versions

T = TypeVar("T")


def count(text: str) -> int:
    """Read an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def output_file(text: str) -> Path:
    """Read the name of a file to write, and try now whether it can be written."""
    try:
        check_output(Path(text))
    except CommandError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    return Path(text)


def make_parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """Make a benchmark's parser from its module's docstring, with the flags all benchmarks share."""
    description, _, examples = (doc or "").partition("\n\n    python")
    parser = ScriptParser(description=description, epilog="examples:\n    python" + examples)
    parser.add_argument("--repeats", type=count, default=repeats, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=None, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and problems (default: %(default)s)")
    parser.add_argument("--output", type=output_file, default=None, help="also write the result to this JSON file")
    return parser


@torch.no_grad()
def seconds_of_passes(model: Any, passes: Iterable[tuple[int, int]]) -> float:
    """Estimate how long forward passes take here, from a pass of one token and one of 32.

    Args:
        model: a causal LM.
        passes: (how many, tokens of all of them), any number of times. What a pass attends to counts for nothing.
    """

    def time_pass(num_tokens: int) -> float:
        begin = time.perf_counter()
        output = model(input_ids=torch.full((1, num_tokens), 100, device=model.device), use_cache=False)
        output.logits[0, -1, 0].item()  # waits for the device
        return time.perf_counter() - begin

    time_pass(1)  # warms up
    one, many = time_pass(1), time_pass(32)
    token = max(many - one, 0) / 31
    return sum(number * (one - token) + num_tokens * token for number, num_tokens in passes)


def announce(seconds: float) -> None:
    """Print how long the measurements will take, before the first of them."""
    span = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(seconds, 1):.0f} s"
    print(f"this will take about {span} here; the bar shows what is left", flush=True)


def shown(items: Iterable[T], unit: str) -> Iterator[T]:
    """Yield what is measured one after the other, with a bar that says how much longer it takes.

    The bar is there in a log too. It knows the time after its first measurement; :func:`announce` says it before.
    """
    yield from tqdm(items, unit=f" {unit}", file=sys.stderr, mininterval=1, smoothing=0)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return where and on what a result was measured: device, versions, load, command and commit.

    Args:
        device: where the model is; the CPU by default.
    """
    return {
        **hardware(device),
        "versions": versions(),
        "command": shlex.join(["python", _from_root(Path(sys.argv[0])), *map(_without_folder, sys.argv[1:])]),
        # what an earlier benchmark stored makes no difference to what is measured
        "commit": commit(leave_out=["benchmarks/results"]),
    }


def show_environment(result: dict[str, Any]) -> None:
    """Print what :func:`environment` gave, for people."""
    print(f"{result['device']}, {result['cores']} cores, {result['threads']} threads, load {result['load_average']}")
    print(f"{result['versions']}, commit {result['commit']}", flush=True)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and greatest of some repeats."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def show(value: dict[str, float], unit: str = "") -> str:
    """Write what :func:`spread` gave: the median, and the range in brackets."""
    return f"{value['median']:.4g}{unit} [{value['min']:.4g}, {value['max']:.4g}]"


def store(result: dict[str, Any], output: Path | None) -> None:
    """Store what there is of a result, if asked to: a long run that is stopped leaves the part it did."""
    if output is not None:
        write_output(output, json.dumps(result, indent=2) + "\n")


def finish(result: dict[str, Any], output: Path | None) -> None:
    """Print a result as one JSON line, the last one, and store it if asked to."""
    store(result, output)
    print(json.dumps(result))


def _without_folder(argument: str) -> str:
    """Leave out of an absolute path what is true of this machine only."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _from_root(script: Path) -> str:
    root = Path(__file__).resolve().parent.parent
    script = script.resolve()
    return str(script.relative_to(root)) if script.is_relative_to(root) else script.name
