"""``multiverse``: run a model from the command line, and see its branches while they are written.

torch and transformers are imported inside the commands that run a model, so that ``--help`` answers at once.
"""

import contextlib
import difflib
import json
import logging
import os
import random
import re
import statistics
import sys
import time
import traceback as tracebacks
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multiverse_hf import __version__
from multiverse_hf.data.chains import (
    MAX_CHAINS,
    PARALLEL_SUFFIX,
    SEQUENTIAL_SUFFIX,
    Kind,
    Problem,
    is_correct,
    sample_problem,
)
from multiverse_hf.display import LiveView, TextStream
from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.modeling.tags import TagSet, encode_prompt

EMBEDDED = Path(__file__).parent / "assets" / "multiverse-tiny"
TRACEBACK = "MULTIVERSE_TRACEBACK"  # environment variable: show where an error came from
USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad input, failure while running, Ctrl-C

# typer has no public name for the base of what it raises on bad usage, in some versions click's and in some its own.
_UsageException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Suffix(StrEnum):
    """Sentence of record at the end of a prompt."""

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    NONE = "none"


class StructureMode(StrEnum):
    """How the control tags are treated."""

    GUIDED = "guided"
    LENIENT = "lenient"
    OFF = "off"


class Dtype(StrEnum):
    """Number format of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Attention(StrEnum):
    """Attention implementations that can step several branches at once."""

    SDPA = "sdpa"
    EAGER = "eager"


class CommandError(Exception):
    """What went wrong, for one line on standard error, and the exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


app = typer.Typer(name="multiverse", add_completion=False, pretty_exceptions_enable=False)


def _show_traceback(value: bool) -> bool:
    if value:
        os.environ[TRACEBACK] = "1"
    return value


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="PATH", help="Checkpoint folder or repository; a small one is built in."),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="Most tokens along the longest path; the context caps it.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(metavar="TYPE", help="auto (the checkpoint's), float32, bfloat16, float16 or float64."),
]
AttentionOption = Annotated[Attention, typer.Option(metavar="KIND", help="Attention implementation: sdpa or eager.")]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is some.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads; by default torch's choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
LiveOption = Annotated[
    bool | None, typer.Option("--live/--plain", help="Branches side by side, or plain text; live in a terminal.")
]
TracebackOption = Annotated[
    bool, typer.Option("--traceback", callback=_show_traceback, help=f"Show where an error came from ({TRACEBACK}=1).")
]


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
        if prompt is None and sys.stdin.isatty():
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
    if suffix is Suffix.NONE or text.endswith((PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX)):
        return text
    return f"{text} {PARALLEL_SUFFIX if suffix is Suffix.PARALLEL else SEQUENTIAL_SUFFIX}"


# Models


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet."""

    name: str  # as the user gave it
    path: str
    config: Any
    tokenizer: Any
    tags: TagSet
    hidden: frozenset[int]  # ids that are not part of an answer's text: end and padding tokens

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt.

        Raises:
            CommandError: if it does not fit the context.
        """
        ids = encode_prompt(self.tokenizer, prompt, self.tags.names)
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and len(ids) >= context:
            raise CommandError(f"the prompt has {len(ids)} tokens, the model's context {context}; shorten the prompt")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of an answer, its tags included, without end and padding tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden], skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it cost."""

    document: str
    stats: Any  # GenerationStats
    seconds: float

    @property
    def text(self) -> str:
        """The answer without parallel structure; the document itself where it does not parse."""
        try:
            return parse_document(self.document).sequential()
        except DocumentError:
            return self.document

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form."""
        names = ("num_tokens", "length", "parallelism", "num_steps", "num_forks", "max_width", "depth")
        stats = {name: getattr(self.stats, name) for name in names}
        stats |= {"finish_reason": str(self.stats.finish_reason), "malformed": self.stats.malformed}
        last = re.search(r"^Answer:[ \t]*(\S[^\n]*?)\s*\Z", self.document, re.MULTILINE)
        return {
            "document": self.document,
            "text": self.text,
            "answer": last[1] if last else None,
            "stats": stats,
            "seconds": round(self.seconds, 4),
        }


