"""The tasks: the source of their rows, their prompts and their right answers.

``multiverse eval`` and the LightEval tasks use the same table, so they ask and judge alike. The prompt of record is
the problem, a space, and one of the two sentences that Multiverse is trained on (``data/suffixes.py``).
"""

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from multiverse_hf.data import chains
from multiverse_hf.data.records import RowError, number_rows
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import AnswerKind
from multiverse_hf.evaluation.chains import chains_rows
from multiverse_hf.judging import gym
from multiverse_hf.judging.boxes import last_boxed

# Sampling of record (the published example), and the paper's context; the model's own context may be shorter
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.6, 0.95, 32_768
LETTERS = "ABCD"


class Mode(StrEnum):
    """How a model is asked (paper, table 2)."""

    PARALLEL = "parallel"  # asked to think in parallel, free to branch
    ZERO = "zero"  # asked to think step by step, still free to branch
    AUTOREGRESSIVE = "autoregressive"  # asked to think step by step, and decoded without branches

    @property
    def suffix(self) -> Suffix:
        """Sentence at the end of the prompt."""
        return Suffix.PARALLEL if self is Mode.PARALLEL else Suffix.SEQUENTIAL

    @property
    def structure(self) -> str:
        """The engine's treatment of control tags."""
        return "off" if self is Mode.AUTOREGRESSIVE else "guided"


SIDES = (Mode.PARALLEL, Mode.AUTOREGRESSIVE)  # what experiments and the demo compare


@dataclass(frozen=True, slots=True)
class Instance:
    """One problem of a task, called an instance in harnesses.

    Attributes:
        id: id of the row, the same for every source.
        question: the question, without the sentence at the end of the prompt.
        gold: the right answer.
        group: group of the problem in results: the kind of a chains problem, or the level of a MATH problem; None
            without groups.
    """

    id: str
    question: str
    gold: str
    group: str | None = None

    def prompt(self, mode: Mode) -> str:
        """Return the prompt of record."""
        return mode.suffix.end(self.question)


