"""Stage 1: the trace as a tree of steps and substeps."""

from collections.abc import Iterator

from pydantic import BaseModel, Field

from multiverse_hf.curator.drafts import Draft, Refusal


class Step(BaseModel):
    """A step of the reasoning; its parts, if it has several."""

    summary: str = Field(description="what is done in this step, in one sentence")
    substeps: list[str] = Field(description="the same for each of its substeps in order; empty for an undivided step")


class Summary(BaseModel):
    """All steps in the order of the text. Step 2 is called "2", its first substep "2.1"."""

    steps: list[Step]

    def numbered(self) -> Iterator[tuple[str, str]]:
        """Give the name and the summary of every step and substep, in order."""
        for number, step in enumerate(self.steps, start=1):
            yield str(number), step.summary
            for place, text in enumerate(step.substeps, start=1):
                yield f"{number}.{place}", text

    def substeps(self, step: str) -> list[str]:
        """Give the names of a step's substeps."""
        return [f"{step}.{place}" for place in range(1, len(self.steps[int(step) - 1].substeps) + 1)]

    @property
    def names(self) -> list[str]:
        """Names of the steps, without substeps."""
        return [str(number) for number in range(1, len(self.steps) + 1)]

    @property
    def leaves(self) -> list[str]:
        """Names of what has text of its own: substeps, and steps without any."""
        return [leaf for step in self.names for leaf in self.substeps(step) or [step]]

    def outline(self) -> str:
        """Write the tree as prompts show it."""
        return "\n".join(f"{'  ' * name.count('.')}{name}: {text}" for name, text in self.numbered())


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    return {"count": str(len(draft.sentences))}


def check(draft: Draft, result: Summary) -> None:
    """Check the tree by itself.

    Raises:
        Refusal: if it is empty, has a step nothing is said of, or more steps than the text has sentences.
    """
    if not result.steps:
        raise Refusal("steps", "the tree has no step")
    for name, text in result.numbered():
        if not text.strip():
            raise Refusal("steps", f"step {name} has an empty summary")
    if len(result.leaves) > len(draft.sentences):
        raise Refusal("steps", f"{len(result.leaves)} steps for {len(draft.sentences)} sentences; join some")
    for name in result.names:
        if len(result.substeps(name)) == 1:
            raise Refusal("steps", f"step {name} has one substep only; divide a step in several or not at all")
