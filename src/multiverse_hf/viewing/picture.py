"""Timelines as pictures for a paper: branches as lanes on an axis of steps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.evaluation.figures import make_figure
from multiverse_hf.outputs import output_folder

COLORS = ("#57606a", "#7c4dcc", "#0b6bcb", "#b3540e", "#1b7f3b", "#b0307a", "#0f7f86", "#8a6d00", "#c0392b")
_ROW_INCHES, _MOST_INCHES = 0.3, 24.0
_LINE = 120  # characters of a label over the whole width


def color_number(branches: Sequence[Mapping[str, Any]], number: int) -> int:
    """Return the number of a branch's colour: 0 for the answer itself, others among siblings as they come."""
    branch = branches[number]
    if branch["parent"] is None:
        return 0
    first = next(at for at, each in enumerate(branches) if each["block"] == branch["block"])
    siblings = [at for at, each in enumerate(branches) if each["block"] == branch["block"]]
    shift = color_number(branches, branches[first]["parent"])
    return 1 + (siblings.index(number) + shift) % (len(COLORS) - 1)


def draw_timelines(traces: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Draw the timelines of traces, one below the other on one scale, into ``.png`` and ``.svg`` files.

    Raises:
        CommandError: if matplotlib is not installed.
    """
    make_figure()  # raises its error before matplotlib is imported here
    from matplotlib import rc_context

    for path in paths:
        kind, picture = path.suffix.removeprefix("."), io.BytesIO()
        # without time and random ids, the same results give the same file
        with rc_context({"svg.hashsalt": "multiverse_hf"}):
            figure = _figure(traces)  # a new one: saving moves its parts by a little
            figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
        with output_folder(path.resolve().parent) as folder:
            (folder / path.name).write_bytes(picture.getvalue())


def _figure(traces: Sequence[Mapping[str, Any]]) -> Any:
    num_rows = [1 + max(branch["row"] for branch in trace["branches"]) for trace in traces]
    height = min(sum(num_rows) * _ROW_INCHES + 0.75 * len(traces) + 0.2, _MOST_INCHES)
    figure, (axes,) = make_figure(1, width=9, height=height)
    figure.delaxes(axes)
    grid = figure.subplots(len(traces), 1, squeeze=False, sharex=True, height_ratios=[rows + 0.2 for rows in num_rows])
    for each, trace, rows in zip(grid[:, 0], traces, num_rows, strict=True):
        _draw(each, trace, rows)
    longest = max(trace["stats"]["num_steps"] for trace in traces)
    grid[-1, 0].set(xlabel="step", xlim=(0, max(longest, 1) * 1.01))
    return figure


def _draw(axes: Any, trace: Mapping[str, Any], num_rows: int) -> None:
    branches, steps = trace["branches"], trace["tokens"]["step"]
    forced = {index for first, last in trace["tokens"]["forced"] for index in range(first, last + 1)}
    for segment in trace["segments"]:
        if segment["start"] == segment["stop"]:
            continue
        branch = branches[segment["branch"]]
        tokens = range(segment["start"], segment["stop"])
        # the engine writes forced tokens within the step before
        begin, end = steps[next((at for at in tokens if at not in forced), tokens[0])], steps[tokens[-1]] + 1
        color = COLORS[color_number(branches, segment["branch"])]
        bar = {"height": 0.62, "color": color, "alpha": 1 if branch["critical"] else 0.45, "linewidth": 0}
        axes.barh(branch["row"], end - begin, left=begin, **bar)
    forks: dict[int, list[Mapping[str, Any]]] = {}
    for branch in branches:
        if branch["parent"] is not None:
            forks.setdefault(branch["block"], []).append(branch)
            axes.hlines(branch["row"], branch["step"][1], branch["reduce"][1], color="#8c959f", linestyle=":", lw=1)
    line = {"color": "#8c959f", "lw": 0.8, "zorder": 0}
    for paths in forks.values():
        parent, last = branches[paths[0]["parent"]], max(path["row"] for path in paths)
        begin, end = paths[0]["step"][0], paths[0]["reduce"][1]
        axes.vlines([begin, end], parent["row"], last, **line)
        axes.hlines(parent["row"], begin, end, **line)
    for number, branch in enumerate(branches if num_rows <= 40 else ()):
        first = next((segment for segment in trace["segments"] if segment["branch"] == number), None)
        if first is None or first["start"] == first["stop"]:
            continue
        share = (steps[first["stop"] - 1] + 1 - branch["step"][0]) / max(trace["stats"]["num_steps"], 1)
        room = int(share * _LINE)
        words = f"{branch['name']} {branch['title']}".strip() or "answer"
        words = words if len(words) <= room else f"{words[: room - 1]}…"
        # parse_math: a model's dollar signs are text
        ink = "white" if branch["critical"] else "#1c2128"
        label = {"va": "center", "fontsize": 7, "color": ink, "parse_math": False, "clip_on": True}
        if room >= 4:
            axes.text(branch["step"][0] + 0.004 * trace["stats"]["num_steps"], branch["row"], words, **label)
    stats = trace["stats"]
    title = (
        f"{trace['title']}: {stats['num_tokens']} tokens in {stats['num_steps']} steps, length {stats['length']}, "
        f"# parallel {stats['parallelism']:.2f}"
    )
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    axes.set(ylim=(num_rows - 0.4, -0.6), yticks=[])
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
