"""``multiverse``: run a model from the command line, and see its branches while they are written.

torch and transformers are imported inside the commands that run a model, so that ``--help`` answers at once.
"""

import contextlib
import dataclasses
import difflib
import os
import shutil
import sys
import traceback as tracebacks
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from multiverse_hf import __version__
from multiverse_hf.batch.launch import run_batch
from multiverse_hf.batch.options import MAX_NUM_SEQS, Batch, Outcome
from multiverse_hf.checkpoints import (
    Answer,
    Attention,
    Dtype,
    answer_prompt,
    load_model,
    load_weights,
    open_checkpoint,
    quiet,
)
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.demo import REPEATS, demo_problems, demo_report, print_report, show_problems, time_modes
from multiverse_hf.display import LiveView, TextStream
from multiverse_hf.errors import FAILURE, INTERRUPTED, USAGE, CommandError, one_line
from multiverse_hf.evaluation import cli as evaluation_cli
from multiverse_hf.jobs.options import Cluster, Executor
from multiverse_hf.options import (
    CLUSTER,
    TRACEBACK,
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
    print_json,
)
from multiverse_hf.outputs import check_new_folder, new_folder

LIMITS = {"length": "--max-new-tokens", "max_total_tokens": "--max-total-tokens", "max_time": "--max-time"}

MANY, TASKS = "Many prompts", "Tasks"  # panels of the help

# typer has no public name for the base of what it raises on bad usage, in some versions click's and in some its own.
_UsageException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class StructureMode(StrEnum):
    """How the control tags are treated."""

    GUIDED = "guided"
    LENIENT = "lenient"
    OFF = "off"


app = typer.Typer(name="multiverse", add_completion=False, pretty_exceptions_enable=False)


