"""Comparison of two runs by problem: paired differences with intervals, and problems helped and hurt."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import RULES_VERSION, AnswerKind, judge
from multiverse_hf.evaluation.figures import error_bars, make_figure, save_figure
from multiverse_hf.evaluation.metrics import avg_at_n, bootstrap
from multiverse_hf.evaluation.report import describe_sampling, markdown_table, to_html
from multiverse_hf.evaluation.results import by_problem, metrics_of, read_results
from multiverse_hf.evaluation.samples import Sample, read_samples
from multiverse_hf.evaluation.task_files import find_task
from multiverse_hf.evaluation.tasks import TASKS, load_problems
from multiverse_hf.judging.verifier import Verifier
from multiverse_hf.outputs import json_text, output_folder

COMPARED = {
    "pass@1": "pass@1, points",
    "parallelism": "# parallel",
    "length": "length",
    "tokens": "tokens",
    "well_formed": "well formed, points",
}
MAX_FLIPS = 20  # flips shown per task; comparison.json has all


@dataclass(frozen=True, slots=True)
class Flip:
    """A problem that one run answers better than the other.

    Attributes:
        id, group: id and group of the problem.
        before, after: share of right answers in A and in B.
        parallelism_before, parallelism_after: mean # parallel of its answers in A and in B.
        forked: whether exactly one of A and B forks in an answer to it.
    """

    id: str
    group: str | None
    before: float
    after: float
    parallelism_before: float
    parallelism_after: float
    forked: bool


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compare two runs on the problems that both have answered.

    Returns:
        ``{"schema": 1, "a": results of A, "b": ..., "judged_again": [...], "tasks": {name: {...}}}``.
        ``judged_again`` lists the runs that another version of the rules had judged. A task has ``problems`` (in both
        runs), ``only_a``, ``only_b``, ``differences`` (B - A by metric: value, low, high), ``helped`` and ``hurt``
        (lists of :class:`Flip`), and ``by_forking``: pass@1 of both runs on problems where B forks, and on the others.

    Raises:
        CommandError: if a folder holds no finished run, or the runs have no problem in common.
    """
    runs = []
    for folder in (first, second):
        results = read_results(folder)
        if results is None:
            raise CommandError(f"{folder} holds no results.json; finish it with multiverse eval, then compare")
        runs.append((results, read_samples(folder / "samples")))
    heads = dict(zip("ab", (results for results, _ in runs), strict=True))
    again = [side for side, results in heads.items() if results.get("rules_version", 1) != RULES_VERSION]
    (a, samples_a), (b, samples_b) = (
        (results, judge_again(samples, results) if side in again else samples)
        for side, (results, samples) in zip("ab", runs, strict=True)
    )
    names = [name for name in a["tasks"] if name in b["tasks"]]
    tasks = {name: _compare_task(name, samples_a, samples_b, a["seed"]) for name in names}
    if not any(task["problems"] for task in tasks.values()):
        raise CommandError(
            f"{first} and {second} have no problem in common: tasks {', '.join(a['tasks'])} and "
            f"{', '.join(b['tasks'])}; evaluate both on the same tasks and rows"
        )
    sides = {name: _head(results) for name, results in heads.items()}
    return {"schema": 1, **sides, "judged_again": again, "tasks": tasks}


def judge_again(samples: Sequence[Sample], results: Mapping[str, Any]) -> list[Sample]:
    """Return a run's samples with verdicts by this version's rules. Samples of unknown tasks are unchanged.

    Raises:
        CommandError: if a generator of reasoning-gym is missing, or makes other problems now.
    """
    rules = {name: task.kind for name, task in TASKS.items()}
    rules |= {name: AnswerKind(task["rule"]) for name, task in results["tasks"].items() if "rule" in task}
    generated = {name: find_task(name) for name, rule in rules.items() if rule is AnswerKind.REASONING_GYM}
    made = {
        name: {problem.id for problem in load_problems(task, limit=results["tasks"][name]["limit"]).problems}
        for name, task in generated.items()
    }
    judged = []
    with Verifier() as verifier:
        for sample in samples:
            if sample.task in rules and sample.error is None:
                score = None
                if sample.task in generated:
                    if sample.id not in made[sample.task]:
                        raise CommandError(f"{sample.task} has other problems in this version; evaluate again")
                    score = generated[sample.task].scorer(sample.id)
                verdict = judge(rules[sample.task], sample.gold, sample.document, verifier, score)
                sample = replace(
                    sample, answer=verdict.answer, correct=verdict.correct, rule=verdict.rule.value,
                    score=verdict.score,
                )  # fmt: skip
            judged.append(sample)
    return judged


