"""Texts in which every letter was moved three places on: a path for each word, or for two in a long text."""

import re

from multiverse_hf.data.families import Family, Fork, Solution, Subtask

MOVED = 3


def back(letter: str) -> str:
    return chr((ord(letter) - ord("A") - MOVED) % 26 + ord("A"))


def read(word: str) -> str:
    return "".join(map(back, word))


def write_words(words: tuple[str, ...]) -> Subtask:
    steps = []
    for word in words:
        letters = ", ".join(f"{letter} is {back(letter)}" for letter in word)
        steps.append(f"In {word}, {letters}. The word is {read(word)}.")
    return Subtask(f"letters of {' '.join(words)}", (f"Go {MOVED} letters back. {' '.join(steps)}",))


def solve(item: dict) -> Solution | None:
    words = item["metadata"]["cipher_text"].split()
    if not all(re.fullmatch("[A-Z]+", word) for word in words):
        return None
    size = 1 if len(words) <= 6 else 2
    groups = tuple(tuple(words[at : at + size]) for at in range(0, len(words), size))
    start = f"Each letter was moved {MOVED} places on, so I go {MOVED} back."
    if len(groups) == 1:
        return Solution((start, *write_words(groups[0]).steps), item["answer"])
    fork = Fork(write_words, groups, "All words are read.")
    return Solution((start, fork, f"The text is {' '.join(map(read, words))}."), item["answer"])


def check(item: dict, text: str) -> str | None:
    wrong = [each for each in re.findall(r"\b([A-Z]) is ([A-Z])\b", text) if back(each[0]) != each[1]]
    return f"{wrong[0][0]} is not {wrong[0][1]}" if wrong else None


OPTIONS = {"min_words": 2, "max_words": 12, "min_rotation": MOVED, "max_rotation": MOVED}
FAMILIES = [Family("caesar_cipher", solve, OPTIONS, check=check)]
