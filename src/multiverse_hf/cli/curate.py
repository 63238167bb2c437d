"""``multiverse curate``: its options and its output. The curator is imported when it runs."""

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
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder. The same command continues a run.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="ROWS", help="Traces: a .jsonl, .json, .parquet or .csv file, or a dataset's name."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME", help="The endpoint's name of the model.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Any OpenAI-compatible endpoint, with OPENAI_API_KEY; by default Hugging Face's, with HF_TOKEN.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="YAML", help="Settings; options override them.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Concurrent calls of a task; by default 64.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the calls; by default 0.")] = None,
    max_attempts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Attempts per stage; by default 4.")
    ] = None,
    max_outage: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop after this time without an answered call; by default 120."),
    ] = None,
    judge: Annotated[
        bool | None, typer.Option("--judge/--no-judge", help="Let a model check too that paths are independent.")
    ] = None,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="Subset of a dataset that has several.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of a dataset, e.g. train[:100]; by default train.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write a report of the folder's rows, report.html.")
    ] = False,
    executor: Annotated[
        Executor, typer.Option(metavar="NAME", help="local, slurm or ray.", rich_help_panel=_PANEL)
    ] = Executor.LOCAL,
    tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Shares of the rows.", rich_help_panel=_PANEL)] = 1,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Concurrent tasks; here by default one per core.", rich_help_panel=_PANEL
        ),
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
    """Turn reasoning traces into parallel documents with a language model, and keep those that pass all checks.

    A row has a problem and reasoning about it. Five stages find its independent parts and quote its text.
    datasets_scripts/build_multiverse_1k.py reads the result, FOLDER/curated.jsonl. The same command continues a run
    that was cut off, and no call is paid for twice.

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
        raise CommandError("no rows; name them with --input, or write the report of a run with --report")
    if source is not None:
        options = {"model": model, "base_url": base_url, "concurrency": concurrency, "seed": seed, "judge": judge}
        options |= {"max_attempts": max_attempts, "max_outage_s": max_outage, "subset": subset, "split": split}
        cluster = Cluster(partition, time, sbatch or [], cpus_per_task, None, mem_per_cpu, dry_run)
        outcome = run_curation(
            Curation(
                source,
                output,
                load_settings(config, **options),
                tasks=tasks,
                workers=workers,
                executor=executor,
                cluster=cluster,
            )
        )
        print_curation(outcome, output, as_json)
    if report:
        from multiverse_hf.curator.report import write_curation_report

        print(write_curation_report(output))


def print_curation(outcome: JobOutcome, output: Path, as_json: bool) -> None:
    """Print how a curation ended."""
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