def _head(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's results that identifies it."""
    return {name: value for name, value in results.items() if name != "tasks"} | {
        "gated": any(task["gated"] for task in results["tasks"].values())
    }


def _compare_task(name: str, samples_a: Sequence[Sample], samples_b: Sequence[Sample], seed: int) -> dict[str, Any]:
    of_a, of_b = (by_problem([s for s in samples if s.task == name]) for samples in (samples_a, samples_b))
    shared = [id for id in of_a if id in of_b and of_a[id][0].gold == of_b[id][0].gold]
    task: dict[str, Any] = {
        "problems": len(shared),
        "only_a": len(of_a) - len(shared),
        "only_b": len(of_b) - len(shared),
    }
    if not shared:
        return task
    has_scores = all(sample.score is not None for id in shared for sample in (*of_a[id], *of_b[id]))
    metrics = metrics_of(1, has_scores)  # means do not depend on the number of samples
    task["differences"] = {
        metric: asdict(bootstrap([metrics[metric](of_b[id]) - metrics[metric](of_a[id]) for id in shared], seed))
        for metric in (*COMPARED, *(["score"] if has_scores else []))
    }
    flips = [flip for id in shared if (flip := _flip(of_a[id], of_b[id])).before != flip.after]
    task["helped"] = [asdict(flip) for flip in flips if flip.after > flip.before]
    task["hurt"] = [asdict(flip) for flip in flips if flip.after < flip.before]
    task["by_forking"] = {}
    for kind, forks in (("forks", True), ("does not fork", False)):
        ids = [id for id in shared if any(sample.num_forks for sample in of_b[id]) is forks]
        if ids:
            scores = [[avg_at_n([s.correct for s in of[id]]) for id in ids] for of in (of_a, of_b)]
            difference = bootstrap([after - before for before, after in zip(*scores, strict=True)], seed)
            task["by_forking"][kind] = {
                "problems": len(ids),
                "a": sum(scores[0]) / len(ids),
                "b": sum(scores[1]) / len(ids),
                "difference": asdict(difference),
            }
    return task


def _flip(of_a: Sequence[Sample], of_b: Sequence[Sample]) -> Flip:
    shares = [avg_at_n([sample.correct for sample in of]) for of in (of_a, of_b)]
    widths = [sum(sample.parallelism for sample in of) / len(of) for of in (of_a, of_b)]
    forks = [any(sample.num_forks for sample in of) for of in (of_a, of_b)]
    return Flip(of_a[0].id, of_a[0].group, *shares, *widths, forks[0] != forks[1])


# Output


def show_difference(metric: str, of: Mapping[str, float]) -> str:
    """Return a difference with its sign and interval; shares are in percentage points."""
    scale = 100 if metric in ("pass@1", "well_formed") else 1
    digits = {"pass@1": 1, "well_formed": 1, "parallelism": 2, "score": 3}.get(metric, 0)
    return f"{scale * of['value']:+.{digits}f} [{scale * of['low']:+.{digits}f}, {scale * of['high']:+.{digits}f}]"


def has_scores(comparison: Mapping[str, Any]) -> bool:
    """Return whether a task has scores in both runs."""
    return any("score" in task.get("differences", ()) for task in comparison["tasks"].values())


def compared_cells(task: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """Return a task's cells of a table: problems, differences, problems helped and hurt."""
    found = task["differences"]
    differences = [show_difference(metric, found[metric]) if metric in found else "" for metric in metrics]
    return [str(task["problems"]), *differences, str(len(task["helped"])), str(len(task["hurt"]))]


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """Return the comparison in Markdown. It names problems only by their ids."""
    lines = ["# Comparison", ""]
    for side in ("a", "b"):
        run = comparison[side]
        lines.append(
            f"- {side.upper()}: `{run['model']['name']}`, {run['mode']}; prompt `{run['prompts']['template']}`; "
            f"{describe_sampling(run)}; commit {run['commit']}"
        )
    for side in comparison["judged_again"]:
        lines.append(f"- {side.upper()} was judged again, by version {RULES_VERSION} of the rules for answers")
    lines += ["", "Differences are B - A, paired by problem; in brackets 95 % intervals, bootstrap over problems.", ""]
    lines += ["![Shares of right answers, and where parallel writing helped or hurt](comparison.svg)", ""]
    metrics = COMPARED | ({"score": "score"} if has_scores(comparison) else {})
    cells = [
        [name, *compared_cells(task, tuple(metrics))] for name, task in comparison["tasks"].items() if task["problems"]
    ]
    lines += markdown_table(["task", "problems", *metrics.values(), "helped", "hurt"], cells)
    for name, task in comparison["tasks"].items():
        if not task["problems"]:
            lines += ["", f"{name}: no problem in common."]
            continue
        lines += ["", f"## {name}", ""]
        if task["only_a"] or task["only_b"]:
            lines += [f"Left out: {task['only_a']} problems that only A has, {task['only_b']} that only B has.", ""]
        for kind, of in task["by_forking"].items():
            lines.append(
                f"- Where B {kind} ({of['problems']} problems): A {100 * of['a']:.1f} %, B {100 * of['b']:.1f} %, "
                f"{show_difference('pass@1', of['difference'])} points"
            )
        for title, key in (("Parallel writing helped", "helped"), ("Parallel writing hurt", "hurt")):
            lines += ["", f"### {title if _is_about_parallel(comparison) else key.title()}", "", *_flips(task[key])]
    return "\n".join(lines) + "\n"


def _is_about_parallel(comparison: Mapping[str, Any]) -> bool:
    return comparison["b"]["mode"] == "parallel" and comparison["a"]["mode"] != "parallel"


def _flips(flips: Sequence[Mapping[str, Any]]) -> list[str]:
    if not flips:
        return ["No problem."]
    header = ["problem", "group", "right in A", "right in B", "# parallel A", "# parallel B"]
    cells = [
        [flip["id"], flip["group"] or "", *(f"{100 * flip[side]:.0f} %" for side in ("before", "after")),
         *(f"{flip[side]:.2f}" for side in ("parallelism_before", "parallelism_after"))]
        for flip in flips[:MAX_FLIPS]
    ]  # fmt: skip
    lines = markdown_table(header, cells)
    if len(flips) > MAX_FLIPS:
        lines += ["", f"And {len(flips) - MAX_FLIPS} more, in comparison.json."]
    return lines


def draw_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Draw the differences with their intervals by task, and by whether B forks."""
    rows: dict[str, Mapping[str, float]] = {}
    for name, task in comparison["tasks"].items():
        if task["problems"]:
            rows[f"{name}, all {task['problems']}"] = task["differences"]["pass@1"]
            rows |= {
                f"{name}, B {kind}: {of['problems']}": of["difference"] for kind, of in task["by_forking"].items()
            }
    figure, (axes,) = make_figure(height=1.2 + 0.45 * len(rows))
    for label, of in reversed(rows.items()):
        axes.errorbar([100 * of["value"]], [label], xerr=error_bars([of], 100), fmt="o", color="#2b6cb0", capsize=4)
    axes.axvline(0, color="gray", linestyle=":")
    axes.margins(y=0.2)
    axes.set(xlabel="pass@1 of B - A, percentage points")
    save_figure(figure, path)


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``.md``, ``.html``, ``.png`` and ``.svg``."""
    text = comparison_page(comparison)
    with output_folder(folder) as part:
        draw_comparison(part / "comparison", comparison)
        (part / "comparison.md").write_text(text, encoding="utf-8")
        (part / "comparison.html").write_text(to_html(text, "Comparison"), encoding="utf-8")
        (part / "comparison.json").write_text(json_text(comparison, indent=2), encoding="utf-8")
