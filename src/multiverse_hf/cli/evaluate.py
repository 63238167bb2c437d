"""``multiverse eval``, ``multiverse compare`` and ``multiverse experiment``: their options.

Their modules are imported when they run, so that ``--help`` answers at once.
"""

import functools
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from multiverse_hf.checkpoints import EMBEDDED_NAMES, MAX_NUM_SEQS, Attention, Dtype
from multiverse_hf.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    ThreadsOption,
    TracebackOption,
    check_sampling,
    flowing,
    print_json,
)
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import AnswerKind
from multiverse_hf.evaluation.tasks import MAX_NEW_TOKENS, TASKS, Mode
from multiverse_hf.outputs import check_output

SamplesOption = Annotated[int, typer.Option("--n", min=1, metavar="N", help="Answers per problem.")]
SeedOption = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0, metavar="X", help="Temperature; 0 is greedy. By default that of the family.")
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Nucleus sampling: draw among the likeliest tokens with this probability together. By default that of "
        "the family.",
    ),
]
MaxNumSeqsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Concurrent answers.")]

TaskOption = Annotated[
    str, typer.Option("--task", "-t", metavar="NAME", help=f"One of: {', '.join(TASKS)}; rg:GENERATOR; or FILE.jsonl.")
]
DataDirOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Local rows, such as aime25.jsonl, instead of the Hub's.")
]
LimitOption = Annotated[int, typer.Option(min=1, metavar="N", help="Only the first problems of the task.")]
RepeatsOption = Annotated[int, typer.Option(min=1, metavar="N", help="Timed runs per answer, in turns.")]
CacheOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens in the cache.")]
ExperimentOutput = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for figure and results.")]
RuleOption = Annotated[
    AnswerKind | None,
    typer.Option(
        metavar="RULE",
        help="How answers to your own rows are judged: math (default), letter (A to D), exact (same text), chains.",
    ),
]

SUITE = "A whole table"  # panel of the help
experiments = typer.Typer(add_completion=False, help="The paper's experiments, each with its figure.")


class Suite(StrEnum):
    """Sets of evaluations."""

    PAPER = "paper"


def read_counts(option: str, text: str) -> list[int]:
    """Return the integers of ``1,2,4``.

    Raises:
        CommandError: if the text is not of this form.
    """
    try:
        values = sorted({int(each) for each in text.split(",")})
    except ValueError:
        values = [0]
    if values[0] < 1:
        raise CommandError(f"{option} takes integers of at least 1 with commas between them, got {text!r}")
    return values


