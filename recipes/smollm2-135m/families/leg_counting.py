"""Legs of animals: a path for each animal, then a running sum."""

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def write_animal(part: tuple[str, int]) -> Subtask:
    animal, count = part
    legs, name = ANIMALS[animal], animal + "s" * (count > 1)
    steps = [f"A {animal} has {legs} legs, and there are {count}."]
    if count > 10:
        ones = count - 10
        steps.append(f"10 x {legs} = {10 * legs} and {ones} x {legs} = {ones * legs}.")
        steps.append(f"{10 * legs} + {ones * legs} = {count * legs}.")
    else:
        steps.append(f"{count} x {legs} = {count * legs}.")
    steps.append(f"So {count} {name} have {count * legs} legs.")
    return Subtask(f"{count} {name}", (" ".join(steps),))


def solve(item: dict) -> Solution:
    animals = tuple(item["metadata"]["animals"].items())
    legs = [count * ANIMALS[animal] for animal, count in animals]
    total, sums = legs[0], []
    for number in legs[1:]:
        sums.append(f"{total} + {number} = {total + number}.")
        total += number
    fork = Fork(write_animal, animals, "All animals are counted.")
    return Solution(("I count the legs of each kind of animal.", fork, " ".join(sums)), item["answer"])


FAMILIES = [ProblemFamily("leg_counting", solve, {"min_animals": 5, "max_animals": 8})]
