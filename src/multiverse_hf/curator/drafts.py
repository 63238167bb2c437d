"""A document between the stages: the results of each stage, and refusals of replies."""

from collections.abc import Sequence
from dataclasses import dataclass

from multiverse_hf.curator.forms import GroupsReply, RefillReply, StructureReply, SummaryReply
from multiverse_hf.curator.sentences import number_sentences, split_sentences
from multiverse_hf.curator.traces import Trace
from multiverse_hf.documents import Document


class Refusal(Exception):
    """A reply that a stage cannot use.

    Attributes:
        check: name of the failed check, as reports count it: "form", "steps", "groups", "content", "grammar", ...
        detail: what is wrong, in words that also help the model.
        is_final: whether another attempt would be useless.
    """

    def __init__(self, check: str, detail: str, is_final: bool = False) -> None:
        super().__init__(f"{check}: {detail}")
        self.check, self.detail, self.is_final = check, detail, is_final


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a document.

    Attributes:
        max_distance: edit distance to the original over its length, for the document and each path (the paper: 0.2).
        max_depth: depth of nested blocks.
    """

    max_distance: float = 0.2
    max_depth: int = 2


@dataclass(frozen=True, slots=True)
class Draft:
    """The state of a document. Each stage returns a draft with its result added.

    Attributes:
        sentences: sentences of the reasoning.
        opening: the start of every stage's request: the problem and the numbered sentences.
        plain: the document with the original's sentences, without outlines and conclusions; from stage 4 on.
        document: the whole document, from stage 5 on.
        distance: its distance to the original.
        path_distances: distance of each path to its quoted text, in the order in which paths open.
    """

    trace: Trace
    limits: Limits
    sentences: Sequence[str]
    opening: str
    summary: SummaryReply | None = None
    groups: GroupsReply | None = None
    structure: StructureReply | None = None
    refill: RefillReply | None = None
    plain: Document | None = None
    document: Document | None = None
    distance: float | None = None
    path_distances: Sequence[float] = ()

    @classmethod
    def begin(cls, trace: Trace, limits: Limits) -> "Draft":
        """Return the draft for stage 1."""
        sentences = split_sentences(trace.reasoning)
        opening = f"# Problem\n\n{trace.prompt}\n\n# Reasoning\n\n{number_sentences(sentences)}"
        return cls(trace, limits, sentences, opening)

    @property
    def text(self) -> str:
        """The whole document."""
        return self.document.render()
