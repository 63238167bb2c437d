"""A folder that is a Space: the app, the package beside it, and what Hugging Face reads of both."""

import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import multiverse_hf
from multiverse_hf.errors import CommandError, install_line
from multiverse_hf.outputs import check_new_folder, new_folder

HEADER = """\
---
title: Multiverse
emoji: 🌌
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: apache-2.0
pinned: false
---

# Multiverse

A model splits its answer into branches, writes them at the same time, and merges them. `multiverse app --space` made
this folder: `app.py`, and the package `multiverse_hf` beside it. To run it on a machine of your own:

```bash
pip install -r requirements.txt
python app.py
```

An endpoint's key belongs in the Space's secrets, as `MULTIVERSE_API_KEY`.
"""
APP = """\
import sys

from multiverse_hf.cli import run

# A Space sets GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, which the command reads.
sys.exit(run({arguments!r}))
"""
TORCH = "# torch without CUDA; remove this line on a Space with a GPU\n--extra-index-url https://download.pytorch.org/whl/cpu\n"


def write_space(folder: Path, arguments: Sequence[str], extras: Sequence[str] = ("app",)) -> None:
    """Write a Space that runs the app with some options of ``multiverse app``, and the packages of some extras.

    Raises:
        CommandError: if the folder holds something, or cannot be written.
    """
    check_new_folder(folder)
    with new_folder(folder) as part:
        (part / "README.md").write_text(HEADER.format(gradio=metadata.version("gradio")), encoding="utf-8")
        (part / "app.py").write_text(APP.format(arguments=["app", *arguments]), encoding="utf-8")
        (part / "requirements.txt").write_text(TORCH + "".join(f"{each}\n" for each in requirements(extras)))
        source = Path(multiverse_hf.__file__).parent
        shutil.copytree(source, part / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def requirements(extras: Sequence[str]) -> list[str]:
    """Return the packages that extras need, in the versions that are installed here.

    Raises:
        CommandError: if one is not installed.
    """
    found, markers = [], {f"extra == {quote}{extra}{quote}" for extra in extras for quote in "\"'"}
    for line in metadata.requires("multiverse_hf") or []:
        name, marker = re.match(r"[\w.-]+", line)[0], line.partition(";")[2].strip()
        if not marker or marker in markers:
            try:
                found.append(f"{name}=={metadata.version(name).partition('+')[0]}")
            except metadata.PackageNotFoundError as err:
                raise CommandError(
                    f"{name} is missing, whose version the Space needs; {install_line(extras[-1])}"
                ) from err
    return sorted(set(found))
