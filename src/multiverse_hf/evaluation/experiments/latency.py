"""Figure 8a: latency per token against # parallel, fitted with y = a / x + b.

x is the # parallel of an answer, and y its milliseconds per token from the first token chosen, at batch 1. b is the
cost of a token that parallelism does not reduce, and b / (a + b) its share of the latency at x = 1 (paper, section on
efficiency). Here a model writes real answers. ``benchmarks/latency_vs_parallelism.py`` measures the same with random
weights of any size, on blocks of a given shape.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multiverse_hf.evaluation.experiments import paper
from multiverse_hf.evaluation.experiments.subject import Subject, describe, shown
from multiverse_hf.evaluation.experiments.timing import in_turns
from multiverse_hf.evaluation.figures import make_figure, save_figure


@dataclass(frozen=True)
class Fit:
    """y = a/x + b.

    Attributes:
        a_ms, b_ms: coefficients in milliseconds per token.
        r_squared: share of the variance of y that the curve explains.
        residual_percent: greatest distance of a point from the curve, in percent of the point.
    """

    a_ms: float
    b_ms: float
    r_squared: float
    residual_percent: float

    @property
    def share_percent(self) -> float:
        """b/(a+b): share of the latency at x = 1 that parallelism does not reduce. Negative if b is."""
        return 100 * self.b_ms / (self.a_ms + self.b_ms)

    def to_dict(self) -> dict[str, float]:
        """Return all values as the result stores them."""
        return {
            name: round(value, 6) for name, value in (asdict(self) | {"share_percent": self.share_percent}).items()
        }


def fit(parallelism: Sequence[float], latency: Sequence[float]) -> Fit:
    """Return the least-squares fit of latency, in milliseconds per token, as a linear function of 1/parallelism.

    Raises:
        ValueError: if there are not two different degrees of parallelism.
    """
    x, y = np.array(parallelism), np.array(latency)
    if len(np.unique(x)) < 2:
        raise ValueError(f"a curve needs at least two degrees of parallelism, got {parallelism}")
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / x, np.ones_like(x)], axis=1), y, rcond=None)
    residuals = y - (a / x + b)
    variance = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float((residuals**2).sum()) / variance if variance else 1.0
    return Fit(float(a), float(b), r_squared, 100 * float(np.abs(residuals / y).max()))


def measure_latency(subject: Subject, repeats: int) -> dict[str, Any]:
    """Answer every problem alone, several times in turns, and fit the medians.

    Raises:
        ValueError: if all answers have the same # parallel.
    """
    prompts = subject.prompts()
    times: list[list[float]] = [[] for _ in prompts]
    answers: list[Any] = [None] * len(prompts)
    with subject.engine(max_num_seqs=1) as time_answers:
        time_answers(prompts[:1])  # the first answer includes one-time costs
        for number in shown(in_turns(range(len(prompts)), repeats), len(prompts) * repeats, "answers"):
            timed = time_answers([prompts[number]])
            answers[number] = timed.results[0].stats
            times[number].append(1000 * timed.seconds / timed.num_tokens)
    points = [
        {
            "parallelism": round(stats.parallelism, 4),
            "tokens": stats.num_tokens,
            "steps": stats.num_steps,
            "ms_per_token": round(statistics.median(of), 4),
            "min": round(min(of), 4),
            "max": round(max(of), 4),
        }
        for stats, of in zip(answers, times, strict=True)
    ]
    x = [point["parallelism"] for point in points]
    repeated = [fit(x, of).share_percent for of in zip(*times, strict=True)]
    return describe(subject, "latency") | {
        "repeats": repeats,
        "points": points,
        "fit": fit(x, [point["ms_per_token"] for point in points]).to_dict(),
        "fit_of_least": fit(x, [point["min"] for point in points]).to_dict(),
        "share_percent_of_repeats": [round(share, 3) for share in repeated],
        "paper": {
            str(tokens): {"a_ms": a, "b_ms": b, "share_percent": paper.LATENCY_SHARES[tokens]}
            for tokens, (a, b) in paper.LATENCY_CURVES.items()
        },
    }


def summarize(result: Mapping[str, Any]) -> list[str]:
    """Return the results in lines for people."""
    curve, shares = result["fit"], result["share_percent_of_repeats"]
    theirs = ", ".join(f"{share} % at {tokens // 1024}k tokens" for tokens, share in paper.LATENCY_SHARES.items())
    return [
        f"latency = {curve['a_ms']:.3f} / x + {curve['b_ms']:.3f} ms per token, x = # parallel "
        f"({len(result['points'])} answers, R² {curve['r_squared']:.3f})",
        f"b/(a+b) = {curve['share_percent']:.1f} % (single repeats {min(shares):.1f} to {max(shares):.1f} %, "
        f"least times {result['fit_of_least']['share_percent']:.1f} %)",
        f"the paper's engine, 32B: b/(a+b) = {theirs}",
    ]


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw the points and their curve, and the paper's curves as shares of the latency at x = 1."""
    figure, (ours, both) = make_figure(2, width=10.5)
    points, curve = result["points"], result["fit"]
    x = np.array([point["parallelism"] for point in points])
    y = np.array([point["ms_per_token"] for point in points])
    ends = [y - [point["min"] for point in points], [point["max"] for point in points] - y]
    along = np.linspace(1, max(x.max(), 2), 200)
    label = f"{curve['a_ms']:.2f} / x + {curve['b_ms']:.2f} ms: b/(a+b) = {curve['share_percent']:.1f} %"
    seen_through = {"markerfacecolor": "none", "alpha": 0.6}  # all answers without a fork are at 1
    ours.errorbar(
        x, y, ends, fmt="o", markersize=4, linewidth=0.8, color="#2b6cb0", label="answers, median and range",
        **seen_through,
    )  # fmt: skip
    ours.plot(along, curve["a_ms"] / along + curve["b_ms"], color="#c05621", label=label, zorder=3)
    ours.set(xlabel="# parallel", ylabel="latency per token (ms)", ylim=(0, None))
    ours.legend(frameon=False, fontsize="small")
    both.plot(
        x, y / (curve["a_ms"] + curve["b_ms"]), "o", markersize=4, color="#2b6cb0", label=result["model"]["name"],
        **seen_through,
    )  # fmt: skip
    for (tokens, (a, b)), style in zip(paper.LATENCY_CURVES.items(), ("-", "--", ":"), strict=True):
        label = f"paper, 32B, {tokens // 1024}k: {paper.LATENCY_SHARES[tokens]} %"
        both.plot(along, (a / along + b) / (a + b), style, color="gray", label=label)
    both.set(xlabel="# parallel", ylabel="latency per token, of that at 1", ylim=(0, None))
    both.legend(frameon=False, fontsize="small")
    save_figure(figure, path)
