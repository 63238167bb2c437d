"""A document on its way through the stages: what each of them found, and why a reply was refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from multiverse_hf.curator.forms import GroupsReply, RefillReply, StructureReply, SummaryReply
from multiverse_hf.curator.sentences import number_sentences, split_sentences
from multiverse_hf.curator.traces import Trace
from multiverse_hf.documents import Document


class Refusal(Exception):
    """A reply that a stage cannot go on from.

    Attributes:
        check: what it failed, as reports count it: "form", "steps", "groups", "content", "grammar", ...
        detail: what exactly, in words that help the model as well.
        is_final: whether asking again is of no use.
    """

    def __init__(self, check: str, detail: str, is_final: bool = False) -> None:
        super().__init__(f"{check}: {detail}")
        self.check, self.detail, self.is_final = check, detail, is_final


@dataclass(frozen=True, slots=True)
class Limits:
    """What a document may be like.

    Attributes:
        max_distance: edit distance to the original over its length, of the document and of each path (the paper: 0.2).
        max_depth: blocks inside each other.
    """

    max_distance: float = 0.2
    max_depth: int = 2


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a document so far. Each stage makes a draft with more in it.

    Attributes:
        sentences: of the reasoning.
        opening: of what every stage is asked: the problem and the numbered sentences.
        plain: the document with the original's sentences and without outlines and conclusions, from stage 4 on.
        document: the whole one, from stage 5 on.
        distance: of it to the original.
        path_distances: of each path to the text it was quoted from, in the order in which paths open.
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
        """Return the draft that stage 1 is asked about."""
        sentences = split_sentences(trace.reasoning)
        opening = f"# Problem\n\n{trace.prompt}\n\n# Reasoning\n\n{number_sentences(sentences)}"
        return cls(trace, limits, sentences, opening)

    @property
    def text(self) -> str:
        """The whole document."""
        return self.document.render()
