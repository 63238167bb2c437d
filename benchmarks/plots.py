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


def plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis at its powers, or where it spans few of them, at plain numbers."""
    from matplotlib.ticker import AutoLocator

    low, high = sorted(axis.get_view_interval())
    if sum(low <= place <= high for place in axis.get_majorticklocs()) < 3:
        axis.set_major_locator(AutoLocator())
        axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")  # by default 5.8 x 10^0


def save(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all: it is drawn before the file is opened."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                plain_ticks(axis)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path.write_bytes(picture.getvalue())