def quiet() -> None:
    """Keep warnings and progress bars of libraries off the screen."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():  # in a terminal a download of gigabytes should be seen
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def one_line(error: BaseException | str, most: int = 400) -> str:
    """Put a message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def open_checkpoint(name: str | None) -> Checkpoint:
    """Read a checkpoint's config and tokenizer, and check that the model can branch.

    Raises:
        CommandError: if there is none, it cannot be read, or it is of a kind that cannot branch.
    """
    if name is None and not (EMBEDDED / "config.json").is_file():
        raise CommandError("this installation has no built-in model; choose one with --model FOLDER or REPO", FAILURE)
    path = Path(name).expanduser() if name is not None else EMBEDDED
    shown = name or "multiverse-tiny"
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise CommandError(f"no model folder {name}; give an existing folder, or a repository as owner/name")
    if path.exists() and not (path / "config.json").is_file():
        raise CommandError(f"{name} holds no config.json; --model takes the folder of a checkpoint")
    from transformers import AutoConfig, AutoTokenizer

    from multiverse_hf.modeling.modeling_multiverse import base_class

    source = str(path) if path.exists() else name
    try:
        # False, not the default: a checkpoint's own code is never run here, and nobody is asked whether it may be
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as err:  # a checkpoint is input: whatever reading it raises is to be said in a line
        raise _unreadable(shown, "config", err, is_local=path.exists()) from err
    try:
        base_class(config)
    except ValueError as err:
        raise CommandError(f"{shown} cannot branch: {one_line(err)}") from err
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as err:
        raise _unreadable(shown, "tokenizer", err, is_local=path.exists()) from err
    try:
        stored = getattr(config, "multiverse", None)
        tags = TagSet.from_tokenizer(tokenizer) if stored is None else TagSet.from_dict(stored)
    except ValueError as err:
        raise CommandError(f"{shown} is not a Multiverse model: {one_line(err)}") from err
    if max(tags.control_ids) >= config.vocab_size:
        raise CommandError(
            f"{shown} has tags up to id {max(tags.control_ids)} but embeddings for {config.vocab_size} tokens only; "
            "resize the embeddings and train the model on tags"
        )
    # by id, not by skip_special_tokens: some tokenizers hold the tags to be special as well
    hidden = frozenset(tokenizer.all_special_ids) - frozenset(tags.control_ids)
    return Checkpoint(shown, source, config, tokenizer, tags, hidden)


def _unreadable(name: str, part: str, error: Exception, is_local: bool) -> CommandError:
    """Say why a part of a checkpoint could not be read."""
    reason = one_line(error).rstrip(".")
    if isinstance(error, LookupError):  # whose text is the key alone
        reason = f"it has no {reason}"
    if not is_local and "connect" in reason:
        return CommandError(f"cannot reach the Hub for {name}, and it is not in the cache; check the network", FAILURE)
    if not is_local and "not a valid model identifier" in reason:
        return CommandError(f"no model {name}, neither as a folder nor on the Hub; check the name, or log in")
    if kind := re.search(r"model type `([^`]*)` but Transformers does not recognize", reason):
        return CommandError(f"this transformers does not know {name}'s architecture {kind[1]}; upgrade transformers")
    return CommandError(f"cannot read the {part} of {name}: {reason}; copy or download the checkpoint again")


def load_model(checkpoint: Checkpoint, dtype: Dtype, attention: Attention, device: str, threads: int | None) -> Any:
    """Read the weights onto a device.

    Raises:
        CommandError: if they are damaged or incomplete, or there is no such device.
    """
    import torch

    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    target = _find_device(device)
    try:
        model, info = MultiverseForCausalLM.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            tags=checkpoint.tags,
            dtype=dtype.value,
            attn_implementation=attention.value,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of below, by name
        )
    except Exception as err:  # as for the config: safetensors, pickle and json all raise errors of their own
        raise _unreadable(checkpoint.name, "weights", err, os.path.isdir(checkpoint.path)) from err
    if wrong := sorted(key for key, *_ in info["mismatched_keys"]):
        raise CommandError(
            f"{checkpoint.name} has weights of other shapes than its config says, {wrong[0]} among them; "
            "keep config.json and weights of one model together"
        )
    if missing := sorted(info["missing_keys"]):
        raise CommandError(
            f"{checkpoint.name} lacks {len(missing)} weights, {missing[0]} among them; download the checkpoint again"
        )
    return model.eval().to(target)


