"""Legs of animals: a path for each animal, then a running sum."""

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from multiverse_hf.data.families import Family, Fork, Solution, Subtask


def write_animal(part: tuple[str, int]) -> Subtask:
    animal, count = part
    legs = ANIMALS[animal]
    steps = [f"One {animal} has {legs} legs, and there are {count} of this animal."]
    if count > 10:
        ones = count - 10
        steps.append(f"10 x {legs} = {10 * legs} and {ones} x {legs} = {ones * legs}.")
        steps.append(f"{10 * legs} + {ones * legs} = {count * legs}.")
    else:
        steps.append(f"{count} x {legs} = {count * legs}.")
    steps.append(f"That is {count * legs} legs for {animal}.")
    return Subtask(f"legs of {count} {animal}", (" ".join(steps),))


def solve(item: dict) -> Solution:
    animals = list(item["metadata"]["animals"].items())
    names = ", ".join(animal for animal, _ in animals)
    total, sums = 0, []
    for place, (animal, count) in enumerate(animals):
        legs = count * ANIMALS[animal]
        sums.append(
            f"Start with {legs} for {animal}." if not place else f"Add {animal}: {total} + {legs} = {total + legs}."
        )
        total += legs
    fork = Fork(write_animal, tuple(animals), f"The legs of {names} are known.")
    return Solution(("I count the legs of each kind of animal.", fork, " ".join(sums)), item["answer"])


FAMILIES = [Family("leg_counting", solve, {"min_animals": 3, "max_animals": 8})]
