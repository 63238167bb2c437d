"""Where a result comes from: versions, processor and commit, stored with every result."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from multiverse_hf import __version__

PACKAGE = Path(__file__).parent


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of this package, Python, torch, transformers and others; None for a missing package."""
    found: dict[str, str | None] = {"multiverse_hf": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware(device: Any = None) -> dict[str, Any]:
    """Return the machine's hardware, and the device that computes (a ``torch.device``; the CPU by default)."""
    import torch

    where = {"device": processor()}
    if device is not None and device.type == "cuda":
        where = {"device": torch.cuda.get_device_name(device), "processor": processor()}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {**where, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": load}


def processor() -> str:
    """Return the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(leave_out: Sequence[str] = ()) -> str | None:
    """Return the commit that runs, with "-dirty" if tracked files differ from it; None if this is no checkout.

    Args:
        leave_out: paths from the repository's root whose changes are ignored, such as stored results.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "provenance.py")  # an installed package may lie in another repository
        excluded = [f":(top,exclude){path}" for path in leave_out]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", *excluded)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
