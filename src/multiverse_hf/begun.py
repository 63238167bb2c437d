"""What a run is begun with, kept in its folder: a folder is gone on with only as it was begun."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError, one_line

Explain = Callable[[str, Mapping[str, Any], Any], str]


def read_begun(path: Path) -> dict[str, Any] | None:
    """Return the settings that a run was begun with, None if none was.

    Raises:
        CommandError: if the file cannot be read.
    """
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise CommandError(f"cannot read {path}: {one_line(err)}; name another folder") from err
    if not isinstance(stored, dict):
        raise CommandError(f"{path} does not describe a run; name another folder")
    return stored


def check_begun(
    output: Path, stored: Mapping[str, Any], asked: Mapping[str, Any], may_differ: Collection[str], explain: Explain
) -> None:
    """Check that a run goes on as it was begun.

    Args:
        output: its folder, as the user gave it.
        stored: the settings it was begun with.
        asked: the settings now.
        may_differ: names of those that do not matter.
        explain: says in words how a setting differs: (its name, all that is stored, what is asked) -> "with ...".

    Raises:
        CommandError: if a setting differs.
    """
    for name, value in asked.items():
        if name not in may_differ and value != stored.get(name):
            way_out = "give the same again to go on, or another --output"
            raise CommandError(f"{output} was begun {explain(name, stored, value)}; {way_out}")


def name_option(name: str, value: Any) -> str:
    """Write a setting as the option that sets it."""
    return f"--{name.replace('_', '-')} {', '.join(value) if isinstance(value, list) else value}"


def explain_option(
    name: str, stored: Mapping[str, Any], value: Any, write: Callable[[str, Any], str] = name_option
) -> str:
    """Say how a setting differs that an option sets, which ``write`` writes."""
    there = stored.get(name)
    was = f"with {write(name, there)}" if there is not None else f"without {write(name, value)}"
    return was + (f", now it is {write(name, value)}" if None not in (there, value) else "")
