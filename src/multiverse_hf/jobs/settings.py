"""What a run is begun with, kept beside its rows: a folder is gone on with only as it was begun."""

import json
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from multiverse_hf import __version__
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.jobs.folders import JobFolder
from multiverse_hf.outputs import write_output


def settle(
    folder: JobFolder,
    output: Path,
    asked: Mapping[str, Any],
    information: Collection[str],
    explain: Callable[[str, Mapping[str, Any], Any], str],
    packages: Collection[str],
    draws: Mapping[str, Any] | None = None,
    is_dry_run: bool = False,
) -> dict[str, Any]:
    """Write down what a run is begun with, unless that is a dry run, or check that it is the one that was begun here.

    Args:
        folder, output: where; ``output`` as the user gave it.
        asked: the settings.
        information: names of those that may differ: they say how a run is run and not what it is.
        explain: says in words how a setting differs from the stored one: (its name, all that is stored, what is
            asked) -> "with ...".
        packages: whose versions are written down.
        draws: values for settings that are None when a run is begun.
        is_dry_run: write nothing.

    Returns:
        The settings the run was begun with.

    Raises:
        CommandError: if the folder is another run's.
    """
    stored, draws = _read(folder.settings), draws or {}
    if stored is None:
        if folder.result.exists() or (folder.path / "parts").exists():
            raise CommandError(f"{output} holds rows of a run, but no run.json; name another folder")
        begun = dict(asked) | {name: value for name, value in draws.items() if asked[name] is None}
        begun["versions"] = {"multiverse_hf": __version__} | {name: version(name) for name in packages}
        if not is_dry_run:
            write_output(folder.settings, json.dumps(begun, indent=2, ensure_ascii=False) + "\n")
        return begun
    for name, value in asked.items():
        there = stored.get(name)
        if name not in information and value != there and not (value is None and name in draws):
            way_out = "give the same again to go on, or another --output"
            raise CommandError(f"{output} was begun {explain(name, stored, value)}; {way_out}")
    return stored


def name_option(name: str, value: Any) -> str:
    """Write a setting as the option that sets it."""
    return f"--{name.replace('_', '-')} {value}"


def explain_option(
    name: str, stored: Mapping[str, Any], value: Any, write: Callable[[str, Any], str] = name_option
) -> str:
    """Say how a setting differs that an option sets, which ``write`` writes."""
    there = stored.get(name)
    was = f"with {write(name, there)}" if there is not None else f"without {write(name, value)}"
    return was + (f", now it is {write(name, value)}" if None not in (there, value) else "")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise CommandError(f"cannot read {path}: {one_line(err)}; name another folder") from err
    if not isinstance(stored, dict):
        raise CommandError(f"{path} does not describe a run; name another folder")
    return stored
