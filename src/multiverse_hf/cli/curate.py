"""``multiverse curate``: its options, and how a run ended. What it does is imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from multiverse_hf.cli.options import (
    CpusOption,
    DryRunOption,
    JsonOption,
    MemoryOption,
    PartitionOption,
    SbatchOption,
    TimeOption,
    TracebackOption,
    print_job,
)
from multiverse_hf.errors import CommandError
from multiverse_hf.jobs.options import Cluster, Executor, JobOutcome

_PANEL = "Tasks"  # panel of the help


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
        typer.Option(
            metavar="URL",
            help="Any OpenAI-compatible endpoint, with OPENAI_API_KEY; by default Hugging Face's, with HF_TOKEN.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Settings; options given here go before them.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calls of a task at once; by default 64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the calls; by default 0.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Times a stage is asked; by default 4.")
    ] = None,
    max_outage: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop when calls fail for this long, none answered; by default 120."),
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
        Executor, typer.Option(metavar="NAME", help="local, slurm or ray.", rich_help_panel=_PANEL)
    ] = Executor.LOCAL,
    tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Shares of the rows.", rich_help_panel=_PANEL)] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tasks at once; here by default one a core.", rich_help_panel=_PANEL),
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
    quote its own text; FOLDER/curated.jsonl is what datasets_scripts/build_multiverse_1k.py takes. The same command
    again takes up a run that was cut off, and no call is paid for twice.

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
        options |= {"max_attempts": max_attempts, "max_outage_s": max_outage, "subset": subset, "split": split}
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
        from multiverse_hf.curator.report import write_curation_report

        print(write_curation_report(output))


def print_curation(outcome: JobOutcome, output: Path, as_json: bool) -> None:
    """Say how a curation ended."""
    summary = outcome.summary
    if print_job(outcome, output, as_json, summary):
        return
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