def _show_version(value: bool) -> None:
    if value:
        print(f"multiverse {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def multiverse(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run models that split, write in parallel and merge their own answers.

    \b
    Examples:
      multiverse demo
      multiverse generate "A=19-7+12; B=8+15-3; total?"
      multiverse generate --help
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


# Prompts


def read_prompt(prompt: str | None, file: Path | None, suffix: Suffix) -> str:
    """Take the prompt from where the user put it, and end it with the suffix of record.

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
    return suffix.end(text)


def wants_live(live: bool | None, as_json: bool) -> bool:
    """Say whether to show branches side by side.

    Raises:
        CommandError: if that and JSON were both asked for.
    """
    if as_json and live:
        raise CommandError("--json and --live exclude each other; leave one out")
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return not as_json and (is_terminal if live is None else live)


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Show in a terminal that something takes its time."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        yield


# Commands


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The problem; - or none: standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="PATH", help="Read the prompt from a file.")
    ] = None,
    model: ModelOption = None,
    suffix: Annotated[
        Suffix, typer.Option(metavar="KIND", help="Sentence that ends the prompt: parallel, sequential or none.")
    ] = Suffix.PARALLEL,
    structure: Annotated[
        StructureMode,
        typer.Option(metavar="MODE", help="guided: well-formed blocks only; lenient: any tags; off: no branches."),
    ] = StructureMode.GUIDED,
    max_new_tokens: MaxNewTokensOption = 2048,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of all paths together.")
    ] = None,
    max_path_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Length of one path.")] = None,
    max_depth: Annotated[int | None, typer.Option(min=0, metavar="N", help="Blocks inside each other.")] = None,
    max_paths: Annotated[int | None, typer.Option(min=1, metavar="N", help="Paths of one block.")] = None,
    max_time: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Time; then open branches are closed.")
    ] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Draw tokens; by default what the checkpoint says.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="X", help="Of the draws; turns them on.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Draw among the likeliest tokens only; turns draws on.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Of the draws, to have the same answer again.")
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
        typer.Option(metavar="FOLDER", help="Their answers; the same command again goes on.", rich_help_panel=MANY),
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
            help="Tasks at once, each with its own model; here by default one for each GPU, or each core.",
            rich_help_panel=MANY,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help=f"Answers a task writes at once; by default {MAX_NUM_SEQS}.", rich_help_panel=MANY
        ),
    ] = None,
    max_cache_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a task's cache holds.", rich_help_panel=MANY)
    ] = None,
    partition: PartitionOption = None,
    time: TimeOption = None,
    cpus_per_task: CpusOption = None,
    gpus_per_task: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="By default none.", rich_help_panel=CLUSTER)
    ] = None,
    mem_per_cpu: MemoryOption = None,
    sbatch: SbatchOption = None,
    dry_run: DryRunOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Answer a prompt, or a file of them.

    In a terminal the branches of one answer appear side by side as they are written. With --input each row of a file
    is answered, by tasks on this machine or on a cluster. A run that was cut off is gone on with by the same command:
    rows that are finished are never done again.

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
    text = read_prompt(prompt, file, suffix)
    with waiting("loading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        ids = checkpoint.encode(text)
        loaded = load_model(checkpoint, dtype, attn, device, threads)
    if as_json:
        answer = answer_prompt(loaded, checkpoint, ids, **options)
        print_json({"prompt": text, **answer.to_dict(), "model": checkpoint.name})
    elif shows_live and structure is not StructureMode.OFF:
        console = Console(force_terminal=True)
        with LiveView(console, checkpoint.decode, checkpoint.tags) as view:
            answer = answer_prompt(loaded, checkpoint, ids, view, **options)
        console.print(_summary(answer), style="dim")
    else:
        answer = answer_prompt(loaded, checkpoint, ids, TextStream(sys.stdout, checkpoint.decode), **options)
        room = (getattr(checkpoint.config, "max_position_embeddings", None) or float("inf")) - len(ids)
        if note := _cut_off(answer, room, max_new_tokens):
            print(f"note: {note}", file=sys.stderr)


def wants_many(source: Path | None, output: Path | None, single: dict[str, Any], many: dict[str, Any]) -> bool:
    """Say whether a file of prompts is to be answered.

    Args:
        source, output: of it.
        single: options that one prompt takes and a file does not, by name; None where not given.
        many: the other way round.

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


def print_outcome(outcome: Outcome, output: Path, as_json: bool) -> None:
    """Say how a run over many prompts ended."""
    summary = outcome.summary
    if outcome.script is not None:
        print(outcome.script, end="")
        return
    if as_json:
        report = {"output": str(outcome.answers), "job": outcome.job, "finished_before": outcome.finished_before}
        print_json(report | (dataclasses.asdict(summary) if summary else {}) | {"seconds": round(outcome.seconds, 4)})
        return
    if summary is None:
        print(f"job {outcome.job} submitted; its last task writes {outcome.answers}")
        print(f"log: {output / 'logs'}. If tasks fail, the same command again does what is missing.")
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
    print(outcome.answers)


def _cut_off(answer: Answer, room: float, max_new_tokens: int) -> str | None:
    """Say what cut an answer off and how to have more of it; None if it is whole.

    Args:
        answer: the answer.
        room: positions that the context leaves after the prompt.
        max_new_tokens: as asked for.
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
    """Say in a line what an answer cost."""
    stats = answer.stats
    return Text(
        f"\n{stats.num_tokens} tokens, length {stats.length}, # parallel {stats.parallelism:.2f}, "
        f"{stats.num_steps} steps, {answer.seconds:.1f} s, finished by {stats.finish_reason}"
    )


@app.command()
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


@app.command()
def curate(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="For the rows; the same command again goes on.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="ROWS", help="Traces: a .jsonl, .json, .parquet or .csv file, or a dataset's name."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="As the endpoint calls it.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Any OpenAI-compatible endpoint; by default Hugging Face's, with HF_TOKEN."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Settings; options go before what is there.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calls of a task at once; by default 64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the calls; by default 0.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Times a stage is asked; by default 4.")
    ] = None,
    judge: Annotated[
        bool | None, typer.Option("--judge/--no-judge", help="Have a model check that paths stand alone, too.")
    ] = None,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="Of a dataset that has several.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a dataset, e.g. train[:100]; by default train.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Draw the folder's rows as a page, report.html.")] = False,
    executor: Annotated[
        Executor, typer.Option(metavar="NAME", help="local, slurm or ray.", rich_help_panel=TASKS)
    ] = Executor.LOCAL,
    tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Shares of the rows.", rich_help_panel=TASKS)] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tasks at once; here by default one a core.", rich_help_panel=TASKS),
    ] = None,
    partition: PartitionOption = None,
    time: TimeOption = None,
    cpus_per_task: CpusOption = None,
    mem_per_cpu: MemoryOption = None,
    sbatch: SbatchOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Turn reasoning traces into parallel documents with a language model, and keep only those that pass all checks.

    A row has a problem and somebody's reasoning about it. Five stages find what in it can be written side by side, and
    quote its own text; FOLDER/curated.jsonl is what datasets_scripts/build_multiverse_1k.py takes. A run that was cut
    off is gone on with by the same command, and no call is paid for twice.

    \b
    Examples:
      multiverse curate --input traces.jsonl --output out --model Qwen/Qwen3-235B-A22B-Instruct-2507
      multiverse curate --input simplescaling/s1K-1.1 --split "train[:20]" --output try --config curate.yaml
      multiverse curate --input traces.jsonl --output out --model local --base-url http://localhost:8000/v1 --tasks 4
      multiverse curate --output out --report
    """
    from multiverse_hf.curator.launch import run_curation
    from multiverse_hf.curator.options import Curation, load_settings

    if source is None and not report:
        raise CommandError("no rows; name them with --input, or draw those of a run with --report")
    if source is not None:
        options = {"model": model, "base_url": base_url, "concurrency": concurrency, "seed": seed, "judge": judge}
        options |= {"max_attempts": max_attempts, "subset": subset, "split": split}
        cluster = {"partition": partition, "time": time, "sbatch": sbatch, "dry_run": dry_run or None}
        cluster |= {"cpus_per_task": cpus_per_task, "mem_per_cpu": mem_per_cpu}
        outcome = run_curation(
            Curation(
                source,
                output,
                load_settings(config, **options),
                tasks=tasks,
                workers=workers,
                executor=executor,
                cluster=Cluster(**{name: value for name, value in cluster.items() if value is not None}),
            )
        )
        print_curation(outcome, output, as_json)
    if report:
        from multiverse_hf.curator.report import write_report

        print(write_report(output))


def print_curation(outcome: Any, output: Path, as_json: bool) -> None:
    """Say how a curation ended."""
    summary = outcome.summary
    if outcome.script is not None:
        print(outcome.script, end="")
    elif as_json:
        known = {"output": str(outcome.result), "job": outcome.job, "finished_before": outcome.finished_before}
        print_json(known | (summary or {}) | {"seconds": round(outcome.seconds, 4)})
    elif summary is None:
        print(f"job {outcome.job} submitted; its last task writes {outcome.result}")
        print(f"log: {output / 'logs'}. If tasks fail, the same command again does what is missing.")
    else:
        rejected = sum(summary["rejected"].values())
        before = f", {outcome.finished_before} of them before" if outcome.finished_before else ""
        print(f"{summary['rows']} rows in {outcome.seconds:.1f} s{before}")
        print(f"{summary['accepted']} accepted, {rejected} rejected")
        prompt, completion = (
            summary["tokens"].get(kind, 0) + summary["judge_tokens"].get(kind, 0) for kind in ("prompt", "completion")
        )
        cost = "" if summary["cost"] is None else f", ${summary['cost']:.2f}"
        print(f"{sum(summary['asked'].values())} calls, {prompt} tokens asked and {completion} answered{cost}")
        for reason, count in sorted(summary["rejected"].items(), key=lambda each: -each[1])[:5]:
            print(f"  {count} rejected at {reason}")
        print(outcome.result)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Folder that a LoRA run wrote.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the merged checkpoint to.")],
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="The base model, if it is no longer where the run found it.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Add a LoRA adapter to its base: an ordinary checkpoint, which any loader takes.

    \b
    Examples:
      multiverse merge --adapter runs/llama3.1-8b/multiverse-lora --output my-model
      multiverse merge --adapter runs/lora --base ./Llama-3.1-8B-Instruct --output my-model --dtype bfloat16
    """
    check_new_folder(output)
    with waiting("merging"):
        quiet()
        try:
            from multiverse_hf.training.merging import merge_adapter

            model, tokenizer = merge_adapter(adapter, base, dtype.value)
        except ModuleNotFoundError as err:
            raise CommandError(f"{err.name} is missing; pip install 'multiverse_hf[train]'", FAILURE) from err
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
            raise CommandError(f"cannot merge {adapter}: {one_line(err)}") from err
        save_checkpoint(model, tokenizer, output, adapter / "run.json")


@app.command()
def export(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PATH", help="Checkpoint whose tokenizer has the tags.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint that branches wherever transformers is: its weights, and the code beside them.

    For a checkpoint that has the tags and was saved without the code, as the published Multiverse-32B. What is written
    is an ordinary checkpoint of its architecture to every loader that is not given trust_remote_code=True.

    \b
    Examples:
      multiverse export --model ./my-tagged-qwen --output my-multiverse
      multiverse export --model multiverse-tiny --output tiny
    """
    check_new_folder(output)
    with waiting("reading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        loaded = load_weights(checkpoint, dtype.value, None)
    with waiting("writing"):
        save_checkpoint(loaded, checkpoint.tokenizer, output)


def save_checkpoint(model: Any, tokenizer: Any, output: Path, record: Path | None = None) -> None:
    """Write a checkpoint whole or not at all, with the record of its training if there is one, and say what it is."""
    from safetensors import SafetensorError

    with new_folder(output) as folder:
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if record is not None and record.is_file():
                shutil.copyfile(record, folder / record.name)
        except (OSError, SafetensorError) as err:
            raise CommandError(f"cannot write {output}: {one_line(err, 120)}", FAILURE) from err
        except ValueError as err:  # what its own generation config says cannot be
            raise CommandError(f"{model.name_or_path} cannot be saved: {one_line(err, 200)}") from err
    print(f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")


app.command("eval")(evaluation_cli.evaluate)
app.command()(evaluation_cli.compare)
app.add_typer(evaluation_cli.experiments, name="experiment")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code."""
    if sys.stderr is None:  # closed by the shell: what is said there is for nobody, and should not land elsewhere
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        print("error: standard output is closed; send it to a file or to another program", file=sys.stderr)
        return USAGE
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    error: Exception
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="multiverse", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CommandError as err:
        error, message, code = err, one_line(err), err.code
    except _UsageException as err:
        error, message, code = err, _describe_usage(err), USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as err:  # the last resort of the command line: a line, not a traceback
        error, message, code = err, _describe(err), FAILURE
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        tracebacks.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return code


def _describe_usage(error: Any) -> str:
    """Say what is wrong with a command line, with the closest option where one is unknown, and where help is."""
    message = one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
    option = getattr(error, "option_name", None)
    if option is not None and (close := difflib.get_close_matches(option, error.possibilities or [], 1)):
        message = f"No such option: {option}. Did you mean {close[0]}?"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "multiverse"
    return f"{message} (see {command} --help)"


def _describe(error: Exception) -> str:
    """Say what an error nobody expected means, and how to see more of it."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory; lower --max-new-tokens or --max-paths, or use --dtype bfloat16 or --device cpu"
    return f"{one_line(error)} ({type(error).__name__}; --traceback shows where)"


def main() -> None:
    """Entry point of ``multiverse``."""
    sys.exit(run())


if __name__ == "__main__":
    main()
