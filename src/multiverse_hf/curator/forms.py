"""The forms of replies, one for each stage. Their names, docstrings and descriptions are part of the request."""

from collections.abc import Iterator

from pydantic import BaseModel, Field

# Stage 1: the trace as a tree of steps and substeps


class SummaryStep(BaseModel):
    """A step of the reasoning; its parts, if it has several."""

    summary: str = Field(description="what is done in this step, in one sentence")
    substeps: list[str] = Field(description="the same for each of its substeps in order; empty for an undivided step")


class SummaryReply(BaseModel):
    """All steps in the order of the text. Step 2 is called "2", its first substep "2.1"."""

    steps: list[SummaryStep]

    def numbered(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the summary of every step and substep, in order."""
        for number, step in enumerate(self.steps, start=1):
            yield str(number), step.summary
            for place, text in enumerate(step.substeps, start=1):
                yield f"{number}.{place}", text

    def substeps(self, step: str) -> list[str]:
        """Return the names of a step's substeps."""
        return [f"{step}.{place}" for place in range(1, len(self.steps[int(step) - 1].substeps) + 1)]

    @property
    def names(self) -> list[str]:
        """Names of the steps, without substeps."""
        return [str(number) for number in range(1, len(self.steps) + 1)]

    @property
    def leaves(self) -> list[str]:
        """Names of the parts with their own text: substeps, and steps without substeps."""
        return [leaf for step in self.names for leaf in self.substeps(step) or [step]]

    def outline(self) -> str:
        """Return the tree as prompts show it."""
        return "\n".join(f"{'  ' * name.count('.')}{name}: {text}" for name, text in self.numbered())


# Stage 2: which steps do not depend on each other, and why


class Group(BaseModel):
    """Steps that could be written at the same time."""

    steps: list[str] = Field(description="two or more names of steps, all at one level and under one step")
    argument: str = Field(description="why none of them needs anything that another of them finds")


class GroupsReply(BaseModel):
    """All groups found; none if every step needs the one before it."""

    groups: list[Group]

    def outline(self) -> str:
        """Return the groups as prompts show them."""
        return "\n".join(f"- {', '.join(group.steps)}: {group.argument}" for group in self.groups)


# Stage 3: the tree as a sequence of single steps and blocks, nested at most two deep


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


class StructureReply(BaseModel):
    """The whole document: its parts in order."""

    parts: list[Part]


# Stage 4: the original text for every step, quoted by the numbers of its sentences


class Quote(BaseModel):
    """A run of sentences that belongs to a step."""

    step: str
    first: int = Field(description="number of the first sentence")
    last: int = Field(description="number of the last sentence, which is quoted as well")


class RefillReply(BaseModel):
    """The quotes of all steps that have text of their own; those of one step in the order in which they are read."""

    quotes: list[Quote]

    def numbers(self, step: str) -> list[int]:
        """Return the numbers of a step's sentences, from 1."""
        return [n for quote in self.quotes if quote.step == step for n in range(quote.first, quote.last + 1)]


# Stage 5: outlines and conclusions of every block, and paths that stand alone


class BlockText(BaseModel):
    """What a block says besides its paths."""

    block: str = Field(description="its name, such as B1")
    outlines: list[str] = Field(description="for each path in order, what it is to find out; without a number")
    conclusion: str = Field(description="what the paths found, together")


class Rewrite(BaseModel):
    """Another wording for one sentence of a path."""

    sentence: int
    text: str = Field(description="the sentence without reference to another path; empty to drop it")


class MapReduceReply(BaseModel):
    """The text of every block, and the sentences that have to change for paths to stand alone."""

    blocks: list[BlockText]
    rewrites: list[Rewrite]


# A second opinion on stage 5, if it is asked for: does each path stand alone?


class Dependence(BaseModel):
    """A place where a path leans on a sibling."""

    path: str = Field(description="its label, such as 2 or 1.3")
    quote: str = Field(description="the words that lean on another path")
    reason: str = Field(description="what of which path they need")


class JudgeReply(BaseModel):
    """All such places; none if every path stands alone."""

    dependent: list[Dependence]
