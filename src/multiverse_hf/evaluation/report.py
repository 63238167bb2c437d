"""The report of a run in Markdown and HTML: first the settings, then the results."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.evaluation.figures import count_axis, error_bars, make_figure, save_figure
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
    "The task is gated: `samples/` holds its questions and must not be published. This page holds none of them, and "
    "may be."
)
MAX_WRONG = 100  # wrong answers shown per task
TAIL = 2000  # characters shown of a document's end, where its answer stands
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .9rem }}
th, td {{ padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }}
th, td, li, code {{ overflow-wrap: break-word }}
code {{ background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px }}
pre {{ background: #f3f3f3; padding: .5rem .7rem; white-space: pre-wrap }}
pre code {{ padding: 0 }}
img {{ max-width: 100% }}
</style></head><body>
{body}
</body></html>
"""


def write_report(folder: Path, results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write ``report.md``, ``report.html`` and their figure, ``report.png`` and ``report.svg``."""
    text = report_page(results, samples)
    with output_folder(folder) as part:
        draw_report(part / "report", results, samples)
        (part / "report.md").write_text(text, encoding="utf-8")
        (part / "report.html").write_text(to_html(text, f"Evaluation of {results['model']['name']}"), encoding="utf-8")


def to_html(text: str, title: str) -> str:
    """Return Markdown as an HTML page. HTML in it is escaped, as names and answers of models may contain it."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return PAGE.format(title=html.escape(title), body=body)


def report_page(results: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """Return the report in Markdown. It shows no problem of a gated task, which must not be published."""
    lines = [f"# Evaluation of {results['model']['name']}, {results['mode']}", "", *_how(results), ""]
    lines += ["![pass@1, # parallel and length of the answers](report.svg)", ""]
    lines += [*_table(results["tasks"], results["n"]), ""]
    for name, task in results["tasks"].items():
        if task["groups"]:
            lines += [f"## {name} by group", "", *_table(task["groups"], results["n"]), ""]
    lines += ["## How answers were judged", "", f"By version {results.get('rules_version', 1)} of the rules.", ""]
    counts = [
        [name, *(", ".join(f"{key} {n}" for key, n in task[of].items()) for of in ("rules", "finish_reasons"))]
        for name, task in results["tasks"].items()
    ]
    lines += markdown_table(["task", "rule: answers", "ended by: answers"], counts)
    lines += ["", "## Answered wrong"]
    for name, task in results["tasks"].items():
        wrong = [sample for sample in samples if sample.task == name and not sample.correct]
        lines += ["", f"{name}: {len(wrong)} of {task['samples']} answers."]
        if task["gated"]:
            lines += ["", GATED]
            continue
        for sample in wrong[:MAX_WRONG]:
            lines += ["", *_wrong(sample, results["prompts"]["suffix"])]
        if len(wrong) > MAX_WRONG:
            lines += ["", f"And {len(wrong) - MAX_WRONG} more; `samples/` has all of them."]
    return "\n".join(lines) + "\n"


def _wrong(sample: Sample, suffix: str) -> list[str]:
    """Return the lines about a wrong answer: problem, answer and verdict."""
    said = "none" if sample.answer is None else _code(sample.answer)
    verdict = f"refused: {sample.error}" if sample.error else f"{sample.rule}, ended by {sample.finish_reason}"
    verdict += f", score {sample.score:g}" if sample.score else ""
    group = f" ({sample.group})" if sample.group else ""
    lines = [f"### {sample.id}{group}, answer {sample.sample + 1}", "", *_block(sample.prompt.removesuffix(suffix))]
    lines += ["", f"- Right answer: {_code(sample.gold)}", f"- Answer: {said}", f"- Verdict: {verdict}"]
    if not sample.document:
        return lines
    left_out = len(sample.document) - TAIL
    title = "What the model wrote" + (f", without the first {left_out:,} characters" if left_out > 0 else "")
    return [*lines, "", f"{title}:", "", *_block(sample.document[-TAIL:])]


def _block(text: str) -> list[str]:
    """Return a text as a block of code. It may contain backticks."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}text", text.strip("\n").rstrip(), fence]


def _code(text: str) -> str:
    """Return a text as inline code. It may contain backticks."""
    tick = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{tick}{space}{' '.join(text.split())}{space}{tick}"


def describe_sampling(results: Mapping[str, Any]) -> str:
    """Return one line about the sampling."""
    sampling = results["sampling"]
    drawn = (
        f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}" if sampling["do_sample"] else "greedy"
    )
    if "path_repetition_penalty" in sampling:
        drawn += f", path_repetition_penalty {sampling['path_repetition_penalty']:g}"
    if taken := results.get("of_record"):
        drawn += f" ({', '.join(taken)} of record of {results['family']})"
    return (
        f"{drawn}, {results['n']} per problem, seed {results['seed']}, length at most {sampling['max_new_tokens']}, "
        f"structure {sampling['structure']}"
    )


def _how(results: Mapping[str, Any]) -> list[str]:
    """Return the first lines: prompt, sampling, model, versions, hardware, commit and data."""
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
        seen = f", without {task['seen_in_training']} that the model was trained on"
        lines.append(
            f"- {name}: {task['problems']} problems of {task['source']}, fingerprint `{task['fingerprint']}`"
            + (seen if task["seen_in_training"] else "")
        )
    return lines


def show(name: str, of: Mapping[str, float]) -> str:
    """Return a metric with its interval."""
    if name.startswith(("pass@", "avg@")) or name in SHARES:
        return f"{100 * of['value']:.1f} % [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"
    digits = {"parallelism": 2, "score": 3}.get(name, 0)
    return f"{of['value']:.{digits}f} [{of['low']:.{digits}f}, {of['high']:.{digits}f}]"


def show_metric(name: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a metric with its interval; "" if a task lacks it, as a score."""
    return show(name, metrics[name]) if name in metrics else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table."""
    lines = [[str(cell).replace("|", r"\|") for cell in cells] for cells in (header, ["---"] * len(header), *rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _table(rows: Mapping[str, Mapping[str, Any]], num_samples: int) -> list[str]:
    scores = ["pass@1"] + [f"pass@{2**k}" for k in range(1, 9) if 2**k <= num_samples]
    scores += ["score"] if any("score" in row["metrics"] for row in rows.values()) else []
    names = [*scores, *SHOWN]
    cells = [
        [name, row["problems"], *(show_metric(each, row["metrics"]) for each in names)] for name, row in rows.items()
    ]
    table = markdown_table(["", "problems", *(SHOWN.get(name, name) for name in names)], cells)
    return [*table, "", "Means over problems; in brackets 95 % intervals, bootstrap over problems."]


def draw_report(path: Path, results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Draw pass@1 with its interval, a histogram of # parallel, and length against tokens."""
    rows = {name: task["metrics"]["pass@1"] for name, task in results["tasks"].items()}
    for name, task in results["tasks"].items():
        rows |= {f"{name} {group}": of["metrics"]["pass@1"] for group, of in task["groups"].items()}
    figure, (scores, widths, lengths) = make_figure(3, width=12, height=max(3.8, 1 + 0.3 * len(rows)))
    names = list(rows)[::-1]
    values = [100 * rows[name]["value"] for name in names]
    scores.barh(
        names, values, xerr=error_bars((rows[name] for name in names), 100), color="#8fb8de", ecolor="#445", capsize=3
    )
    scores.set(xlabel="pass@1, percent", xlim=(-3, 105))
    of = [sample.parallelism for sample in samples]
    widths.hist(of, bins=20, range=(1, max(2, *of)), color="#8fb8de")
    widths.set(xlabel="# parallel", ylabel="answers")
    count_axis(widths)
    longest = max(max(sample.num_tokens for sample in samples), 1)
    lengths.plot([0, longest], [0, longest], ":", color="gray", label="no parallelism")
    # rings around crosses: neither hides the other
    marks = {True: ("o", "#2a7f3f", "right"), False: ("x", "#c0392b", "wrong")}
    for right, (marker, color, label) in marks.items():
        of = [(s.num_tokens, s.length) for s in samples if s.correct is right]
        lengths.plot(*zip(*of, strict=True) if of else ([], []), marker, color=color, label=label, alpha=0.7,
                     markersize=6 if right else 4, markerfacecolor="none")  # fmt: skip
    lengths.set(xlabel="tokens", ylabel="length (positions)")
    lengths.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
