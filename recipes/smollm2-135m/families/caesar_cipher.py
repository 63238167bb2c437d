"""Texts in which every letter was moved three places on: a path for each word."""

import re

from multiverse_hf.data.families import Fork, ProblemFamily, Solution, Subtask

MOVED = 3


def back(letter: str) -> str:
    return chr((ord(letter) - ord("A") - MOVED) % 26 + ord("A"))


def read(word: str) -> str:
    return "".join(map(back, word))


def write_word(word: str) -> Subtask:
    letters = ", ".join(f"{letter} is {back(letter)}" for letter in word)
    return Subtask(word, (f"The letters of {word} are {' '.join(word)}. Back, {letters}. The word is {read(word)}.",))


def solve(item: dict) -> Solution | None:
    words = item["metadata"]["cipher_text"].split()
    if not all(re.fullmatch("[A-Z]+", word) for word in words):
        return None
    fork = Fork(write_word, tuple(words), "All words are read.")
    return Solution((f"Each letter was moved {MOVED} places on, so I go {MOVED} back.", fork), item["answer"])


def check(item: dict, text: str) -> str | None:
    wrong = [each for each in re.findall(r"\b([A-Z]) is ([A-Z])\b", text) if back(each[0]) != each[1]]
    return f"{wrong[0][0]} is not {wrong[0][1]}" if wrong else None


OPTIONS = {"min_words": 3, "max_words": 12, "min_rotation": MOVED, "max_rotation": MOVED}
FAMILIES = [ProblemFamily("caesar_cipher", solve, OPTIONS, check=check)]
