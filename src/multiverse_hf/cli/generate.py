"""``multiverse generate``: answer a prompt, or a file of them."""

import dataclasses
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from multiverse_hf.batch.launch import Batch, run_batch
from multiverse_hf.checkpoints import (
    MAX_NUM_SEQS,
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
    CLUSTER,
    AttentionOption,
    CpusOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    JsonOption,
    LiveOption,
    MaxNewTokensOption,
    MemoryOption,
    ModelOption,
    PartitionOption,
    SbatchOption,
    ThreadsOption,
    TimeOption,
    TracebackOption,
    check_sampling,
    print_job,
    print_json,
    read_speculate,
)
from multiverse_hf.cli.terminal import waiting, wants_live
from multiverse_hf.data.chains import ONLY_CHAINS, is_problem
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.jobs.options import Cluster, Executor, JobOutcome

LIMITS = {"length": "--max-new-tokens", "max_total_tokens": "--max-total-tokens", "max_time": "--max-time"}
MANY = "Many prompts"  # panel of the help


class StructureMode(StrEnum):
    """Treatment of control tags."""

    GUIDED = "guided"
    LENIENT = "lenient"
    OFF = "off"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The problem; - or nothing reads standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="PATH", help="Read the prompt from a file.")
    ] = None,
    model: ModelOption = None,
    suffix: Annotated[
        Suffix | None,
        typer.Option(
            metavar="KIND", help="Sentence at the prompt's end: parallel, sequential or none; by default the family's."
        ),
    ] = None,
    structure: Annotated[
        StructureMode,
        typer.Option(metavar="MODE", help="guided: well-formed blocks only; lenient: any tags; off: no branches."),
    ] = StructureMode.GUIDED,
    max_new_tokens: MaxNewTokensOption = 2048,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most tokens of all paths together.")
    ] = None,
    max_path_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most tokens of one path.")] = None,
    max_depth: Annotated[int | None, typer.Option(min=0, metavar="N", help="Most nested blocks.")] = None,
    max_paths: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most paths of one block.")] = None,
    speculate: Annotated[
        str | None,
        typer.Option(metavar="N", help="Tokens each branch drafts for a step to check: a number, auto or off."),
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Time limit; then open branches are closed.")
    ] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Sample or not; by default as the model's family.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="X", help="Temperature; turns sampling on.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="X", help="Nucleus sampling; turns sampling on.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of the sampling, for a reproducible answer.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    live: LiveOption = None,
    as_json: JsonOption = False,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="JSONL", help="Rows with a prompt or messages.", rich_help_panel=MANY),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder for their answers. The same command continues a run.", rich_help_panel=MANY
        ),
    ] = None,
    executor: Annotated[
        Executor | None,
        typer.Option(metavar="NAME", help="local (default), slurm or ray.", rich_help_panel=MANY),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Shares of the rows; by default 1.", rich_help_panel=MANY)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Concurrent tasks, each with its own model; here by default one per GPU, or per core.",
            rich_help_panel=MANY,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help=f"Concurrent answers of a task; by default {MAX_NUM_SEQS}.", rich_help_panel=MANY
        ),
    ] = None,
    max_cache_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens in a task's cache.", rich_help_panel=MANY)
    ] = None,
    partition: PartitionOption = None,
    time: TimeOption = None,
    cpus_per_task: CpusOption = None,
    gpus_per_task: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="GPUs per task; by default none.", rich_help_panel=CLUSTER)
    ] = None,
    mem_per_cpu: MemoryOption = None,
    sbatch: SbatchOption = None,
    dry_run: DryRunOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Answer a prompt, or a file of them.

    In a terminal the branches of an answer grow side by side. With --input, tasks on this machine or on a cluster
    answer the rows of a file. The same command continues a run that was cut off, and never repeats a finished row.

    \b
    Examples:
      multiverse generate "A=19-7+12; B=8+15-3; total?"
      multiverse generate --file problem.txt --json
      echo "A=5+6; B=7+8; total?" | multiverse generate --plain
      multiverse generate --model ./my-checkpoint --temperature 0.6 --seed 1 "..."
      multiverse generate --input prompts.jsonl --output out --tasks 4
      multiverse generate --input prompts.jsonl --output out --tasks 64 \\
        --executor slurm --partition gpu --time 4:00:00 --gpus-per-task 1
    """
    shows_live = wants_live(live, as_json)
    check_sampling(temperature, top_p, "--greedy")
    if temperature is not None or top_p is not None:
        if do_sample is False:
            raise CommandError("--greedy takes no --temperature or --top-p; leave one out")
        do_sample = True
    options = {
        "structure": structure.value,
        "max_new_tokens": max_new_tokens,
        "max_total_tokens": max_total_tokens,
        "max_path_tokens": max_path_tokens,
        "max_depth": max_depth,
        "max_paths": max_paths,
        "speculate": read_speculate(speculate),
        "max_time": max_time,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    cluster = {
        **{"partition": partition, "time": time, "sbatch": sbatch, "dry_run": dry_run or None},
        **{"cpus_per_task": cpus_per_task, "gpus_per_task": gpus_per_task, "mem_per_cpu": mem_per_cpu},
    }
    many = {
        **{"tasks": tasks, "workers": workers, "executor": executor},
        **{"max_num_seqs": max_num_seqs, "max_cache_tokens": max_cache_tokens},
    }
    if wants_many(source, output, {"PROMPT": prompt, "--file": file, "--live": live or None}, many | cluster):
        asked = {name: value for name, value in many.items() if value is not None}
        asked["cluster"] = Cluster(**{name: value for name, value in cluster.items() if value is not None})
        outcome = run_batch(Batch(source, output, model, suffix, options, dtype, attn, device, threads, **asked))
        print_outcome(outcome, output, as_json)
        return
    text = read_prompt(prompt, file)
    with waiting("loading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        text = (suffix or checkpoint.suffix).end(text)
        ids = checkpoint.encode(text)
        loaded = load_model(checkpoint, dtype, attn, device, threads)
    if checkpoint.is_embedded and not is_problem(text):
        print(f"note: {ONLY_CHAINS}", file=sys.stderr)
    options, said = checkpoint.with_record(options), options
    taken = {name: value for name, value in options.items() if value != said.get(name)}
    if as_json:
        answer = answer_prompt(loaded, checkpoint, ids, **options)
        record = {"family": checkpoint.tags.names.name, "of_record": taken}
        print_json({"prompt": text, **answer.to_dict(), "model": checkpoint.name, **record})
    else:
        if taken:
            shown = ", ".join(f"{name} {value}" for name, value in taken.items())
            print(f"note: sampling of record of {checkpoint.tags.names.name}: {shown}", file=sys.stderr)
        show_answer(loaded, checkpoint, ids, shows_live and structure is not StructureMode.OFF, **options)


def show_answer(
    model: Any, checkpoint: Checkpoint, ids: Sequence[int], live: bool, *, max_new_tokens: int, **options: Any
) -> Answer:
    """Answer a prompt and show the answer while it is written: its branches side by side, or plain text."""
    options["max_new_tokens"] = max_new_tokens
    if live:
        console = Console(force_terminal=True)
        with LiveView(console, checkpoint.decode, checkpoint.tags.roles) as view:
            answer = answer_prompt(model, checkpoint, ids, view, **options)
        console.print(_summary(answer), style="dim")
        return answer
    answer = answer_prompt(model, checkpoint, ids, TextStream(sys.stdout, checkpoint.decode), **options)
    room = (getattr(checkpoint.config, "max_position_embeddings", None) or float("inf")) - len(ids)
    if note := _cut_off(answer, room, max_new_tokens):
        print(f"note: {note}", file=sys.stderr)
    return answer


def wants_many(source: Path | None, output: Path | None, single: dict[str, Any], many: dict[str, Any]) -> bool:
    """Return whether to answer a file of prompts.

    Args:
        source, output: input file and output folder.
        single: options for one prompt only, by name; None if not given.
        many: options for a file only, likewise.

    Raises:
        CommandError: if the options do not fit together.
    """
    if source is None:
        given = ["--output"] * (output is not None) + [name for name, value in many.items() if value is not None]
        if given:
            raise CommandError(
                f"--{given[0].strip('-').replace('_', '-')} is for many prompts; give them with --input"
            )
        return False
    if output is None:
        raise CommandError("--input needs --output, the folder for the answers")
    if given := [name for name, value in single.items() if value is not None]:
        raise CommandError(f"{given[0]} and --input exclude each other; leave one out")
    return True


def print_outcome(outcome: JobOutcome, output: Path, as_json: bool) -> None:
    """Print how a run over many prompts ended."""
    summary = outcome.summary
    if print_job(outcome, output, as_json, None if summary is None else dataclasses.asdict(summary)):
        return
    if outcome.finished_before == summary.rows:
        print(f"already complete: {summary.rows} rows")
    else:
        before = f", {outcome.finished_before} of them before" if outcome.finished_before else ""
        print(f"{summary.rows} rows in {outcome.seconds:.1f} s{before}")
    if summary.parallelism is not None:
        print(f"{summary.tokens} tokens, # parallel {summary.parallelism:.2f} on average")
    if summary.errors:
        print(f"{summary.errors} could not be answered; first {summary.first_error}", file=sys.stderr)
    print(outcome.result)


def _cut_off(answer: Answer, room: float, max_new_tokens: int) -> str | None:
    """Return which limit cut an answer off, and the next step; None if the answer is complete.

    Args:
        answer: the answer.
        room: positions of the context after the prompt.
        max_new_tokens: the limit that was asked for.
    """
    stats = answer.stats
    if stats.finish_reason == "stop":
        if not stats.num_closed:
            return None
        return f"{stats.num_closed} of the paths were cut off; raise --max-path-tokens or --max-new-tokens"
    if stats.finish_reason == "length" and max_new_tokens >= room:
        return f"the answer was cut off at length {stats.length}, where the model's context ends; shorten the prompt"
    option = LIMITS.get(stats.finish_reason, stats.finish_reason)
    return f"the answer was cut off at length {stats.length} by {option}; raise it"


def _summary(answer: Answer) -> Text:
    """Return one line about an answer's size and time."""
    stats = answer.stats
    return Text(
        f"\n{stats.num_tokens} tokens, length {stats.length}, # parallel {stats.parallelism:.2f}, "
        f"{stats.num_steps} steps, {answer.seconds:.1f} s, finished by {stats.finish_reason}"
    )


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from an argument, a file or standard input.

    Raises:
        CommandError: if there is no prompt, or it cannot be read.
    """
    if prompt not in (None, "-") and file is not None:
        raise CommandError("both a prompt and --file were given; give one of them")
    if file is not None:
        source = f"file {file}"
        try:
            data = file.read_bytes()
        except OSError as err:
            raise CommandError(f"cannot read {source}: {err.strerror or err}; check the path") from err
    elif prompt is None or prompt == "-":
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):  # None: closed by the shell
            raise CommandError("no prompt; give it as an argument, with --file, or on standard input")
        source, data = "standard input", sys.stdin.buffer.read()
    else:
        source, data = "prompt", prompt.encode("utf-8", errors="surrogateescape")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as err:
        raise CommandError(f"the {source} is not UTF-8 text ({err.reason} at byte {err.start}); convert it") from err
    if not text:
        raise CommandError(f"the {source} is empty; give the problem to answer")
    return text
