"""The five stages in order, each with its prompt, the form of its result, and its own check."""

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from multiverse_hf.curator.drafts import Draft
from multiverse_hf.curator.stages import groups, judge, mapreduce, refill, structure, summary


@dataclass(frozen=True, slots=True)
class Stage:
    """One call of a model.

    Attributes:
        name: also that of the draft's field for its result.
        version: of its prompt, the file ``prompts/NAME.VERSION.txt``.
        form: what a reply has to be.
        variables: what the prompt says of a draft.
        check: refuses a result that nothing can be made of.
    """

    name: str
    version: str
    form: type[BaseModel]
    variables: Callable[[Draft], dict[str, str]]
    check: Callable[[Draft, Any], None]

    def instructions(self, draft: Draft) -> str:
        """Give what is asked of the model."""
        return string.Template(read_prompt(self.name, self.version)).substitute(self.variables(draft))


@functools.cache
def read_prompt(name: str, version: str) -> str:
    """Read a prompt's text."""
    return files("multiverse_hf.curator").joinpath("prompts", f"{name}.{version}.txt").read_text(encoding="utf-8")


def _stage(module: ModuleType, form: type[BaseModel], version: str = "v1") -> Stage:
    return Stage(module.__name__.rpartition(".")[2], version, form, module.variables, module.check)


STAGES = (
    _stage(summary, summary.Summary),
    _stage(groups, groups.Groups),
    _stage(structure, structure.Structure),
    _stage(refill, refill.Refill),
    _stage(mapreduce, mapreduce.MapReduce),
)
JUDGE = _stage(judge, judge.Judgement)  # of the last one, if it is asked for
SYSTEM = ("system", "v1")  # what every call begins with


def prompt_versions() -> dict[str, str]:
    """Give the version of each prompt."""
    return dict([SYSTEM, *((stage.name, stage.version) for stage in (*STAGES, JUDGE))])
