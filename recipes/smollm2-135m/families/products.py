"""Products of two numbers by partial products, nested: a path for each digit of the second, a block of the first's."""

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def split(number: int) -> list[int]:
    """Return the place values of the digits that are not zero: 305 gives 300 and 5."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - at) for at, digit in enumerate(digits) if digit != "0"]


def add(values: list[int]) -> str:
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}.")
        total += value
    return " ".join(steps)


def write_digits(part: tuple[int, int]) -> Subtask:
    first, second = part
    one, other = int(str(first)[0]), int(str(second)[0])
    zeros = len(str(first)) + len(str(second)) - 2  # 0 to 4: the factors have three digits at most
    ends = ("no zero", "one zero", "two zeros", "three zeros", "four zeros")[zeros]
    text = f"{one} x {other} = {one * other}, with {ends}, so {first} x {second} = {first * second}."
    return Subtask(f"{first} x {second}", (text,))


def write_row(part: tuple[int, int]) -> Subtask:
    first, second = part
    places = split(first)
    if len(places) == 1:
        steps = write_digits(part).steps
    else:
        fork = Fork(write_digits, tuple((place, second) for place in places), "All digits are multiplied.")
        steps = (f"{' + '.join(map(str, places))} = {first}.", fork, add([place * second for place in places]))
    return Subtask(f"{first} x {second}", tuple(steps))


def solve(item: dict) -> Solution:
    first, second = map(int, item["metadata"]["expression"].split(" * "))
    if not first or not second:
        return Solution((f"One factor is zero: {first} x {second} = 0.",), item["answer"])
    rows = split(second)
    if len(rows) == 1:
        return Solution(write_row((first, second)).steps, item["answer"])
    fork = Fork(write_row, tuple((first, row) for row in rows), "All rows are known.")
    start = f"{' + '.join(map(str, rows))} = {second}."
    return Solution((start, fork, f"Add the rows. {add([first * row for row in rows])}"), item["answer"])


FAMILIES = [ProblemFamily("products", solve, {"min_digits": 2, "max_digits": 3})]
