"""Words spelled backward, one letter after the other: no block."""

from multiverse_hf.data.families import ProblemFamily, Solution


def solve(item: dict) -> Solution:
    word, built = item["metadata"]["word"], ""
    steps = [f"The letters of {word} are {' '.join(word)}. I take them from the end."]
    for letter in reversed(word):
        built += letter
        steps.append(f"{letter} gives {' '.join(built)}.")
    return Solution((" ".join(steps),), item["answer"])


FAMILIES = [ProblemFamily("spell_backward", solve, {"min_word_len": 3, "max_word_len": 7})]
