"""Families of problems whose documents a program writes: how a family is defined, loaded, rendered and checked.

A family file sets ``FAMILIES``. Each family names a generator of reasoning-gym, or makes its own items, and its
``solve`` writes the reasoning of an item. A :class:`Fork` writes each path from that path's own part of the item.
"""

import copy
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from multiverse_hf.documents import Document, parse_document, validate
from multiverse_hf.modeling.families import MULTIVERSE, Family


@dataclass(frozen=True, slots=True)
class Subtask:
    """One path: what its outline says it needs, and its steps, which are texts and nested forks."""

    outline: str
    steps: tuple["str | Fork", ...]


@dataclass(frozen=True, slots=True)
class Fork:
    """A block. ``write`` writes each path from its own part alone, so no path can depend on a sibling.

    Attributes:
        write: returns the branch of one part.
        parts: one for each path, two or more.
        conclusion: the text of the reduce. The autoregressive form lacks it, so later steps must not need it.
    """

    write: Callable[[Any], Subtask]
    parts: tuple[Any, ...]
    conclusion: str

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a fork has two parts or more, got {len(self.parts)}; write a single one as a step")


@dataclass(frozen=True, slots=True)
class Solution:
    """The reasoning of an item, texts and forks in order, and its answer."""

    steps: tuple[str | Fork, ...]
    answer: str

    def document(self, tags: Family = MULTIVERSE) -> Document:
        """Return the document. Its ``sequential()`` is the autoregressive form."""
        text = _write_steps(self.steps, "", tags)
        return parse_document(f"{tags.open('think')}\n{text}\n{tags.close('think')}\n\nAnswer: {self.answer}", tags)

    def forks(self) -> Iterator[Fork]:
        """Yield every fork, nested ones too."""
        waiting = list(self.steps)
        while waiting:
            step = waiting.pop()
            if isinstance(step, Fork):
                yield step
                waiting += [inner for part in step.parts for inner in step.write(part).steps]


def _write_steps(steps: Sequence[str | Fork], label: str, tags: Family) -> str:
    return "\n".join(step if isinstance(step, str) else _write_fork(step, label, tags) for step in steps)


def _write_fork(fork: Fork, label: str, tags: Family) -> str:
    def wrap(role: str, text: str, space: str = "\n") -> str:
        return f"{tags.open(role)}{space}{text}{space}{tags.close(role)}"

    outlines, paths = [], []
    for number, part in enumerate(fork.parts, start=1):
        branch, own = fork.write(part), f"{label}{number}"
        outlines.append(wrap("outline", f"{own}: {branch.outline}", ""))
        start = " " if isinstance(branch.steps[0], str) else "\n"
        paths.append(wrap("path", f"{own}:{start}{_write_steps(branch.steps, f'{own}.', tags)}"))
    pieces = [wrap("goal", "\n".join(outlines)), *paths, wrap("conclusion", fork.conclusion)]
    return wrap("parallel", "\n".join(pieces))


@dataclass(frozen=True)
class ProblemFamily:
    """A family of problems.

    Attributes:
        name: its name, and the name of its generator in reasoning-gym unless it has ``make``.
        solve: returns the solution of an item, or None for an item that does not suit.
        options: keyword arguments of the generator, which set the difficulty.
        make: returns the item of a seed: a dict with ``question``, ``answer`` and more. None for reasoning-gym.
        check: returns what is wrong in a document's text, None if nothing is; beside the checks that all have.
    """

    name: str
    solve: Callable[[dict[str, Any]], Solution | None]
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[int], dict[str, Any]] | None = None
    check: Callable[[dict[str, Any], str], str | None] | None = None

    def items(self, seed: int, count: int) -> Iterator[dict[str, Any]]:
        """Yield the items of the seeds from ``seed`` on.

        Raises:
            ModuleNotFoundError: if reasoning-gym is needed and not installed.
        """
        dataset = None if self.make else self._dataset(seed, count)
        for place in range(count):
            yield self.make(seed + place) if dataset is None else dataset[place]

    def score(self, answer: str, item: dict[str, Any]) -> float:
        """Return the score of an answer, from 0 to 1: reasoning-gym's, or equality with the item's answer."""
        if self.make:
            return float(answer == item["answer"])
        return float(self._scorer.score_answer(answer, item))

    @functools.cached_property
    def _scorer(self) -> Any:
        return self._dataset(0, 1)

    def _dataset(self, seed: int, count: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.name, seed=seed, size=count, **self.options)

    def find_faults(self, item: dict[str, Any], solution: Solution) -> list[str]:
        """Return what is wrong with a solution: grammar, independence, arithmetic, answer, the family's own check."""
        document = solution.document()
        faults = [str(problem) for problem in validate(document)]
        faults += [fault for fork in solution.forks() for fault in find_dependence(fork)]
        for text in (document.render(), document.sequential()):
            faults += find_wrong_arithmetic(text)
            faults += [fault for fault in [self.check and self.check(item, text)] if fault]
        if (score := self.score(solution.answer, item)) != 1:
            faults.append(f"the answer {solution.answer!r} scores {score}, not 1")
        return faults


