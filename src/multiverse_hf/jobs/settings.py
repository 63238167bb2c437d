"""The settings of a job's run, stored beside its rows."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from multiverse_hf import __version__
from multiverse_hf.begun import Explain, check_begun, read_begun
from multiverse_hf.errors import CommandError
from multiverse_hf.jobs.folders import JobFolder
from multiverse_hf.outputs import json_text, write_output


def begin_or_resume(
    folder: JobFolder,
    output: Path,
    asked: Mapping[str, Any],
    may_differ: Collection[str],
    explain: Explain,
    packages: Collection[str],
    draws: Mapping[str, Any] | None = None,
    is_dry_run: bool = False,
) -> dict[str, Any]:
    """Store the settings of a new run, except for a dry run, or check that they are those of the run in this folder.

    Args:
        folder, output: the folder; ``output`` is its path as the user gave it.
        asked: the settings.
        may_differ: names of settings that may differ when a run is continued.
        explain: as for :func:`~multiverse_hf.begun.check_begun`.
        packages: packages whose versions are stored.
        draws: values for settings that are None when a run begins.
        is_dry_run: write nothing.

    Returns:
        The settings that the run began with.

    Raises:
        CommandError: if the folder is another run's.
    """
    stored, draws = read_begun(folder.settings), draws or {}
    if stored is None:
        if folder.result.exists() or (folder.path / "parts").exists():
            raise CommandError(f"{output} holds rows of a run, but no run.json; name another folder")
        begun = dict(asked) | {name: value for name, value in draws.items() if asked[name] is None}
        begun["versions"] = {"multiverse_hf": __version__} | {name: version(name) for name in packages}
        if not is_dry_run:
            write_output(folder.settings, json_text(begun, indent=2))
        return begun
    drawn = [name for name in draws if asked[name] is None]
    check_begun(output, stored, asked, [*may_differ, *drawn], explain)
    return stored
