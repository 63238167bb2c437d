"""Figures: axes that look alike, saved as PNG and SVG, whole or not at all."""

import io
from pathlib import Path
from typing import Any

from multiverse_hf.errors import FAILURE, CommandError

DPI = 120


def make_figure(columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Any, list[Any]]:
    """Make a figure and its axes, side by side.

    Raises:
        CommandError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, which looks for a display
    except ModuleNotFoundError as err:
        raise CommandError("figures need matplotlib; pip install 'multiverse_hf[eval]'", FAILURE) from err
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for each in axes:
        each.grid(True, which="major", alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and as SVG; ``path`` has either ending, or none. It is drawn before a file is opened."""
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    written = []
    for kind in ("png", "svg"):
        picture = io.BytesIO()
        # neither holds the time, so that the same figure gives the same file
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        written.append(path.with_name(f"{path.name}.{kind}"))
        written[-1].write_bytes(picture.getvalue())
    return written
