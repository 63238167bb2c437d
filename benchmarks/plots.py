"""Figures of the benchmarks: one pair of axes, saved as a picture."""

import argparse
import importlib.util
import io
from pathlib import Path
from typing import Any

from report import output_file

from multiverse_hf.evaluation.figures import make_figure


def plot_file(text: str) -> Path:
    """Read the name of a picture to write; say now if it cannot be made."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must be a .png file, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return output_file(text)


def make_axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    """Make a figure and its axes, the lower one in powers of two."""
    figure, (axes,) = make_figure()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all: it is drawn before the file is opened."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path.write_bytes(picture.getvalue())
