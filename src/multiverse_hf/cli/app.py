"""``multiverse app``: a page on which a person watches a model think in parallel."""

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.checkpoints import EMBEDDED_NAMES, Attention, Dtype, load_model, open_checkpoint, quiet
from multiverse_hf.cli.demo import demo_problems, read_problems
from multiverse_hf.cli.inspect import load_tokenizer
from multiverse_hf.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    ThreadsOption,
    TracebackOption,
)
from multiverse_hf.cli.smollm2 import NAME, resolve_model
from multiverse_hf.errors import CommandError, install_line, one_line
from multiverse_hf.serving.config import KEY

SLOW = 20  # steps a second that a person can follow; the built-in model writes over a hundred
EXAMPLES = ["What are 17*24, 36*11 and 98*47? Work each out by itself, then add the three results."]


def open_app(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH",
            help="Checkpoint folder or repository, or smollm2; by default multiverse-tiny. With --url, its tokenizer "
            "is for the viewer.",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Ask an endpoint, such as multiverse serve.")] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Its key; other users of this machine see it.", envvar=KEY)
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its model; by default the first it lists.")
    ] = None,
    example: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A problem to take; may stand several times.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens along the longest path that a visitor may ask for.")
    ] = 2048,
    visitors: Annotated[int, typer.Option(min=1, max=32, metavar="N", help="Answers written at once.")] = 8,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Address to listen on.", envvar="GRADIO_SERVER_NAME")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.", envvar="GRADIO_SERVER_PORT"),
    ] = 7860,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a Space of Hugging Face with these options, and start nothing."),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    traceback: TracebackOption = False,
) -> None:
    """Open a page in which you watch a model write its branches side by side.

    Type a problem or take an example. Race runs the same model in parallel and one line after the other. The finished
    answer opens in the viewer. All visitors share one engine. Ctrl-C ends the app.

    \b
    Examples:
      multiverse app
      multiverse app --model ./my-checkpoint --example "What is ...?"
      multiverse app --url http://127.0.0.1:8000
      multiverse app --model owner/name --space my-space
    """
    if url is None and model_name is not None:
        raise CommandError("--model-name is for an endpoint; name it with --url")
    local = {"--dtype": dtype != Dtype.AUTO, "--attn": attn != Attention.SDPA}
    local |= {"--device": device != "auto", "--threads": threads}
    if url is not None and (given := [name for name, value in local.items() if value]):
        raise CommandError(f"{given[0]} and --url exclude each other; leave one out")
    try:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
        import gradio  # noqa: F401 - before a model is loaded

        from multiverse_hf.serving.client import BranchClient, endpoint_base
        from multiverse_hf.viewing.app import App, make_page, open_page
    except ModuleNotFoundError as err:
        raise CommandError(f"{err.name}, which the app needs, is missing; {install_line('app')}") from err
    base = None if url is None else endpoint_base(url)
    if space is not None:
        from multiverse_hf.viewing.space import write_space

        given = {
            "--model": model,
            "--url": url,
            "--model-name": model_name,
            "--max-new-tokens": max_new_tokens,
            "--visitors": visitors,
        }
        options = [f"{name}={value}" for name, value in given.items() if value is not None]
        options += [f"--example={each}" for each in example or []]
        write_space(space, options, ("app", NAME) if model == NAME else ("app",))
        print(space)
        return
    quiet()
    model = resolve_model(model)
    with contextlib.ExitStack() as stack:
        if base is None:
            source, builder = _open_model(model, dtype, attn, device, threads, visitors)
            stack.callback(source.engine.close)
        else:
            from multiverse_hf.viewing.sources import EndpointSource
            from multiverse_hf.viewing.trace import TraceBuilder

            source = EndpointSource(BranchClient(base, api_key, model_name, max_retries=0), base)
            tokens = load_tokenizer(model)
            builder = TraceBuilder(tokens.tokenizer, tokens.tags, model or EMBEDDED_NAMES[0])
        is_tiny = model is None or model in EMBEDDED_NAMES
        shown = example or (
            list(map(str, demo_problems(0, 3))) if is_tiny else [own.text for own in read_problems(model)] or EXAMPLES
        )
        page = make_page(
            App(source, builder, max_new_tokens), shown, SLOW if is_tiny and base is None else 0, visitors
        )
        port = port or _free_port(host)
        open_page(page, host, port)
        stack.callback(page.close, verbose=False)
        print(f"ready: http://{host}:{port} shows {source.name}; Ctrl-C ends it", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def _open_model(
    model: str | None, dtype: Dtype, attention: Attention, device: str, threads: int | None, visitors: int
) -> tuple[Any, Any]:
    """Return a model's engine as a source of answers, and what lays its documents out."""
    from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
    from multiverse_hf.viewing.sources import LocalSource
    from multiverse_hf.viewing.trace import TraceBuilder

    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, dtype, attention, device, threads)
    try:
        engine = MultiverseEngine(loaded, checkpoint.tokenizer, max_num_seqs=visitors)
    except ValueError as err:
        raise CommandError(one_line(err)) from err
    for structure in ("guided", "off"):  # the first side of the first race must not pay for what comes once
        engine.generate([checkpoint.encode("1+1")], structure=structure, max_new_tokens=2)
    return LocalSource(engine, checkpoint), TraceBuilder(checkpoint.tokenizer, checkpoint.tags, checkpoint.name)


def _free_port(host: str) -> int:
    """Return a port that is free.

    Raises:
        CommandError: if there is no such address.
    """
    try:
        with socket.create_server((host, 0)) as listener:
            return listener.getsockname()[1]
    except OSError as err:
        raise CommandError(f"cannot listen on {host}: {one_line(err, 100)}; choose another --host", 1) from err
