"""``multiverse``: run a model from the command line, and watch its branches grow.

torch and transformers are imported inside the commands that run a model, so that ``--help`` answers at once.
"""

import difflib
import os
import sys
import traceback as tracebacks
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from multiverse_hf import __version__
from multiverse_hf.cli import app as app_command
from multiverse_hf.cli import chat, convert, curate, demo, evaluate, export, families, generate, inspect, serve, view
from multiverse_hf.cli.options import TRACEBACK, flowing
from multiverse_hf.errors import FAILURE, INTERRUPTED, USAGE, CommandError, one_line

# Base class of usage errors. typer has no public name for it: some versions use click's, others their own.
_UsageException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


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


app.command()(flowing(generate.generate))
app.command()(flowing(chat.chat))
app.command()(flowing(demo.demo))
app.command()(flowing(inspect.inspect))
app.command()(flowing(view.view))
app.command("app")(flowing(app_command.open_app))
app.command("serve")(flowing(serve.serve_model))
app.command()(flowing(curate.curate))
app.command()(flowing(convert.convert))
app.command()(flowing(export.merge))
app.command()(flowing(export.export))
app.command("eval")(flowing(evaluate.evaluate))
app.command()(flowing(evaluate.compare))
app.command("families")(flowing(families.list_families))
app.add_typer(evaluate.experiments, name="experiment")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    if sys.stderr is None:  # closed by the shell: messages have no reader, and must not go elsewhere
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    if sys.stdout is None:
        print("error: standard output is closed; send it to a file or to another program", file=sys.stderr)
        return USAGE
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # characters that a terminal lacks become question marks
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
    except Exception as err:  # the last resort: one line, not a traceback
        error, message, code = err, _describe(err), FAILURE
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        tracebacks.print_exception(error)
    print(f"error: {message}", file=sys.stderr)
    return code


def _describe_usage(error: Any) -> str:
    """Return one line about a usage error, with the closest option for an unknown one."""
    message = one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
    option = getattr(error, "option_name", None)
    if option is not None and (close := difflib.get_close_matches(option, error.possibilities or [], 1)):
        message = f"No such option: {option}. Did you mean {close[0]}?"
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "multiverse"
    return f"{message} (see {command} --help)"


def _describe(error: Exception) -> str:
    """Return one line about an unexpected error, and how to see its traceback."""
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory; use --dtype bfloat16, a lower --max-new-tokens, or a lower --max-num-seqs and "
            "--max-cache-tokens where the command has them"
        )
    return f"{one_line(error)} ({type(error).__name__}; --traceback shows where)"


def main() -> None:
    """Entry point of ``multiverse``."""
    sys.exit(run())
