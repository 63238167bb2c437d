"""Pooling of a matrix: a path for each square of four numbers finds its largest number or its average."""

from fractions import Fraction

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask

SIZE = 2  # rows and columns of a square


def say(number: Fraction) -> str:
    """Return the number as Python writes a float: 4.0, 4.5, 4.75."""
    return str(float(number))


def write_square(part: tuple[str, tuple[int, ...]]) -> Subtask:
    kind, numbers = part
    listed = " ".join(map(str, numbers))
    steps = [f"The numbers are {listed}."]
    if kind == "max":
        best = numbers[0]
        for number in numbers[1:]:
            steps.append(f"Of {best} and {number} the larger is {max(best, number)}.")
            best = max(best, number)
        steps.append(f"The largest is {best}.")
    else:
        total = numbers[0]
        for number in numbers[1:]:
            steps.append(f"{total} + {number} = {total + number}.")
            total += number
        average = Fraction(total, len(numbers))
        steps.append(f"{total} / {len(numbers)} = {say(average)}. The average is {say(average)}.")
    return Subtask(f"{kind} of {listed}", (" ".join(steps),))


def find(kind: str, numbers: tuple[int, ...]) -> str:
    return str(max(numbers)) if kind == "max" else say(Fraction(sum(numbers), len(numbers)))


def solve(item: dict) -> Solution:
    data = item["metadata"]
    kind, matrix = data["pool_type"], [[int(value) for value in row] for row in data["matrix"]]
    squares = [
        [
            tuple(value for line in matrix[row : row + SIZE] for value in line[column : column + SIZE])
            for column in range(0, len(matrix[0]), SIZE)
        ]
        for row in range(0, len(matrix), SIZE)
    ]
    parts = tuple((kind, square) for row in squares for square in row)
    rows = [" ".join(find(kind, square) for square in row) for row in squares]
    fork = Fork(write_square, parts, "All squares are done.")
    width = len(squares[0])
    start = f"Each row of squares has {width}, and there are {len(squares)} rows."
    return Solution((start, fork, f"The rows have {width} numbers each."), "\n".join(rows))


OPTIONS = {"min_rows": 4, "max_rows": 6, "max_cols": 5, "min_pool_size": SIZE, "max_pool_size": SIZE}
FAMILIES = [ProblemFamily("pool_matrix", solve, OPTIONS)]
