"""A user's own rows as a task: ``multiverse eval --task my.jsonl``.

A row has ``problem`` or ``prompt``, and ``answer``. With a ``group``, there are results by group too. A sentence of
record at the end of a prompt is replaced by the sentence of the mode.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multiverse_hf.data.records import is_encodable
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import AnswerKind
from multiverse_hf.evaluation.tasks import LETTERS, TASKS, Instance, Task, gym_task, row_id
from multiverse_hf.judging import gym


def find_task(name: str, rule: AnswerKind = AnswerKind.MATH) -> Task:
    """Return the task with a name, of a generator of reasoning-gym, or of a ``.jsonl`` file.

    Args:
        name: one of :data:`TASKS`, ``rg:GENERATOR``, or a path.
        rule: rule for a file's answers.

    Raises:
        CommandError: if there is no such task or file.
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith(gym.PREFIX):
        return gym_task(name)
    path = Path(name).expanduser()
    if path.suffix == ".jsonl":
        if rule is AnswerKind.REASONING_GYM:
            raise CommandError(f"--rule {rule} judges the tasks rg:NAME; {name} takes math, letter, exact or chains")
        if not path.is_file():
            raise CommandError(f"no file {name}; --task takes the path of a .jsonl file, or one of {', '.join(TASKS)}")
        return Task(path.name, None, None, "train", rule, functools.partial(_read, rule), file=path)
    close = difflib.get_close_matches(name, TASKS, 1, cutoff=0.3)
    hint = f"did you mean {close[0]}? " if close else ""
    raise CommandError(
        f"no task {name!r}; {hint}there are {', '.join(TASKS)}, rg:NAME, and your own rows as FILE.jsonl"
    )


def _read(rule: AnswerKind, row: Any) -> Instance:
    """Return the problem of a row.

    Raises:
        ValueError: if the row is invalid, with the wrong value.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with problem and answer, got {json.dumps(row):.60}")
    question = _text(row, "problem", "prompt").removesuffix(PARALLEL_SUFFIX).removesuffix(SEQUENTIAL_SUFFIX).strip()
    answer = _text(row, "answer")
    if rule is AnswerKind.LETTER:
        answer = answer.upper()
        if answer not in tuple(LETTERS):
            raise ValueError(f"for --rule letter the answer is one of {', '.join(LETTERS)}, got {answer!r:.60}")
    if rule is AnswerKind.CHAINS:
        if not re.fullmatch(r"-?\d{1,1000}", answer, re.ASCII):
            raise ValueError(f"for --rule chains the answer is an integer, got {answer!r:.60}")
        answer = str(int(answer))
    return Instance(row_id(question), question, answer, None if row.get("group") is None else _text(row, "group"))


def _text(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several fields that a row has, as text.

    Raises:
        ValueError: if it has none of them, or its value is no text or number.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(f"a row needs {' or '.join(names)}; it has {', '.join(map(str, row)) or 'no fields'}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
        raise ValueError(f"{name} is text or a number, got {json.dumps(value):.60}")
    if value != value:  # Python reads NaN, which JSON does not have
        raise ValueError(f"{name} is text or a number, got NaN")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if not text:
        raise ValueError(f"{name} is empty; fill it in, or delete the row")
    if not is_encodable(text):
        raise ValueError(f"{name} holds half a character (a lone surrogate): {text!a:.60}")
    return text
