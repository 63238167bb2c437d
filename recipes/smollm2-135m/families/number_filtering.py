"""Numbers to keep: a path for each number compares it with the limit."""

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def write_number(part: tuple[str, str, str]) -> Subtask:
    number, limit, operation = part
    verb, side = operation.split("_")
    relation = "smaller" if float(number) < float(limit) else "larger"
    if float(number) == float(limit):
        seen, fits = f"{number} is equal to {limit}, so it is not {side}.", False
    else:
        seen, fits = f"{number} is {relation} than {limit}.", relation == side
    sign, other = (("negative" if value.startswith("-") else "not negative") for value in (number, limit))
    keeps = fits == (verb == "keep")
    rule = f"The rule is to {verb} what is {side}"
    steps = f"{number} is {sign} and {limit} is {other}. {seen} {rule}, so {number} {'stays' if keeps else 'goes'}."
    return Subtask(f"{number} against {limit}", (steps,))


def solve(item: dict) -> Solution:
    data = item["metadata"]
    parts = tuple((number, data["filter_value"], data["operation"]) for number in data["original_numbers"])
    fork = Fork(write_number, parts, "All numbers are compared.")
    left = ", ".join(data["result"])
    last = f"Left are {left}." if left else "No number is left."
    return Solution((f"I compare each number with {data['filter_value']}.", fork, last), item["answer"])


OPTIONS = {"min_numbers": 5, "max_numbers": 9, "max_decimals": 0, "min_value": -99, "max_value": 99}
FAMILIES = [ProblemFamily("number_filtering", solve, OPTIONS)]
