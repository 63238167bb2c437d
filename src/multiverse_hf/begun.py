"""The settings that a run began with, kept in its folder. A run is continued only with the same settings."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError, one_line

Explain = Callable[[str, Mapping[str, Any], Any], str]


def read_begun(path: Path) -> dict[str, Any] | None:
    """Return the settings that a run began with; None if no run began.

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
    """Check that a run continues with the settings it began with.

    Args:
        output: its folder, as the user gave it.
        stored: the settings it began with.
        asked: the settings now.
        may_differ: names of settings that may differ.
        explain: describes how a setting differs: (name, all stored settings, asked value) -> "with ...".

    Raises:
        CommandError: if a setting differs.
    """
    for name, value in asked.items():
        if name not in may_differ and value != stored.get(name):
            way_out = "give the same again to go on, or another --output"
            raise CommandError(f"{output} was begun {explain(name, stored, value)}; {way_out}")


def name_option(name: str, value: Any) -> str:
    """Return a setting as the option that sets it."""
    return f"--{name.replace('_', '-')} {', '.join(value) if isinstance(value, list) else value}"


def explain_option(
    name: str, stored: Mapping[str, Any], value: Any, write: Callable[[str, Any], str] = name_option
) -> str:
    """Return how a setting differs from the stored one. ``write`` writes it as an option."""
    there = stored.get(name)
    was = f"with {write(name, there)}" if there is not None else f"without {write(name, value)}"
    return was + (f", now it is {write(name, value)}" if None not in (there, value) else "")
