"""Stage 3: the tree as a sequence of single steps and blocks, nested at most two deep."""

from collections.abc import Sequence

from pydantic import BaseModel, Field

from multiverse_hf.curator.drafts import Draft, Refusal
from multiverse_hf.curator.stages.groups import Groups


class InnerPart(BaseModel):
    """One substep by itself, or several that are the paths of an inner block."""

    steps: list[str] = Field(description="one name: written in sequence; several: the paths of an inner block")


class PlacedStep(BaseModel):
    """A step, and how its substeps are arranged."""

    step: str
    parts: list[InnerPart] = Field(description="its substeps in order; empty for an undivided step")


class Part(BaseModel):
    """One step by itself, or several that are the paths of a block."""

    steps: list[PlacedStep] = Field(description="one step: written in sequence; several: the paths of a block")


class Structure(BaseModel):
    """The whole document: its parts in order."""

    parts: list[Part]


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    return {"tree": draft.summary.outline(), "groups": draft.groups.outline()}


def check(draft: Draft, result: Structure) -> None:
    """Check that every step has its place once, in order, and that paths are of one group.

    Raises:
        Refusal: if not, or if there is no block.
    """
    placed = [step for part in result.parts for step in part.steps]
    _check_order([step.step for step in placed], draft.summary.names, "the document")
    for step in placed:
        inner = [name for part in step.parts for name in part.steps]
        _check_order(inner, draft.summary.substeps(step.step), f"step {step.step}")
    blocks = [[step.step for step in part.steps] for part in result.parts]
    blocks += [part.steps for step in placed for part in step.parts]
    blocks = [names for names in blocks if len(names) != 1]
    if not all(blocks):
        raise Refusal("structure", "a part has no step; leave it out")
    if not blocks:
        raise Refusal("structure", "there is no block; put the steps of a group side by side")
    for names in blocks:
        _check_independent(names, draft.groups)


def _check_order(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    if list(found) == list(expected):
        return
    if missing := [name for name in expected if name not in found]:
        raise Refusal("structure", f"{where} lacks step {missing[0]}")
    if unknown := [name for name in found if name not in expected]:
        raise Refusal("structure", f"{where} has no step {unknown[0]}")
    raise Refusal("structure", f"{where} has its steps as {', '.join(found)}; each once, in the order of the text")


def _check_independent(names: Sequence[str], groups: Groups) -> None:
    if not any(set(names) <= set(group.steps) for group in groups.groups):
        raise Refusal("structure", f"steps {', '.join(names)} are paths of one block, but no group has them all")
