"""``multiverse serve``: an endpoint for OpenAI's clients, whose answers branch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from multiverse_hf.checkpoints import Attention, Dtype, open_checkpoint, quiet
from multiverse_hf.cli.options import (
    AttentionOption,
    DeviceOption,
    DtypeOption,
    ThreadsOption,
    TracebackOption,
)
from multiverse_hf.cli.smollm2 import model_callback
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, install_line
from multiverse_hf.serving.config import KEY, ServerConfig, read_keys

BOUNDS = "Bounds"  # panel of the help


def serve_model(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder or repository, or smollm2; by default multiverse-tiny.",
            callback=model_callback,
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name for clients; by default that of its folder.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help=f"A key that clients need; other users of this machine see it. See {KEY}."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File with a key on each line; lines with # are skipped.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Origin whose pages may call; * for all.")
    ] = None,
    suffix: Annotated[
        Suffix,
        typer.Option(metavar="KIND", help="Sentence at the end of the last user message: parallel, sequential, none."),
    ] = Suffix.NONE,
    dtype: DtypeOption = Dtype.AUTO,
    attn: AttentionOption = Attention.SDPA,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers written at once.", rich_help_panel=BOUNDS)
    ] = 64,
    max_queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Answers that may wait.", rich_help_panel=BOUNDS)
    ] = 256,
    max_cache_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens in the cache.", rich_help_panel=BOUNDS)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of an answer.", rich_help_panel=BOUNDS)
    ] = 4096,
    max_total_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an answer, all paths together.", rich_help_panel=BOUNDS)
    ] = 65536,
    max_branches: Annotated[
        int, typer.Option(min=1, metavar="N", help="Branches of an answer written at once.", rich_help_panel=BOUNDS)
    ] = 256,
    max_choices: Annotated[
        int, typer.Option(min=1, metavar="N", help="Answers to one request.", rich_help_panel=BOUNDS)
    ] = 16,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="BYTES", help="Size of a request.", rich_help_panel=BOUNDS)
    ] = 4 << 20,
    max_time: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Time for an answer.", rich_help_panel=BOUNDS)
    ] = 600,
    read_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Time to send a request.", rich_help_panel=BOUNDS)
    ] = 30,
    grace: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Time to end running answers at a stop.", rich_help_panel=BOUNDS),
    ] = 30,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line for each request to standard error.")
    ] = False,
    traceback: TracebackOption = False,
) -> None:
    """Serve a model to OpenAI's clients. All requests share the engine's steps, and answers branch.

    Ctrl-C or SIGTERM ends it: new requests are refused, running answers have a grace time.

    \b
    Examples:
      multiverse serve --suffix parallel
      multiverse serve ./my-checkpoint --port 9000 --api-key-file keys.txt
      MULTIVERSE_API_KEY=secret multiverse serve owner/name --host 0.0.0.0
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "multiverse-tiny", "messages": [{"role": "user", "content": "A=5+6; B=7+8; total?"}]}'
    """
    try:
        from multiverse_hf.serving.run import run_server
        from multiverse_hf.serving.worker import ModelWorker
    except ModuleNotFoundError as err:
        raise CommandError(f"{err.name}, which the server needs, is missing; {install_line('serve')}") from err
    keys = read_keys(api_key or [], api_key_file)
    quiet()
    checkpoint = open_checkpoint(model)
    engine = {"max_num_seqs": max_num_seqs, "max_cache_tokens": max_cache_tokens}

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    config = ServerConfig(
        name=name or Path(checkpoint.name).name, keys=keys, suffix=suffix, max_new_tokens=max_new_tokens,
        max_total_tokens=max_total_tokens, max_choices=max_choices, max_branches=max_branches, max_queue=max_queue,
        max_body=max_body, read_timeout=read_timeout, max_time=max_time, grace=grace, cors=tuple(cors or ()),
        log=tell if log_requests else None, engine=engine,
    )  # fmt: skip

    def load(worker: ModelWorker) -> None:
        worker.open(checkpoint, dtype, attn, device, threads)

    run_server(config, load, host, port, tell)
