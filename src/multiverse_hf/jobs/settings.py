"""What a run is begun with, kept beside its rows: a folder is gone on with only as it was begun."""

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
    information: Collection[str],
    explain: Explain,
    packages: Collection[str],
    draws: Mapping[str, Any] | None = None,
    is_dry_run: bool = False,
) -> dict[str, Any]:
    """Write down what a run is begun with, unless that is a dry run, or check that it is the one that was begun here.

    Args:
        folder, output: where; ``output`` as the user gave it.
        asked: the settings.
        information: names of those that may differ: they say how a run is run and not what it is.
        explain: as :func:`~multiverse_hf.begun.check_begun`.
        packages: whose versions are written down.
        draws: values for settings that are None when a run is begun.
        is_dry_run: write nothing.

    Returns:
        The settings the run was begun with.

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
    check_begun(output, stored, asked, [*information, *drawn], explain)
    return stored