@dataclass(frozen=True, slots=True)
class Task:
    """A set of problems.

    Attributes:
        name: name that users type.
        dataset, config, split: source on the Hub; ``dataset`` is None for generated problems.
        kind: kind of the answers, which decides how they are judged.
        read: returns the problem of a row.
        version: raised when prompts, problems or judging change.
        is_gated: whether users must accept terms for the rows, which must not be published.
        file: a user's own rows.
        generator: the generator of reasoning-gym that makes the problems.
    """

    name: str
    dataset: str | None
    config: str | None
    split: str
    kind: AnswerKind
    read: Callable[[Mapping[str, Any]], Instance]
    version: int = 2
    is_gated: bool = False
    file: Path | None = None
    generator: gym.Generator | None = None

    def scorer(self, id: str) -> Callable[[str], float] | None:
        """Return the function that scores answers to a problem; None if answers get no score."""
        if self.generator is None:
            return None
        return functools.partial(gym.score_problem, self.generator, int(id.partition("-")[0]))

    @property
    def stem(self) -> str:
        """Start of a local file's name: ``mv:math_500`` is read from ``math_500*`` or ``math500*``."""
        return _plain(self.name.removeprefix("mv:"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def row_id(text: str) -> str:
    """Return an id from a problem's text, which does not depend on the file or the order of rows."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=6).hexdigest()


# Rows


def _field(row: Mapping[str, Any], *names: str) -> str:
    """Return the first of several columns that a row has, as text.

    Raises:
        ValueError: if it has none of them.
    """
    for name in names:
        if row.get(name) not in (None, ""):
            return str(row[name]).strip()
    raise ValueError(f"a row has no {' or '.join(names)}; it has {', '.join(map(str, row)) or 'no columns'}")


def _read_math(row: Mapping[str, Any]) -> Instance:
    """Return the problem of a row with ``problem``, and ``answer`` or a box in ``solution``."""
    question = _field(row, "problem", "question")
    gold = row.get("answer")
    if gold in (None, ""):
        gold = last_boxed(_field(row, "answer", "solution"))
    if gold in (None, ""):
        raise ValueError(f"a row has no answer, and no box in its solution: {question[:60]!r}")
    level = row.get("level")
    return Instance(row_id(question), question, str(gold).strip(), None if level is None else f"level {level}")


def _read_chains(row: Mapping[str, Any]) -> Instance:
    problem = chains.parse_problem(_field(row, "problem"))
    return Instance(row_id(str(problem)), str(problem), str(problem.answer), problem.kind.value)


def _read_gpqa(row: Mapping[str, Any]) -> Instance:
    """Return the problem with lettered choices, in an order that depends only on the question."""
    question, right = _field(row, "Question"), _field(row, "Correct Answer")
    choices = [right, *(_field(row, f"Incorrect Answer {number}") for number in (1, 2, 3))]
    order = list(range(len(choices)))
    random.Random(row_id(question)).shuffle(order)
    listed = "\n".join(f"{letter}) {choices[at]}" for letter, at in zip(LETTERS, order, strict=True))
    return Instance(row_id(question), f"{question}\n\n{listed}\n\n", LETTERS[order.index(0)])


def _read_gym(row: Mapping[str, Any]) -> Instance:
    """Return the problem of a row. Its id has the number: a generator may ask the same twice.

    The right answer is "" if the generator has none: many answers are right.
    """
    return Instance(f"{row['number']}-{row_id(row['question'])}", row["question"].strip(), row["answer"] or "")


def gym_task(name: str) -> Task:
    """Return the task of a generator of reasoning-gym, such as ``rg:leg_counting,size=20``.

    Raises:
        CommandError: if the name is not of this form.
    """
    generator = gym.parse_generator(name)
    kind = AnswerKind.REASONING_GYM
    return Task(generator.title, None, None, "test", kind, _read_gym, version=1, generator=generator)


TASKS = {
    task.name: task
    for task in (
        Task("mv:aime24", "HuggingFaceH4/aime_2024", None, "train", AnswerKind.MATH, _read_math),
        Task("mv:aime25", "yentinglin/aime_2025", None, "train", AnswerKind.MATH, _read_math),
        Task("mv:math_500", "HuggingFaceH4/MATH-500", None, "test", AnswerKind.MATH, _read_math),
        Task(
            "mv:gpqa_diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", AnswerKind.LETTER, _read_gpqa,
            is_gated=True,
        ),
        Task("mv:chains", None, None, "test", AnswerKind.CHAINS, _read_chains),
    )
}  # fmt: skip
HOW_TO_GET_GPQA = (
    "GPQA is gated: accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, then log in (hf auth login)"
)


# Sources of rows


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """The problems of a task in a run.

    Attributes:
        source: a dataset on the Hub, the name of a local file, or the module that generates them.
    """

    task: Task
    problems: tuple[Instance, ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of questions and right answers, in order."""
        text = json.dumps([[p.question, p.gold] for p in self.problems], ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def first(self, limit: int | None) -> "ProblemSet":
        """Return the set of the first problems, or of all without a limit."""
        return replace(self, problems=self.problems[:limit])


def find_file(task: Task, folder: Path) -> Path:
    """Return the file of a task's rows in a folder. Its name begins with the task's, e.g. ``aime25.jsonl``.

    Raises:
        CommandError: if there is none, or more than one.
    """
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; give --data-dir one with files such as {task.stem}.jsonl")
    suffixes = (".jsonl", ".json", ".csv", ".parquet")
    found = sorted(p for p in folder.iterdir() if p.suffix in suffixes and _plain(p.stem).startswith(task.stem))
    if not found:
        raise CommandError(f"{folder} holds no rows of {task.name}; put them there as {task.stem}.jsonl")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CommandError(f"{folder} holds several files for {task.name} ({names}); keep one of them there")
    return found[0]


def read_task_rows(task: Task, data_dir: Path | None, limit: int | None = None) -> tuple[list[tuple[int, Any]], str]:
    """Return a task's rows with their numbers, and the source of the rows.

    Args:
        task: the task.
        data_dir: folder with local files; None for the Hub. Rows that are made here and a user's own need neither.
        limit: number of first rows; None for all.

    Raises:
        CommandError: if the rows cannot be read.
    """
    if task.generator is not None:
        return list(enumerate(gym.make_rows(task.generator, limit), start=1)), f"reasoning-gym {gym.VERSION}"
    if task.file is None and task.dataset is None:
        return list(enumerate(chains_rows(), start=1))[:limit], "multiverse_hf.evaluation.chains"
    file = task.file if task.file is not None or data_dir is None else find_file(task, data_dir)
    try:
        rows = list(number_rows(str(file or task.dataset), task.config, task.split))
    except ValueError as err:
        hint = f"; {HOW_TO_GET_GPQA}" if task.is_gated else ""
        hint = "" if file is not None else f"; without the Hub give --data-dir{hint}"
        raise CommandError(f"{task.name}: {err}{hint}") from err
    return rows[:limit], task.dataset if file is None else file.name


def load_problems(task: Task, data_dir: Path | None = None, limit: int | None = None) -> ProblemSet:
    """Return a task's problems.

    Args:
        task: the task.
        data_dir: folder with local files; None for the Hub.
        limit: number of first problems; None for all.

    Raises:
        CommandError: if the rows cannot be read, or a row is invalid or repeated.
    """
    rows, source = read_task_rows(task, data_dir, limit)
    place = source if task.file is not None else f"{task.name}: {source}"
    kind = "line" if source.endswith(".jsonl") else "row"
    problems: dict[str, Instance] = {}
    numbers: dict[str, int] = {}
    for number, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            problem = task.read(row)
        except (ValueError, AttributeError) as err:
            raise CommandError(f"{place}, {kind} {number}: {err}") from err
        if problem.id in problems:
            raise CommandError(
                f"{place}, {kind} {number} asks what {kind} {numbers[problem.id]} does, "
                f"{problem.question!r:.60}; drop one"
            )
        problems[problem.id], numbers[problem.id] = problem, number
    if not problems:
        raise CommandError(f"{place} holds no rows")
    return ProblemSet(task, tuple(problems.values()), source)
