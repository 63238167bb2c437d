"""Anagrams: a path for each word puts its letters in the order of the alphabet."""

import json
import re

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask


def write_word(word: str) -> Subtask:
    ordered = "".join(sorted(word))
    text = f"The letters of {word} are {' '.join(word)}. In order they are {' '.join(ordered)}."
    return Subtask(word, (f"{text} The key of {word} is {ordered}.",))


def solve(item: dict) -> Solution:
    words, groups = item["metadata"]["words"], {}
    for word in words:
        groups.setdefault("".join(sorted(word)), []).append(word)
    fork = Fork(write_word, tuple(words), "Every word has its key.")
    last = " ".join(f"{key}: {' and '.join(group)}." for key, group in groups.items())
    return Solution(("Anagrams have the same letters in order.", fork, last), json.dumps(list(groups.values())))


def check(item: dict, text: str) -> str | None:
    for word, key in re.findall(r"The key of (\S+) is (\w+)\.", text):
        if "".join(sorted(word)) != key:
            return f"{key} is not the key of {word}"
    return None


OPTIONS = {"min_anagram_groups": 3, "max_anagram_groups": 4, "min_words_per_group": 2, "max_words_per_group": 2}
FAMILIES = [ProblemFamily("group_anagrams", solve, OPTIONS, check=check)]
