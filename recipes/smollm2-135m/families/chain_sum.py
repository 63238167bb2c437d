"""Sums and differences in a row: each step needs the one before, so there is no block."""

from multiverse_hf.data.families import ProblemFamily, Solution


def solve(item: dict) -> Solution:
    first, *rest = item["metadata"]["expression"].split()
    value, steps = int(first), [f"Each step needs the last result, so I go from left to right. Start with {first}."]
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        after = value + number if sign == "+" else value - number
        steps.append(f"{value} {sign} {number} = {after}.")
        value = after
    return Solution((" ".join(steps),), item["answer"])


FAMILIES = [ProblemFamily("chain_sum", solve, {"min_terms": 3, "max_terms": 6, "max_digits": 2})]
