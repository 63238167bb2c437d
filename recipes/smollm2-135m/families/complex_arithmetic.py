"""Complex numbers: a path for the real part and a path for the imaginary part."""

from multiverse_hf.data.families import Family, Fork, Solution, Subtask

NAMES = {"+": "sum", "-": "difference", "*": "product"}


def write_part(part: tuple[str, str, int, int, int, int]) -> Subtask:
    side, sign, a, b, c, d = part
    if sign == "*":
        left, right, joined = ((a, c), (b, d), "-") if side == "real" else ((a, d), (b, c), "+")
        one, other = left[0] * left[1], right[0] * right[1]
        start = f"{left[0]} x {left[1]} = {one} and {right[0]} x {right[1]} = {other}. "
        outline = f"{side} part of the product from {a}, {b} and {c}, {d}"
    else:
        (one, other), joined, start = ((a, c) if side == "real" else (b, d)), sign, ""
        outline = f"{side} part of the {NAMES[sign]} from {one} and {other}"
    result = one + other if joined == "+" else one - other
    text = f"For the {side} part: {start}{one} {joined} {other} = {result}. So the {side} part is {result}."
    return Subtask(outline, (text,))


def solve(item: dict) -> Solution:
    data = item["metadata"]
    numbers = [int(value) for value in (*data["num1"], *data["num2"])]
    fork = Fork(
        write_part,
        tuple((side, data["operation"], *numbers) for side in ("real", "imaginary")),
        "Both parts are known.",
    )
    return Solution(
        ("A complex number has a real part and an imaginary part.", fork, f"Together they are {item['answer']}."),
        item["answer"],
    )


OPTIONS = {"operations": ["+", "-", "*"], "operations_weights": [0.3, 0.3, 0.4]}
FAMILIES = [Family("complex_arithmetic", solve, OPTIONS)]
