"""The metrics of an evaluation, as plain functions of numbers.

Tokens and length are those of the answer without its prompt, as the engine counts them
(:class:`~multiverse_hf.modeling.state.GenerationStats`). :func:`measure_ids` counts them from token ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multiverse_hf.documents import is_well_formed as is_well_formed
from multiverse_hf.modeling.tags import TagSet

CONFIDENCE = 0.95
RESAMPLES = 2000  # the ends of a 95 % interval then vary by about a twentieth of its width between seeds


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AnswerMeasures:
    """Measures of one answer from its token ids, without the prompt."""

    num_tokens: int
    length: int

    @property
    def parallelism(self) -> float:
        """The paper's # parallel."""
        return parallelism(self.num_tokens, self.length)


# Of one answer


def parallelism(num_tokens: int, length: int) -> float:
    """Return # parallel: an answer's tokens over its length, the critical path (paper, experiments, "# parallel").

    It is 1 for an answer that never forks, and for an empty one.

    Raises:
        ValueError: if there are fewer tokens than positions.
    """
    if not 0 <= length <= num_tokens:
        raise ValueError(f"an answer has at least as many tokens as positions, got {num_tokens} and {length}")
    return num_tokens / length if length else 1.0


def measure_ids(ids: Sequence[int], tags: TagSet) -> AnswerMeasures:
    """Return tokens and length of an answer. The length is the number of its positions (paper, Multiverse Attention).

    Args:
        ids: token ids of the answer in document order, with the engine's end token and without padding.
        tags: the control tags.
    """
    from multiverse_hf.modeling.layout import build_layout

    return AnswerMeasures(len(ids), build_layout(list(ids), tags).length if len(ids) else 0)


def speedup(autoregressive_seconds: float, parallel_seconds: float) -> float:
    """Return how many times as fast parallel writing is (paper, section on efficiency).

    Raises:
        ValueError: if a time is not positive.
    """
    if min(autoregressive_seconds, parallel_seconds) <= 0:
        raise ValueError(f"times must be positive, got {autoregressive_seconds} and {parallel_seconds} s")
    return autoregressive_seconds / parallel_seconds


# Of a problem's samples


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k: the chance that k of n samples contain a right one.

    It is ``1 - C(n - c, k) / C(n, k)`` (Chen et al., 2021, arXiv 2107.03374, equation 1). With k = 1 it is the share
    of right samples; the paper reports pass@1.

    Raises:
        ValueError: unless ``0 <= num_correct <= num_samples`` and ``1 <= k <= num_samples``.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_correct} right of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def avg_at_n(verdicts: Sequence[bool]) -> float:
    """Return avg@n: the share of right answers among a problem's n samples.

    Raises:
        ValueError: if there are none.
    """
    if not verdicts:
        raise ValueError("avg@n needs at least one sample")
    return sum(verdicts) / len(verdicts)


def parallel_rate(num_forks: Sequence[int]) -> float:
    """Return the share of answers that fork (paper: the "zero" model seldom forks).

    Raises:
        ValueError: if there are none.
    """
    if not num_forks:
        raise ValueError("the parallel rate needs at least one answer")
    return sum(forks > 0 for forks in num_forks) / len(num_forks)


# Over problems


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of one value per problem, and its percentile bootstrap interval (95 %) over problems.

    Problems are resampled, not samples, as two samples of one problem are not independent. The same values and seed
    give the same interval.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one problem")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    draws = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, float(low), float(high))
