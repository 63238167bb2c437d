"""The report of a run, Markdown and HTML: what was asked and how first, then what it came to."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.evaluation.figures import make_figure, save_figure
from multiverse_hf.evaluation.samples import Sample
from multiverse_hf.outputs import output_folder

SHOWN = {
    "parallelism": "# parallel",
    "length": "length",
    "tokens": "tokens",
    "well_formed": "well formed",
    "parallel_rate": "forks",
    "finished": "finished",
}
SHARES = ("well_formed", "parallel_rate", "finished")
GATED = (
    "Samples of a gated task hold its questions: `samples/` must not be published. This page holds none of them, and "
    "may be."
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }}
code {{ background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px }}
img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""


def write_report(folder: Path, results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write ``report.md``, ``report.html`` and the figure they show, ``report.png`` and ``report.svg``."""
    text = write_page(results)
    with output_folder(folder) as part:
        draw(part / "report", results, samples)
        (part / "report.md").write_text(text, encoding="utf-8")
        (part / "report.html").write_text(to_html(text, f"Evaluation of {results['model']['name']}"), encoding="utf-8")


def to_html(text: str, title: str) -> str:
    """Make a page of Markdown. What stands in it is text: no HTML of a model's name or answer gets through."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return PAGE.format(title=html.escape(title), body=body)


def write_page(results: Mapping[str, Any]) -> str:
    """Give the report in Markdown. It names no problem: of gated tasks nothing may be published."""
    lines = [f"# Evaluation of {results['model']['name']}, {results['mode']}", "", *_how(results), ""]
    lines += ["![pass@1, # parallel and length of the answers](report.svg)", ""]
    lines += [*_table(results["tasks"], results["n"]), ""]
    for name, task in results["tasks"].items():
        if task["groups"]:
            lines += [f"## {name} by group", "", *_table(task["groups"], results["n"]), ""]
    lines += ["## How answers were judged", "", f"By version {results.get('rules_version', 1)} of the rules.", ""]
    lines += ["| task | " + "rule: answers | ended by: answers |", "|---|---|---|"]
    for name, task in results["tasks"].items():
        counts = [", ".join(f"{key} {n}" for key, n in task[of].items()) for of in ("rules", "finish_reasons")]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    if any(task["gated"] for task in results["tasks"].values()):
        lines += ["", GATED]
    return "\n".join(lines) + "\n"


def describe_sampling(results: Mapping[str, Any]) -> str:
    """Say in a line how answers were drawn."""
    sampling = results["sampling"]
    drawn = (
        f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}" if sampling["do_sample"] else "greedy"
    )
    return (
        f"{drawn}, {results['n']} per problem, seed {results['seed']}, length at most {sampling['max_new_tokens']}, "
        f"structure {sampling['structure']}"
    )


def _how(results: Mapping[str, Any]) -> list[str]:
    """Give the first lines: prompt, sampling, model, versions, hardware, commit, data."""
    model, machine, prompts = results["model"], results["hardware"], results["prompts"]
    system = f", system prompt `{prompts['system_prompt']}`" if prompts["system_prompt"] else ", no system prompt"
    where = "not measured: all answers were there before"
    if machine:
        where = f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads"
        where += f", load {machine['load_average']}" if machine["load_average"] is not None else ""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    lines = [
        f"- Prompt: `{prompts['template']}`{system}",
        f"- Sampling: {describe_sampling(results)}",
        f"- Model: `{model['name']}`, {model['architecture']}, revision {model['commit'] or model['revision']}, "
        f"fingerprint `{model['fingerprint'][:12]}`, dtype {model['dtype']}",
        f"- Versions: {versions}",
        f"- Hardware: {where}",
        f"- Commit: {results['commit'] or 'not a checkout'}",
    ]
    for name, task in results["tasks"].items():
        seen = f", {task['seen_in_training']} left out that the model was trained on"
        lines.append(
            f"- {name}: {task['problems']} problems of {task['source']}, fingerprint `{task['fingerprint']}`"
            + (seen if task["seen_in_training"] else "")
        )
    return lines


def show(name: str, of: Mapping[str, float]) -> str:
    """Write a metric with its interval."""
    if name.startswith(("pass@", "avg@")) or name in SHARES:
        return f"{100 * of['value']:.1f} % [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"
    digits = 2 if name == "parallelism" else 0
    return f"{of['value']:.{digits}f} [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"


def _table(rows: Mapping[str, Mapping[str, Any]], num_samples: int) -> list[str]:
    scores = ["pass@1"] + [f"pass@{2**k}" for k in range(1, 9) if 2**k <= num_samples]
    names = [*scores, *SHOWN]
    lines = [
        "| | problems | " + " | ".join(SHOWN.get(name, name) for name in names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for name, row in rows.items():
        cells = [show(metric, row["metrics"][metric]) for metric in names]
        lines.append(f"| {name} | {row['problems']} | {' | '.join(cells)} |")
    return [*lines, "", "Means over problems; in brackets 95 % intervals, bootstrap over problems."]


def draw(path: Path, results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Draw pass@1 with its interval, how often each # parallel, and length against tokens."""
    figure, (scores, widths, lengths) = make_figure(3, width=12, height=3.8)
    rows = {name: task["metrics"]["pass@1"] for name, task in results["tasks"].items()}
    for name, task in results["tasks"].items():
        rows |= {f"{name} {group}": of["metrics"]["pass@1"] for group, of in task["groups"].items()}
    names = list(rows)[::-1]
    values = [100 * rows[name]["value"] for name in names]
    ends = [[100 * abs(rows[name][end] - rows[name]["value"]) for name in names] for end in ("low", "high")]
    scores.barh(names, values, xerr=ends, color="#8fb8de", ecolor="#445", capsize=3)
    scores.set(xlabel="pass@1, percent", xlim=(0, 105))
    widths.hist([sample.parallelism for sample in samples], bins=20, color="#8fb8de")
    widths.set(xlabel="# parallel", ylabel="answers")
    for right, color, label in ((True, "#2a7f3f", "right"), (False, "#c0392b", "wrong")):
        of = [sample for sample in samples if sample.correct is right]
        lengths.plot([s.num_tokens for s in of], [s.length for s in of], ".", color=color, label=label, alpha=0.6)
    longest = max((sample.num_tokens for sample in samples), default=1)
    lengths.plot([0, longest], [0, longest], ":", color="gray", label="no parallelism")
    lengths.set(xlabel="tokens", ylabel="length (positions)")
    lengths.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
