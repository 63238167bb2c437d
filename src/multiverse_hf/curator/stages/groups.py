"""Stage 2: which steps do not depend on each other, and why."""

from pydantic import BaseModel, Field

from multiverse_hf.curator.drafts import Draft, Refusal


class Group(BaseModel):
    """Steps that could be written at the same time."""

    steps: list[str] = Field(description="two or more names of steps, all at one level and under one step")
    argument: str = Field(description="why none of them needs anything that another of them finds")


class Groups(BaseModel):
    """All groups found; none if every step needs the one before it."""

    groups: list[Group]

    def outline(self) -> str:
        """Write the groups as prompts show them."""
        return "\n".join(f"- {', '.join(group.steps)}: {group.argument}" for group in self.groups)


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    return {"tree": draft.summary.outline()}


def check(draft: Draft, result: Groups) -> None:
    """Check the groups against the tree.

    Raises:
        Refusal: if a group names what is no step, mixes levels, shares a step with another, or has no argument; and
            for good if there is no group.
    """
    if not result.groups:
        raise Refusal("no parallel group", "no two steps are independent of each other", is_final=True)
    known = {name for name, _ in draft.summary.numbered()}
    seen: set[str] = set()
    for group in result.groups:
        if unknown := [name for name in group.steps if name not in known]:
            raise Refusal("groups", f"there is no step {unknown[0]}")
        if len(set(group.steps)) < 2:
            raise Refusal("groups", f"the group {group.steps} needs two different steps at least")
        if len({name.rpartition(".")[0] for name in group.steps}) > 1:
            raise Refusal("groups", f"the group {group.steps} mixes steps of several levels; group siblings only")
        if len(set(group.steps)) < len(group.steps) or seen & set(group.steps):
            twice = sorted(seen & set(group.steps)) or group.steps
            raise Refusal("groups", f"step {twice[0]} is grouped twice")
        if not group.argument.strip():
            raise Refusal("groups", f"the group {group.steps} lacks the argument for its independence")
        seen |= set(group.steps)
