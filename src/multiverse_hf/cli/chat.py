"""``multiverse chat``: a conversation in the terminal, with a model here or behind an endpoint."""

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from multiverse_hf.checkpoints import Attention, Checkpoint, Dtype, load_model, open_checkpoint, quiet
from multiverse_hf.cli.display import CONTROLS, LiveView, printable
from multiverse_hf.cli.generate import show_answer
from multiverse_hf.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    LiveOption,
    ThreadsOption,
    TracebackOption,
    check_sampling,
)
from multiverse_hf.cli.smollm2 import model_callback
from multiverse_hf.cli.terminal import waiting, wants_live
from multiverse_hf.data.chains import ONLY_CHAINS, is_problem
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, install_line, one_line
from multiverse_hf.serving.config import KEY
from multiverse_hf.viewing.branches import TEXT_ROLES

Messages = list[dict[str, str]]
AskModel = Callable[[Messages], str]  # shows the answer to a conversation while it is written, and returns its content
CHAT_TOKENS = 2048
ENDPOINT = "An endpoint"  # panel of the help
HELP = """\
/new forgets the conversation, /help prints this, /quit or Ctrl-D ends the chat.
Ctrl-C ends the answer that is being written."""


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder or repository, or smollm2; by default multiverse-tiny.",
            callback=model_callback,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask an endpoint, such as multiverse serve.", rich_help_panel=ENDPOINT),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help=f"Its key; by default {KEY}.", rich_help_panel=ENDPOINT)
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its model; by default the first it lists.", rich_help_panel=ENDPOINT),
    ] = None,
    suffix: Annotated[
        Suffix | None,
        typer.Option(
            metavar="KIND",
            help="Sentence at the end of the last message: parallel, sequential or none; by default the family's.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Most tokens along the longest path; by default {CHAT_TOKENS}, or the endpoint's limit.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Temperature; by default that of the model's family.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(metavar="X", help="Nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the sampling.")] = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    live: LiveOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Talk with a model in the terminal, and watch the branches of its answers.

    Each line is a message. The model sees its earlier answers without their reasoning. In the chat, /new begins anew,
    /help lists the commands, and /quit or Ctrl-D ends it.

    \b
    Examples:
      multiverse chat
      multiverse chat ./my-checkpoint --temperature 0.6
      multiverse chat --url http://127.0.0.1:8000
      MULTIVERSE_API_KEY=secret multiverse chat --url https://host/v1 --model-name my-model
    """
    shows_live = wants_live(live, as_json=False)
    check_sampling(temperature, top_p, "--suffix parallel without --temperature")
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if url is not None:
        local = {"MODEL": model, "--dtype": dtype != Dtype.AUTO, "--attn": attn != Attention.SDPA}
        local |= {"--device": device != "auto", "--threads": threads}
        if given := [name for name, value in local.items() if value]:
            raise CommandError(f"{given[0]} and --url exclude each other; leave one out")
        ask = ask_endpoint(url, api_key, model_name, suffix or Suffix.PARALLEL, max_new_tokens, sampling, shows_live)
    else:
        if given := [name for name, value in {"--api-key": api_key, "--model-name": model_name}.items() if value]:
            raise CommandError(f"{given[0]} is for an endpoint; name it with --url")
        with waiting("loading the model"):
            quiet()
            checkpoint = open_checkpoint(model)
            loaded = load_model(checkpoint, dtype, attn, device, threads)
        if {"temperature", "top_p"} & sampling.keys():
            sampling["do_sample"] = True
        sampling, suffix = checkpoint.with_record(sampling), suffix or checkpoint.suffix
        ask = ask_model(loaded, checkpoint, suffix, max_new_tokens or CHAT_TOKENS, sampling, shows_live)
    talk(ask)


def talk(ask: AskModel) -> None:
    """Read messages and show answers until the user ends the conversation. Errors of an answer do not end it."""
    if sys.stdin is None:
        raise CommandError("standard input is closed; run the chat in a terminal, or pipe messages into it")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - input() then edits lines and keeps their history
        print(HELP)
    sys.stdin.reconfigure(errors="replace")
    messages: Messages = []
    while True:
        try:
            line = input("\n> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if is_terminal:
                print()  # the cursor is behind the prompt
            if isinstance(end, EOFError):
                break
            raise
        if line == "/quit":
            break
        if line == "/new":
            messages.clear()
            print("the conversation is forgotten")
        elif line == "/help":
            print(HELP)
        elif re.fullmatch(r"/\w+", line):
            _tell(f"no command {line}; /help lists them")
        elif line:
            answer_line(ask, messages, line)


def answer_line(ask: AskModel, messages: Messages, line: str) -> None:
    """Show the answer to a message. Add both to the conversation, unless the answer failed or has no content."""
    question = {"role": "user", "content": line}
    try:
        content = ask([*messages, question])
    except KeyboardInterrupt:
        _tell("\nthe answer was ended; it and its question are left out of the conversation")
    except CommandError as err:
        full = "; /new forgets the earlier messages" if messages and "context" in str(err) else ""
        _tell(f"error: {CONTROLS.sub('', one_line(err))}{full}")
    else:
        if content.strip():
            messages += [question, {"role": "assistant", "content": content}]
        else:
            _tell("note: the answer has no content; it and its question are left out of the conversation")


def _tell(line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def ask_model(
    model: Any, checkpoint: Checkpoint, suffix: Suffix, max_new_tokens: int, sampling: dict[str, Any], live: bool
) -> AskModel:
    """Return the function that asks a model of this process."""

    def ask(messages: Messages) -> str:
        *earlier, last = messages
        ids = checkpoint.encode([*earlier, {**last, "content": suffix.end(last["content"])}])
        if checkpoint.is_embedded and not is_problem(last["content"]):
            _tell(f"note: {ONLY_CHAINS}")
        elif checkpoint.is_embedded and earlier:
            _tell("note: the built-in model was trained on single problems; /new forgets the earlier ones")
        answer = show_answer(model, checkpoint, ids, live, max_new_tokens=max_new_tokens, **sampling)
        return content_of(answer.document, checkpoint)

    return ask


def content_of(document: str, checkpoint: Checkpoint) -> str:
    """Return an answer without its reasoning; empty if the reasoning did not end."""
    names = checkpoint.tags.names
    document = document.strip()
    if names.think is None or not document.startswith(names.open("think")):
        return document
    return document.partition(names.close("think"))[2].strip()


def ask_endpoint(
    url: str,
    api_key: str | None,
    name: str | None,
    suffix: Suffix,
    max_new_tokens: int | None,
    sampling: dict[str, Any],
    live: bool,
) -> AskModel:
    """Return the function that asks an endpoint.

    Raises:
        CommandError: if the address is none, or a package is missing.
    """
    try:
        from multiverse_hf.serving.client import BranchClient, describe_failure, endpoint_base
    except ModuleNotFoundError as err:
        raise CommandError(f"{err.name}, which --url needs, is missing; {install_line('serve')}") from err
    base = endpoint_base(url)
    client = BranchClient(base, api_key or os.environ.get(KEY), name, max_retries=0)
    own = {"suffix": suffix.value} | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})

    def ask(messages: Messages) -> str:
        try:
            events = client.stream(messages, multiverse=own, **sampling)
            return (show_events if live else write_text)(events)
        except Exception as err:  # what answers at an address may be anything
            raise CommandError(describe_failure(err, base)) from err

    return ask


def show_events(events: Any) -> str:
    """Show the branches of an endpoint's answer side by side. Return the content."""
    from multiverse_hf.serving.client import TextPiece
    from multiverse_hf.serving.events import StreamEvent

    console = Console(force_terminal=True)
    content, num_tokens, reason = "", 0, None
    with LiveView(console, "".join, TEXT_ROLES) as view:
        for event in events:
            if not isinstance(event, TextPiece):
                num_tokens += event.kind == "token"
                reason = event.finish_reason if event.kind == "finish" else reason
                view.on_event(event)
                continue
            if event.kind == "content":
                content += event.text
            if not num_tokens:  # another server, which sends no events
                view.on_event(StreamEvent(kind="token", branch="", text=event.text))
    if num_tokens:
        console.print(Text(f"\n{num_tokens} tokens, finished by {reason}"), style="dim")
    return content


def write_text(events: Any) -> str:
    """Write an endpoint's answer as plain text in document order. Return the content."""
    from multiverse_hf.serving.client import TextPiece

    content, part, reason = "", None, None
    for event in events:
        if isinstance(event, TextPiece):
            between = "\n\n" if part not in (None, event.kind) else ""
            print(between + printable(event.text, sys.stdout), end="", flush=True)
            part = event.kind
            content += event.text if event.kind == "content" else ""
        elif event.kind == "finish":
            reason = event.finish_reason
    print(flush=True)
    if reason not in (None, "stop"):
        _tell(f"note: the answer was cut off by {reason}")
    return content
