"""The report of a curation: accepted and rejected rows, reasons, and measures of documents, in one HTML file."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multiverse_hf.curator.launch import FAILED, Progress
from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.results import CurationFolder, read_outcomes
from multiverse_hf.curator.tally import DISTANCE_STEP, PARALLELISM_STEP, Tally
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.jobs.folders import SETTINGS
from multiverse_hf.outputs import write_output

GREEN, RED, BLUE, GRAY = "#2a9d5c", "#c8553d", "#3d6fb4", "#9aa0a6"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222; }}
img {{ width: 100%; height: auto; }} h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
dl {{ display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; }} dt {{ color: #666; font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.3rem; }} code {{ background: #f3f3f3; padding: 0 .2rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{about}</p>
<dl>{figures}</dl>
<img alt="Rows and replies by stage, reasons of refusal, distances, # parallel" src="data:image/png;base64,{picture}">
<h2>Rejected rows</h2>
{rejected}
<h2>Refused replies</h2>
{refused}
</body></html>
"""


def write_curation_report(output: Path) -> Path:
    """Write ``report.html`` from the folder's rows, even if the run is not complete. Return its path.

    Raises:
        CommandError: if there is no run, or no finished row.
    """
    try:
        import matplotlib  # noqa: F401 - other extras bring it too
    except ModuleNotFoundError as err:
        raise CommandError(f"--report needs {err.name}: {install_line('curate')}", FAILURE) from err
    path = output.expanduser().absolute()
    try:
        stored = json.loads((path / SETTINGS).read_bytes())
        settings = Settings(**{name: stored[name] for name in Settings.__dataclass_fields__})
        folder = CurationFolder(path, stored["tasks"])
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise CommandError(f"{output} holds no curation ({one_line(err, 80)}); name the folder of a run") from err
    tally = _count(folder)
    if not tally.rows:
        raise CommandError(f"{output} holds no finished row yet; try again later")
    figures = [*_figures(tally, settings), ("calls made again", _failures(folder, settings))]
    page = _PAGE.format(
        title=f"Curation {html.escape(path.name)}",
        about=_about(stored, tally),
        figures="".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures),
        picture=base64.b64encode(draw_tally(tally)).decode(),
        rejected=_table(tally.rejected, tally.rows, "of all rows"),
        refused=_table(tally.checks, tally.asked.total(), "of all replies"),
    )
    write_output(path / "report.html", page)
    return output / "report.html"


def _count(folder: CurationFolder) -> Tally:
    if folder.summary.exists():
        return Tally.from_dict(json.loads(folder.summary.read_bytes()))
    tally = Tally()
    for outcome in read_outcomes(folder):
        tally.add(outcome)
    return tally


def _about(stored: Mapping[str, Any], tally: Tally) -> str:
    done = "" if tally.rows == stored["rows"] else f" So far {tally.rows:,} of {stored['rows']:,} rows."
    prompts = ", ".join(f"{name} {version}" for name, version in stored["prompts"].items())
    model, source = html.escape(stored["model"]), html.escape(Path(stored["input"]).name)
    return f"{source}, curated with <code>{model}</code>; seed {stored['seed']}; prompts {prompts}.{done}"


def _figures(tally: Tally, settings: Settings) -> list[tuple[str, str]]:
    cost = tally.cost(settings)
    tokens = tally.tokens + tally.judge_tokens
    return [
        ("rows", f"{tally.rows:,}"),
        ("accepted", f"{tally.accepted:,} ({tally.accepted / tally.rows:.1%})"),
        ("replies", f"{tally.asked.total():,}"),
        ("tokens asked", f"{tokens['prompt']:,}"),
        ("tokens answered", f"{tokens['completion']:,}"),
        ("cost", "no price given" if cost is None else f"${cost:,.2f}"),
    ]


def _failures(folder: CurationFolder, settings: Settings) -> str:
    """Return the number of repeated calls by kind. A killed run may lack the calls of its last second."""
    counts, _ = Progress(folder, settings).read()
    kinds = {kind: counts.get(f"calls {kind}", 0) for kind in FAILED}
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    return f"{sum(kinds.values()):,}" + (f" <small>({said})</small>" if said else "")


def _table(counts: Counter[str], total: int, of_what: str) -> str:
    if not counts:
        return "<p>None.</p>"
    rows = (
        f"<tr><td>{html.escape(stage)}</td><td>{html.escape(check)}</td><td class=number>{count:,}</td>"
        f"<td class=number>{count / total:.1%}</td></tr>"
        for key, count in counts.most_common()
        for stage, check in [key.split(": ", 1)]
    )
    head = f"<tr><th>stage</th><th>check</th><th></th><th>{of_what}</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def draw_tally(tally: Tally) -> bytes:
    """Return a PNG with a tally's rows by stage, reasons, distances and # parallel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (stages, reasons), (distances, parallelism) = figure.subplots(2, 2)
    _draw_stages(stages, tally)
    _draw_reasons(reasons, tally)
    _draw_histogram(distances, tally.path_distances, DISTANCE_STEP, "paths", GRAY)
    _draw_histogram(distances, tally.distances, DISTANCE_STEP, "documents", BLUE)
    # most distances are close to 0; the log scale shows the others
    distances.set(title="Edit distance to the original", xlabel="distance over length", yscale="log", ylabel="count")
    distances.set_xlim(0, max(0.2, DISTANCE_STEP * max([*tally.distances, *tally.path_distances, 0])))
    distances.set_ylim(bottom=0.7)
    _draw_histogram(parallelism, tally.parallelism, PARALLELISM_STEP, "documents", GREEN)
    parallelism.set(title="# parallel of accepted documents, in characters", xlabel="# parallel", ylabel="count")
    for axes in (distances, parallelism):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "no accepted row", ha="center", va="center", transform=axes.transAxes, color=GRAY)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _draw_stages(axes: Any, tally: Tally) -> None:
    """Draw for each stage the share of rows that passed it, and the share of its accepted replies."""
    names = list(tally.reached)
    refused = Counter(key.split(": ", 1)[0] for key in tally.checks.elements())
    rows = [100 * tally.passed[name] / tally.reached[name] for name in names]
    replies = [100 * (1 - refused[name] / tally.asked[name]) for name in names]
    for shift, heights, color, label in ((-0.2, rows, GREEN, "rows"), (0.2, replies, BLUE, "replies")):
        bars = axes.bar([place + shift for place in range(len(names))], heights, 0.4, color=color, label=label)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=7)
    axes.set(title="Accepted by stage", ylabel="percent", ylim=(0, 112), xticks=range(len(names)), xticklabels=names)
    axes.legend(fontsize="small", loc="lower left")


def _draw_reasons(axes: Any, tally: Tally) -> None:
    """Draw why replies were refused."""
    most = tally.checks.most_common(12)[::-1]
    axes.barh([key for key, _ in most], [count for _, count in most], color=RED)
    axes.set(title="Why replies were refused", xlabel="replies")
    axes.tick_params(axis="y", labelsize=8)
    if not most:
        axes.text(0.5, 0.5, "none was", ha="center", va="center", transform=axes.transAxes, color=GRAY)


def _draw_histogram(axes: Any, bins: Counter[int], step: float, label: str, color: str) -> None:
    if bins:
        places = range(min(bins), max(bins) + 1)
        heights = [bins[place] for place in places]
        axes.bar([place * step for place in places], heights, step, align="edge", color=color, alpha=0.7, label=label)
