"""Published results of the paper (arXiv 2506.09991), to draw beside our own."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Score:
    """A cell of table 2: pass@1 in percent, and # parallel, None if the table has none."""

    accuracy: float
    parallelism: float | None = None


# Table 2: Multiverse-32B, 32k context, and the autoregressive model trained on the same data
TABLE = {
    "parallel": {
        "mv:aime24": Score(53.8, 1.18),
        "mv:aime25": Score(45.8, 1.15),
        "mv:math_500": Score(91.8, 1.15),
        "mv:gpqa_diamond": Score(60.7, 1.17),
    },
    "zero": {
        "mv:aime24": Score(52.1, 1.04),
        "mv:aime25": Score(44.2, 1.05),
        "mv:math_500": Score(92.4, 1.12),
        "mv:gpqa_diamond": Score(63.6, 1.17),
    },
    "autoregressive": {
        "mv:aime24": Score(54.6),
        "mv:aime25": Score(45.0),
        "mv:math_500": Score(92.8),
        "mv:gpqa_diamond": Score(61.6),
    },
}

# Figure 7: same length budget, 1k to 4k tokens; points of accuracy over the autoregressive model
BUDGET_GAINS = {"GPQA-Diamond": 2.23, "MATH-500": 1.51}
MEAN_BUDGET_GAIN = 1.87

# Figure 8a: ms per token at # parallel x is a / x + b, batch 1, by tokens of the answer
LATENCY_CURVES = {8192: (15.43, 0.60), 16_384: (15.43, 1.06), 32_768: (15.38, 2.14)}
# b / (a + b) in percent, as the paper gives it
LATENCY_SHARES = {8192: 3.7, 16_384: 6.4, 32_768: 12.2}

# Figure 8b: batch sizes with about the same speedup
BATCH_SIZES = (1, 128)
