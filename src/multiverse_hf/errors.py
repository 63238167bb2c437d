"""Errors of commands and recipes: one line that names what is wrong and the next step."""

import argparse
import contextlib
import difflib
import json
import shlex
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad input, failure while running, Ctrl-C


def install_line(extra: str) -> str:
    """Return the command that installs an extra of this package, from the source the package came from.

    An index may have no release, so a checkout or a repository is named by its own address.
    """
    origin = {}
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        origin = json.loads(metadata.distribution("multiverse_hf").read_text("direct_url.json") or "{}")
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"pip install 'multiverse_hf[{extra}] @ {origin['vcs_info']['vcs']}+{url}'"
    folder = Path(unquote(urlsplit(url).path))
    if url.startswith("file:") and (folder / "pyproject.toml").is_file():
        pins = folder / "constraints.txt"
        flags = ["-c", str(pins)] if pins.is_file() else []
        flags += ["-e"] if origin.get("dir_info", {}).get("editable") else []
        return shlex.join(["pip", "install", *flags, f"{folder}[{extra}]"])
    return f"pip install 'multiverse_hf[{extra}]'"


class CommandError(Exception):
    """An error that a command reports in one line on standard error, with its exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: BaseException | str, most: int = 400) -> str:
    """Return a message on one line, cut to ``most`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def find_unknown(arguments: Sequence[str], known: Collection[str]) -> str | None:
    """Return the error for the first unknown option, abbreviations included; None if all are known.

    Args:
        arguments: the words of a command line.
        known: the options, spelled out.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if option == "--":  # arguments after it are no options
            return None
        if option.startswith("--") and option not in known:
            close = difflib.get_close_matches(option, known, 1)
            return f"no option {option}" + (f"; did you mean {close[0]}?" if close else "; --help lists them")
    return None


class ScriptParser(argparse.ArgumentParser):
    """Parser of a script. It refuses abbreviated options, and names the closest known option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse a command line. An unknown option is reported before any other error."""
        args = sys.argv[1:] if args is None else list(args)
        if wrong := find_unknown(args, self._option_string_actions):
            self.error(wrong)
        return super().parse_known_args(args, namespace)
