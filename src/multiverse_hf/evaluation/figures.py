"""Figures in one style, saved as PNG and SVG."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.errors import FAILURE, CommandError, install_line

DPI = 120


def make_figure(columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, side by side.

    Raises:
        CommandError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ModuleNotFoundError as err:
        raise CommandError(f"figures need matplotlib; {install_line('eval')}", FAILURE) from err
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for each in axes:
        each.grid(True, which="major", alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def error_bars(estimates: Iterable[Mapping[str, float]], scale: float = 1) -> list[list[float]]:
    """Return the lengths of estimates' intervals below and above their values."""
    values = [[scale * abs(each[end] - each["value"]) for end in ("low", "high")] for each in estimates]
    return [list(ends) for ends in zip(*values, strict=True)]


def count_axis(axes: Any) -> None:
    """Start the vertical axis at 0, with ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)


def log_axis(axes: Any, values: Sequence[float], **options: Any) -> None:
    """Scale the horizontal axis by powers of two, with ticks only at ``values``."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values], **options)
    axes.minorticks_off()  # on a short axis they would be labelled, as 5.8 x 10^0


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG. ``path`` has either ending, or none. Drawing ends before a file is opened."""
    path = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    from matplotlib import rc_context

    written = []
    for kind in ("png", "svg"):
        picture = io.BytesIO()
        # without time and random ids, the same figure gives the same file
        with rc_context({"svg.hashsalt": "multiverse_hf"}):
            figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        written.append(path.with_name(f"{path.name}.{kind}"))
        written[-1].write_bytes(picture.getvalue())
    return written
