"""Common divisors: a path for each number finds its prime factors. One number alone is factored without a block."""

from collections import Counter

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def find_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def write_factors(number: int) -> str:
    factors, left, steps = find_factors(number), number, []
    if len(factors) < 2:
        return f"No smaller prime divides {number}, so {number} is prime. Its only factor is {number}."
    for factor in factors[:-1]:
        steps.append(f"{left} / {factor} = {left // factor}.")
        left //= factor
    return f"Divide {number} by small primes. {' '.join(steps)} {left} is prime. The factors are {say(factors)}."


def say(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def write_number(number: int) -> Subtask:
    return Subtask(f"factors of {number}", (write_factors(number),))


def multiply(factors: list[int]) -> str:
    product, steps = factors[0], []
    for factor in factors[1:]:
        steps.append(f"{product} x {factor} = {product * factor}.")
        product *= factor
    return " ".join([*steps, f"The result is {product}."])


def solve_gcd(item: dict) -> Solution:
    numbers = item["metadata"]["numbers"]
    common = Counter(find_factors(numbers[0]))
    for number in numbers[1:]:
        common &= Counter(find_factors(number))
    shared = sorted(common.elements())
    last = f"All have {say(shared)}. {multiply(shared)}" if shared else "No prime is in all of them. The result is 1."
    fork = Fork(write_number, tuple(numbers), "All factors are known.")
    return Solution(("I find the prime factors of each number.", fork, last), item["answer"])


def solve_one(item: dict) -> Solution:
    return Solution((write_factors(item["metadata"]["number"]),), item["answer"])


FAMILIES = [
    ProblemFamily("gcd", solve_gcd, {"min_numbers": 4, "max_numbers": 6, "min_value": 12, "max_value": 99}),
    ProblemFamily("prime_factorization", solve_one, {"min_value": 4, "max_value": 300}),
]