def find_dependence(fork: Fork) -> list[str]:
    """Return the paths of a fork that change when their siblings are missing or written in another order."""
    whole = [_write_branch(fork, part) for part in fork.parts]
    alone = [_write_branch(fork, copy.deepcopy(part)) for part in reversed(fork.parts)][::-1]
    return [
        f"the path of {first[:40]!r} depends on its siblings"
        for first, second in zip(whole, alone, strict=True)
        if first != second
    ]


def _write_branch(fork: Fork, part: Any) -> str:
    branch = fork.write(part)
    return f"{branch.outline}\n{_write_steps(branch.steps, '', MULTIVERSE)}"


_SUM = re.compile(r"(-?\d+(?: [-+x/] -?\d+)+) = (-?\d+(?:\.\d+)?)(?!\d|\.\d)")
_COMPARED = re.compile(r"(-?\d+) is (smaller|larger) than (-?\d+)")


def find_wrong_arithmetic(text: str) -> list[str]:
    """Return every equation ``a + b = c`` (also ``-``, ``x``, ``/``) and comparison that is false or cannot be read.

    Every ``=`` of the text has to stand in such an equation.
    """
    wrong = [match[0] for match in _SUM.finditer(text) if _value(match[1]) != Fraction(match[2])]
    wrong += [
        match[0]
        for match in _COMPARED.finditer(text)
        if int(match[1]) == int(match[3]) or (int(match[1]) < int(match[3])) != (match[2] == "smaller")
    ]
    unread = _SUM.sub("", text)
    wrong += [line for line in unread.splitlines() if "=" in line]
    return [f"wrong or unreadable arithmetic: {each!r}" for each in wrong]


def _value(text: str) -> Fraction:
    """Return the value of a sum of products, left to right, products first."""
    words = text.split()
    total, product = Fraction(0), Fraction(int(words[0]))
    for sign, number in zip(words[1::2], map(int, words[2::2]), strict=True):
        if sign == "x":
            product *= number
        elif sign == "/":
            product /= number
        else:
            total, product = total + product, Fraction(number if sign == "+" else -number)
    return total + product


def load_families(folder: Path) -> dict[str, ProblemFamily]:
    """Return the families of all files ``*.py`` of a folder, by name.

    Raises:
        ValueError: if there is no such folder or family in it, a file fails, or a name repeats.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; name a folder with family files")
    families: dict[str, ProblemFamily] = {}
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"family_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as err:  # the file is a user's own program and may raise anything
            raise ValueError(f"cannot load {path}: {type(err).__name__}: {' '.join(str(err).split())}") from err
        found = getattr(module, "FAMILIES", None)
        if not isinstance(found, list | tuple) or not all(isinstance(each, ProblemFamily) for each in found):
            raise ValueError(f"{path} has no list FAMILIES = [ProblemFamily(...)]; add it")
        for family in found:
            if family.name in families:
                raise ValueError(f"{path}: another file has a family {family.name!r}; rename one of them")
            families[family.name] = family
    if not families:
        raise ValueError(f"{folder} has no family file; add a file NAME.py that sets FAMILIES")
    return families