def evaluate(
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="NAME",
            help=f"Any number of: {', '.join(TASKS)}; a generator of reasoning-gym as rg:NAME, with options as "
            "rg:NAME,seed=7,size=50,OPTION=VALUE; your own rows as FILE.jsonl, with problem and answer.",
        ),
    ] = None,
    rule: RuleOption = None,
    output: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Answers, results.json and report. The same command continues a run."),
    ] = Path("runs/eval"),
    model: ModelOption = None,
    revision: Annotated[str, typer.Option(metavar="NAME", help="Revision of a repository.")] = "main",
    mode: Annotated[
        Mode,
        typer.Option(
            metavar="MODE", help="parallel; zero: the sequential suffix, but free to branch; autoregressive."
        ),
    ] = Mode.PARALLEL,
    data_dir: DataDirOption = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only the first problems of each task. A greater limit extends a run."),
    ] = None,
    n: SamplesOption = 1,
    seed: SeedOption = 0,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    max_new_tokens: MaxNewTokensOption = MAX_NEW_TOKENS,
    system_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message before each problem.")
    ] = None,
    max_num_seqs: MaxNumSeqsOption = MAX_NUM_SEQS,
    max_cache_tokens: CacheOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    suite: Annotated[
        Suite | None,
        typer.Option(
            metavar="NAME", help="paper: table 2, base, autoregressive, zero and parallel.", rich_help_panel=SUITE
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Its base; random: random weights.", rich_help_panel=SUITE),
    ] = None,
    autoregressive: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model trained on the same data in sequential form.", rich_help_panel=SUITE),
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure a model: accuracy with intervals, # parallel, length, well-formedness.

    Every answer is stored at once, and the same command continues a run that was cut off. Neither that nor the number
    of concurrent answers changes an answer.

    \b
    Examples:
      multiverse eval --task mv:chains --limit 30
      multiverse eval --task mv:aime24 --task mv:math_500 --model OWNER/NAME --n 4 --output runs/mine
      multiverse eval --task mv:aime25 --data-dir ./rows --mode zero --output runs/zero
      multiverse eval --task my.jsonl --rule exact --output runs/my
      multiverse eval --task rg:leg_counting,size=50,max_animals=4 --task rg:products --output runs/gym
      multiverse eval --suite paper --limit 30 --output runs/table
    """
    from multiverse_hf.evaluation import commands
    from multiverse_hf.evaluation.settings import Evaluation
    from multiverse_hf.evaluation.tasks import load_problems

    check_sampling(temperature or None, top_p, "--temperature 0")
    asked = Evaluation(
        model, tuple(dict.fromkeys(task or ["mv:chains"])), mode, revision, data_dir, limit, n, seed, temperature,
        top_p, max_new_tokens, system_prompt, dtype, attn, device, threads, max_num_seqs, max_cache_tokens, rule,
    )  # fmt: skip
    if suite is not None:
        from multiverse_hf.evaluation.experiments.commands import run_experiment
        from multiverse_hf.evaluation.experiments.suite import measure_suite

        if mode is not Mode.PARALLEL:
            raise CommandError(f"--suite paper asks in all modes; leave out --mode {mode.value}")
        if model in (None, EMBEDDED_NAMES[0]):
            base, autoregressive = base or "random", autoregressive or EMBEDDED_NAMES[1]
        measure = functools.partial(measure_suite, asked, base, autoregressive, output, commands.evaluate_and_report)
        run_experiment("table", measure, output)
        return
    if base is not None or autoregressive is not None:
        raise CommandError(
            f"--{'base' if base is not None else 'autoregressive'} is a row of a table; add --suite paper"
        )
    check_output(output, is_folder=True)
    for each in asked.read_tasks():
        if each.file is not None or each.generator is not None:
            load_problems(each, limit=limit)  # what is wrong with it is found before seconds of loading
    with waiting("loading torch and transformers"):
        import multiverse_hf.modeling.modeling_multiverse  # noqa: F401 - takes seconds, before there is a progress bar
    results = commands.evaluate_and_report(asked, output)
    if as_json:
        print_json(results)
    else:
        commands.print_results(results, output)


@experiments.command()
@flowing
def budget(
    model: ModelOption = None,
    autoregressive: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Model trained on the same data in sequential form; --model needs it."),
    ] = None,
    task: TaskOption = "mv:chains",
    budgets: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Values of --max-new-tokens; by default nine from 128 to 1536."),
    ] = None,
    data_dir: DataDirOption = None,
    limit: LimitOption = 90,
    n: SamplesOption = 1,
    seed: SeedOption = 0,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    max_num_seqs: MaxNumSeqsOption = MAX_NUM_SEQS,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    output: ExperimentOutput = Path("runs/budget"),
    traceback: TracebackOption = False,
) -> None:
    """Figure 7: accuracy against the length budget, for the parallel model and its autoregressive twin.

    Every point is a separate evaluation in the folder, and the same command continues after a stop.

    \b
    Examples:
      multiverse experiment budget --limit 30 --budgets 128,256,512
      multiverse experiment budget --model OWNER/NAME --autoregressive OWNER/TWIN --task mv:math_500 \\
        --budgets 1024,2048,3072,4096 --limit 500
    """
    from multiverse_hf.evaluation import commands
    from multiverse_hf.evaluation.experiments.budget import BUDGETS, measure_budgets
    from multiverse_hf.evaluation.experiments.commands import run_experiment
    from multiverse_hf.evaluation.settings import Evaluation

    check_sampling(temperature or None, top_p, "--temperature 0")
    if autoregressive is None:
        if model not in (None, EMBEDDED_NAMES[0]):
            raise CommandError(f"{model} is compared with its autoregressive twin; name it with --autoregressive")
        autoregressive = EMBEDDED_NAMES[1]
    asked = Evaluation(
        model, (task,), data_dir=data_dir, limit=limit, num_samples=n, seed=seed, temperature=temperature,
        top_p=top_p, max_num_seqs=max_num_seqs, dtype=dtype, device=device, threads=threads,
    )  # fmt: skip
    values = BUDGETS if budgets is None else read_counts("--budgets", budgets)
    measure = functools.partial(measure_budgets, asked, autoregressive, values, output, commands.evaluate_and_report)
    run_experiment("budget", measure, output)


@experiments.command()
def latency(
    model: ModelOption = None,
    task: TaskOption = "mv:chains",
    data_dir: DataDirOption = None,
    limit: LimitOption = 30,
    repeats: RepeatsOption = 3,
    max_new_tokens: MaxNewTokensOption = 2048,
    max_cache_tokens: CacheOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    output: ExperimentOutput = Path("runs/latency"),
    traceback: TracebackOption = False,
) -> None:
    """Figure 8a: latency per token against # parallel, with the fit y = a / x + b and the share b / (a + b).

    \b
    Examples:
      multiverse experiment latency --threads 1
      multiverse experiment latency --model OWNER/NAME --task mv:math_500 --device cuda --max-new-tokens 8192
    """
    from multiverse_hf.evaluation.experiments.commands import run_experiment
    from multiverse_hf.evaluation.experiments.latency import measure_latency
    from multiverse_hf.evaluation.experiments.subject import Subject
    from multiverse_hf.evaluation.settings import Evaluation

    asked = Evaluation(
        model, (task,), data_dir=data_dir, limit=limit, temperature=0, max_new_tokens=max_new_tokens,
        max_cache_tokens=max_cache_tokens, dtype=dtype, attention=attn, device=device, threads=threads,
    )  # fmt: skip
    run_experiment("latency", lambda: measure_latency(Subject.load(asked), repeats), output)


@experiments.command()
def batch(
    model: ModelOption = None,
    task: TaskOption = "mv:chains",
    data_dir: DataDirOption = None,
    limit: LimitOption = 30,
    sizes: Annotated[str | None, typer.Option(metavar="N,N,...", help="Batch sizes; by default 1,2,4,8,16.")] = None,
    repeats: RepeatsOption = 3,
    max_new_tokens: MaxNewTokensOption = 2048,
    max_cache_tokens: CacheOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    output: ExperimentOutput = Path("runs/batch"),
    traceback: TracebackOption = False,
) -> None:
    """Figure 8b: speedup of parallel writing against the batch size.

    \b
    Examples:
      multiverse experiment batch --sizes 1,2,4 --threads 1
      multiverse experiment batch --model OWNER/NAME --task mv:math_500 --device cuda --sizes 1,8,32,128
    """
    from multiverse_hf.evaluation.experiments.batches import SIZES, measure_batches
    from multiverse_hf.evaluation.experiments.commands import run_experiment
    from multiverse_hf.evaluation.experiments.subject import Subject
    from multiverse_hf.evaluation.settings import Evaluation

    asked = Evaluation(
        model, (task,), data_dir=data_dir, limit=limit, temperature=0, max_new_tokens=max_new_tokens,
        max_cache_tokens=max_cache_tokens, dtype=dtype, attention=attn, device=device, threads=threads,
    )  # fmt: skip
    values = SIZES if sizes is None else read_counts("--sizes", sizes)
    run_experiment("batch", lambda: measure_batches(Subject.load(asked), values, repeats), output)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the report.")] = Path("runs/comparison"),
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Compare two evaluations by problem: the paired difference, and the problems whose result changed.

    \b
    Examples:
      multiverse compare runs/autoregressive runs/parallel
      multiverse compare runs/zero runs/parallel --output runs/zero-and-parallel
    """
    from multiverse_hf.evaluation import commands

    comparison = commands.compare_and_report(first, second, output)
    if as_json:
        print_json(comparison)
    else:
        commands.print_comparison(comparison, output)
