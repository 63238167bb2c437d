"""reasoning-gym: its generators make problems, and its ``score_answer`` scores answers, from 0 to 1.

``rg:leg_counting`` names a generator, ``rg:leg_counting,size=20,max_animals=4`` the same with options: ``seed``,
``size``, and the keyword arguments of its config. The values are JSON, or plain text.

Generators and scores run in a process with a time limit, as some never end on some options and texts. Its hash seed is
fixed: several generators draw from sets, whose order depends on it.
"""

import functools
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.judging.verifier import VerifierError, Worker

VERSION = "0.1.25"  # problems and scores depend on it: raise RULES_VERSION with it
PREFIX = "rg:"
GYM_SEED = 1_000_000  # problem k of seed s is problem 0 of seed s + k in most generators, so training seeds stay below
GYM_SIZE = 100
MAKE_S = 60.0  # time limit to make one problem


@dataclass(frozen=True, slots=True)
class Generator:
    """A generator of reasoning-gym with options.

    Attributes:
        name: its name in reasoning-gym.
        options: its options as a JSON object with sorted keys; ``seed`` and ``size`` are always there.
    """

    name: str
    options: str

    @property
    def size(self) -> int:
        """Number of problems."""
        return json.loads(self.options)["size"]

    @property
    def title(self) -> str:
        """The text that names the generator, without options that have the default of this module."""
        default = (("seed", GYM_SEED), ("size", GYM_SIZE))
        options = [
            f"{key}={_write(value)}" for key, value in json.loads(self.options).items() if (key, value) not in default
        ]
        return PREFIX + ",".join([self.name, *options])


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _write(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return value if isinstance(value, str) and _read(value) == value else text


def parse_generator(text: str) -> Generator:
    """Return the generator that a text such as ``rg:leg_counting,size=20`` names.

    Raises:
        CommandError: if the text is not of this form, or seed or size is invalid.
    """
    name, *rest = re.split(r",(?=\s*\w+\s*=)", text.removeprefix(PREFIX))
    options: dict[str, Any] = {"seed": GYM_SEED, "size": GYM_SIZE}
    given = [[part.strip() for part in each.split("=", 1)] for each in rest]
    if "," in name or not name.strip():
        raise CommandError(f"{text}: write a generator of reasoning-gym as rg:NAME or rg:NAME,OPTION=VALUE,...")
    if double := next((key for key, _ in given if [each for each, _ in given].count(key) > 1), None):
        raise CommandError(f"{text}: {double} is given twice; keep one of them")
    options |= {key: _read(value) for key, value in given}
    for key, least in (("seed", 0), ("size", 1)):
        if type(options[key]) is not int or not least <= options[key] < 2**32:
            raise CommandError(f"{text}: {key} is an integer of at least {least}, got {options[key]!r}")
    return Generator(name.strip(), json.dumps(options, sort_keys=True))


class Gym(Worker):
    """The process of reasoning-gym."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).with_name("gym_worker.py"), "reasoning_gym")

    def environment(self) -> dict[str, str]:
        """Return the environment, with a fixed hash seed."""
        return super().environment() | {"PYTHONHASHSEED": "0"}


@functools.cache
def _gym() -> Gym:
    """Return the process of this process, which ends with it.

    Raises:
        CommandError: if reasoning-gym is not installed in the version that scores.
    """
    try:
        found = version("reasoning-gym")
    except PackageNotFoundError:
        raise CommandError(f"reasoning-gym is missing; {install_line('tasks')}", FAILURE) from None
    if found != VERSION:
        raise CommandError(
            f"reasoning-gym {found} makes other problems and scores than {VERSION}; {install_line('tasks')}", FAILURE
        )
    return Gym()


@functools.lru_cache(maxsize=32)
def read_options(generator: Generator) -> dict[str, Any]:
    """Return all options of a generator, with the defaults of reasoning-gym.

    Raises:
        CommandError: if there is no such generator, or an option does not fit.
    """
    return _ask(generator, what="")


@functools.lru_cache(maxsize=1 << 16)
def make_problem(generator: Generator, number: int) -> tuple[str, str | None]:
    """Return question and answer of a generator's problem, counted from 0. The answer is None if there are many.

    Raises:
        CommandError: if the generator fails or takes too long.
    """
    question, answer = _ask(generator, number, what=f"problem {number} cannot be made: ")
    return question, answer


def make_rows(generator: Generator, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first problems of a generator: number, question and answer of each.

    Raises:
        CommandError: if there is no such generator, an option does not fit, or a problem cannot be made.
    """
    read_options(generator)
    numbers = range(generator.size)[:limit]
    made = ((number, make_problem(generator, number)) for number in numbers)
    return [{"number": number, "question": question, "answer": answer} for number, (question, answer) in made]


def _ask(generator: Generator, *request: Any, what: str) -> Any:
    try:
        return _gym().ask(generator.name, generator.options, *request, timeout_s=MAKE_S)
    except VerifierError as err:
        raise CommandError(f"{generator.title}: {what}{one_line(err)}") from err


def score_problem(generator: Generator, number: int, answer: str) -> float:
    """Return reasoning-gym's score of an answer to a problem.

    Raises:
        VerifierTimeout: if it takes too long.
        VerifierError: if it fails.
    """
    request = (generator.name, generator.options, number)
    _gym().ask(*request, timeout_s=MAKE_S)  # a process that replaces a stuck one makes it again
    return _gym().ask(*request, answer)
