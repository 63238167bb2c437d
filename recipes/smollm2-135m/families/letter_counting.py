"""Letters in a text: a path for each few words. A long text is nested: two halves, each in groups of words."""

import re

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask

GROUP = 3  # words of a path
LONG = 18  # words from which the text is cut into halves


def count(words: list[str], letter: str) -> int:
    return sum(word.lower().count(letter) for word in words)


def add(groups: list[list[str]], letter: str) -> str:
    """Return the running sum of the groups' counts."""
    total = count(groups[0], letter)
    steps = [f"Start with {total}."]
    for group in groups[1:]:
        number = count(group, letter)
        steps.append(f"{total} + {number} = {total + number}.")
        total += number
    return " ".join(steps)


def cut(words: list[str]) -> list[list[str]]:
    groups = [words[at : at + GROUP] for at in range(0, len(words), GROUP)]
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def write_group(part: tuple[list[str], str]) -> Subtask:
    words, letter = part
    steps = [f'{word}, {" ".join(word)}, has {word.lower().count(letter)} "{letter}".' for word in words]
    steps.append(f"Together {count(words, letter)}.")
    return Subtask(" ".join(words), (" ".join(steps),))


def count_groups(words: list[str], letter: str) -> tuple[str | Fork, ...]:
    groups = cut(words)
    if len(groups) == 1:
        return tuple(write_group((words, letter)).steps)
    fork = Fork(write_group, tuple((group, letter) for group in groups), "All groups are counted.")
    return (fork, add(groups, letter))


def write_half(part: tuple[list[str], str]) -> Subtask:
    words, letter = part
    steps = count_groups(words, letter)
    last = f"This half has {count(words, letter)}."
    return Subtask(" ".join(words), (*steps, last))


def solve(item: dict) -> Solution:
    words, letter = item["metadata"]["span"], item["metadata"]["target_letter"]
    start = f'I look for "{letter}" in each word, capital or small.'
    if len(words) < LONG:
        return Solution((start, *count_groups(words, letter)), item["answer"])
    middle = len(words) // 2
    halves = [words[:middle], words[middle:]]
    fork = Fork(write_half, tuple((half, letter) for half in halves), "Both halves are counted.")
    return Solution((start, fork, add(halves, letter)), item["answer"])


def check(item: dict, text: str) -> str | None:
    for word, number, letter in re.findall(r'(\S+), [^,"]*, has (\d+) "(.)"', text):
        if word.lower().count(letter) != int(number):
            return f"{word} does not have {number} {letter!r}"
    return None


FAMILIES = [ProblemFamily("letter_counting", solve, {"min_words": 10, "max_words": 24}, check=check)]