def _find_device(name: str) -> Any:
    """Give the torch device a user means."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise CommandError(f"no device {name!r} here; use --device cpu, cuda, cuda:0, ... or auto") from err
    return device


def answer_prompt(
    model: Any, checkpoint: Checkpoint, prompt: Sequence[int], streamer: Any = None, **options: Any
) -> Answer:
    """Answer one prompt, given as token ids, and take the time."""
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)
    begin = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        return_dict_in_generate=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    seconds = time.perf_counter() - begin  # the ids came back to the host, so the device is done
    return Answer(checkpoint.decode(output.sequences[0, len(prompt) :].tolist()), output.stats[0], seconds)


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


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object to standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


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
    traceback: TracebackOption = False,
) -> None:
    """Answer a prompt; in a terminal the branches appear side by side as they are written.

    \b
    Examples:
      multiverse generate "A=19-7+12; B=8+15-3; total?"
      multiverse generate --file problem.txt --json
      echo "A=5+6; B=7+8; total?" | multiverse generate --plain
      multiverse generate --model ./my-checkpoint --temperature 0.6 --seed 1 "..."
    """
    shows_live = wants_live(live, as_json)
    if temperature is not None and not 0 < temperature < float("inf"):
        raise CommandError(f"--temperature must be above 0, got {temperature}; for the likeliest token use --greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise CommandError(f"--top-p must be above 0 and at most 1, got {top_p}")
    if temperature is not None or top_p is not None:
        if do_sample is False:
            raise CommandError("--greedy takes no --temperature or --top-p; leave one out")
        do_sample = True
    text = read_prompt(prompt, file, suffix)
    with waiting("loading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        ids = checkpoint.encode(text)
        loaded = load_model(checkpoint, dtype, attn, device, threads)
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
    if as_json:
        answer = answer_prompt(loaded, checkpoint, ids, **options)
        print_json({"prompt": text, **answer.to_dict(), "model": checkpoint.name})
    elif shows_live and structure is not StructureMode.OFF:
        console = Console(force_terminal=True)
        with LiveView(console, checkpoint.decode, checkpoint.tags) as view:
            answer = answer_prompt(loaded, checkpoint, ids, view, **options)
        console.print(_summary(answer), style="dim")
    else:
        answer_prompt(loaded, checkpoint, ids, TextStream(sys.stdout, checkpoint.decode), **options)


def _summary(answer: Answer) -> Text:
    """Say in a line what an answer cost."""
    stats = answer.stats
    return Text(
        f"\n{stats.num_tokens} tokens, length {stats.length}, # parallel {stats.parallelism:.2f}, "
        f"{stats.num_steps} steps, {answer.seconds:.1f} s, finished by {stats.finish_reason}"
    )


MODES = {"parallel": "guided", "sequential": "off"}  # mode of the demo -> structure


@app.command()
def demo(
    problems: Annotated[int, typer.Option(min=1, metavar="N", help="How many problems.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the problems.")] = 0,
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Timed runs of each problem and mode; the median counts.")
    ] = 1,
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
      multiverse demo --problems 8 --seed 1 --repeats 3
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
    report = demo_report(checkpoint, loaded, chosen, runs, repeats, seed)
    if as_json:
        print_json(report)
    else:
        print_report(console, report)


def demo_problems(seed: int, num_problems: int) -> list[Problem]:
    """Draw the problems: first one with eight chains, then a nested one, a small one, and any."""
    rng = random.Random(seed)
    fixed = [(Kind.FLAT, MAX_CHAINS), (Kind.NESTED, 6), (Kind.FLAT, 4)]
    drawn = [(rng.choice([Kind.FLAT, Kind.NESTED]), None) for _ in range(num_problems - len(fixed))]
    return [sample_problem(rng, kind, num_chains) for kind, num_chains in [*fixed, *drawn][:num_problems]]


def show_problems(
    console: Console,
    model: Any,
    checkpoint: Checkpoint,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pace: float | None,
) -> None:
    """Show every problem being solved in parallel: live, or as the document once it is written if ``pace`` is None."""
    for number, (problem, prompt) in enumerate(zip(problems, prompts, strict=True), start=1):
        console.print(Text(f"Problem {number}: {problem}\n", "bold"))
        options = {"structure": "guided", "do_sample": False, "max_new_tokens": max_new_tokens}
        if pace is None:
            answer_prompt(model, checkpoint, prompt, TextStream(sys.stdout, checkpoint.decode), **options)
        else:
            with LiveView(console, checkpoint.decode, checkpoint.tags, pace) as view:
                answer_prompt(model, checkpoint, prompt, view, **options)
        console.print()


def time_modes(
    model: Any, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int
) -> list[dict[str, list[Answer]]]:
    """Answer every prompt in both modes in turn, greedily and undisturbed by a display, after a warm-up.

    Returns:
        For each prompt, by mode, the answers of all repeats.
    """
    for structure in MODES.values():
        answer_prompt(model, checkpoint, prompts[0], structure=structure, do_sample=False, max_new_tokens=32)
    runs: list[dict[str, list[Answer]]] = [{mode: [] for mode in MODES} for _ in prompts]
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            # the mode that goes first alternates, so that neither always finds the machine cooler or the caches warmer
            for mode in list(MODES) if (repeat + number) % 2 == 0 else reversed(MODES):
                options = {"structure": MODES[mode], "do_sample": False, "max_new_tokens": max_new_tokens}
                runs[number][mode].append(answer_prompt(model, checkpoint, prompt, **options))
    return runs


def demo_report(
    checkpoint: Checkpoint,
    model: Any,
    problems: Sequence[Problem],
    runs: Sequence[dict[str, list[Answer]]],
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Put what was measured into the JSON form."""
    import torch

    rows = []
    for problem, modes in zip(problems, runs, strict=True):
        row: dict[str, Any] = {"problem": str(problem), "kind": problem.kind.value, "num_chains": len(problem.chains)}
        row["answer"] = problem.answer
        for mode, answers in modes.items():
            seconds = statistics.median(answer.seconds for answer in answers)
            correct = is_correct(problem, answers[0].document)
            row[mode] = {**answers[0].to_dict(), "seconds": seconds, "correct": correct}
        row["speedup"] = row["sequential"]["seconds"] / row["parallel"]["seconds"]
        rows.append(row)
    total: dict[str, Any] = {}
    for mode in MODES:
        counts = {key: sum(row[mode]["stats"][key] for row in rows) for key in ("num_tokens", "length", "num_steps")}
        total[mode] = {
            "correct": sum(row[mode]["correct"] for row in rows),
            **counts,
            "parallelism": counts["num_tokens"] / counts["length"] if counts["length"] else 1.0,
            "seconds": sum(row[mode]["seconds"] for row in rows),
        }
    total["speedup"] = total["sequential"]["seconds"] / total["parallel"]["seconds"]
    return {
        "model": checkpoint.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": seed,
        "repeats": repeats,
        "problems": rows,
        "total": total,
    }


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print what was measured as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("problem", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("right", "tokens", "length", "# par.", "steps", "seconds", "speedup"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, mode: str, right: str, counts: dict[str, Any], seconds: float, speedup: float) -> None:
        table.add_row(
            name if mode == "parallel" else "",
            mode,
            right,
            str(counts["num_tokens"]),
            str(counts["length"]),
            f"{counts['parallelism']:.2f}",
            str(counts["num_steps"]),
            f"{seconds:.2f}",
            f"{speedup:.2f}x" if mode == "parallel" else "",
            style="bold" if name == "total" else None,
        )

    for row in report["problems"]:
        name = f"{row['num_chains']} chains" + (", nested" if row["kind"] == Kind.NESTED.value else "")
        for mode in MODES:
            run = row[mode]
            right = "yes" if run["correct"] else "no"
            add(name, mode, right, run["stats"], run["seconds"], row["speedup"])
        table.add_section()
    for mode in MODES:
        run = report["total"][mode]
        right = f"{run['correct']}/{len(report['problems'])}"
        add("total", mode, right, run, run["seconds"], report["total"]["speedup"])
    console.print(table)
    threads, repeats = report["threads"], report["repeats"]
    console.print(
        f"\n{report['model']}, {report['dtype']}, on {report['device']} with {threads} thread{'s' * (threads > 1)}: "
        f"both modes answer the same prompts greedily, after a warm-up and without the display; "
        + ("one run each." if repeats == 1 else f"median of {repeats} runs each."),
        style="dim",
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and give its exit code."""
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
