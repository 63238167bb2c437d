"""Two people who always tell the truth or always lie: a path for each of the four cases."""

from functools import partial
from itertools import product

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def is_true(statement: tuple, case: tuple[bool, ...]) -> bool:
    kind, *rest = statement
    if kind in ("telling-truth", "lying"):
        return case[rest[0]] == (kind == "telling-truth")
    values = [is_true(each, case) for each in rest]
    return {
        "not": lambda: not values[0],
        "and": lambda: all(values),
        "or": lambda: any(values),
        "->": lambda: not values[0] or values[1],
        "<=>": lambda: values[0] == values[1],
    }[kind]()


def say(statement: tuple, names: tuple[str, ...], terms: dict[str, str], inner: bool = False) -> str:
    """Return the statement in words, in parentheses where it is part of another and not a single claim."""
    kind, *rest = statement
    if kind == "not" and rest[0][0] in ("telling-truth", "lying"):
        kind, rest = ("lying" if rest[0][0] == "telling-truth" else "telling-truth"), rest[0][1:]
    if kind in ("telling-truth", "lying"):
        return f"{names[rest[0]]} is {terms['a_knight' if kind == 'telling-truth' else 'a_knave']}"
    parts = list(map(partial(say, names=names, terms=terms, inner=True), rest))
    text = {
        "not": "it is not the case that {0}",
        "and": " and ".join(parts),
        "or": " or ".join(parts),
        "->": "if {0} then {1}",
        "<=>": "{0} if and only if {1}",
    }[kind].format(*parts)
    return f"({text})" if inner else text


def write_case(part: tuple) -> Subtask:
    names, terms, statements, case = part
    roles = [terms["knight" if honest else "knave"] for honest in case]
    articles = [terms["a_knight" if honest else "a_knave"] for honest in case]
    steps = [" and ".join(f"{name} is {role}" for name, role in zip(names, articles, strict=True))]
    steps[0] = f"Suppose that {steps[0]}."
    for name, role, honest, statement in zip(names, articles, case, statements, strict=True):
        value = is_true(statement, case)
        said, fits = ("true" if value else "false"), "fits" if value == honest else "does not fit"
        steps.append(f"{name} says that {say(statement, names, terms)}. This is {said}, and {fits} {role}.")
    holds = all(is_true(each, case) == honest for each, honest in zip(statements, case, strict=True))
    steps.append(f"The case {'holds' if holds else 'fails'}.")
    return Subtask(", ".join(f"{name} {role}" for name, role in zip(names, roles, strict=True)), (" ".join(steps),))


def solve(item: dict) -> Solution:
    data = item["metadata"]
    names = tuple(map(str, data["names"]))
    terms = {key: str(value) for key, value in data["knight_knave_terms"].items()}
    cases = list(product((True, False), repeat=len(names)))
    fork = Fork(write_case, tuple((names, terms, data["statements"], case) for case in cases), "All cases are tried.")
    number = cases.index(tuple(data["solution"])) + 1
    last = f"Only case {number} holds."
    return Solution(("I try each case.", fork, last), item["answer"].rstrip("."))


FAMILIES = [ProblemFamily("knights_knaves", solve)]
