"""A document on its way through the stages: what each of them found, and why a reply was refused."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multiverse_hf.curator.sentences import number_sentences, split_sentences
from multiverse_hf.curator.traces import Trace
from multiverse_hf.documents import Document

if TYPE_CHECKING:
    from multiverse_hf.curator.stages.groups import Groups
    from multiverse_hf.curator.stages.mapreduce import MapReduce
    from multiverse_hf.curator.stages.refill import Refill
    from multiverse_hf.curator.stages.structure import Structure
    from multiverse_hf.curator.stages.summary import Summary


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


@dataclass(slots=True)
class Draft:
    """What is known of a document so far. A stage fills in its own field.

    Attributes:
        sentences: of the reasoning.
        opening: of what every stage is asked: the problem and the numbered sentences.
        plain: the document with the original's sentences and without outlines and conclusions, from stage 4 on.
        document, text: the whole one, from stage 5 on.
        sequential: the reasoning of the latest of them, made sequential again.
        distance: of it to the original.
        path_distances: of each path to the text it was quoted from, in the order in which paths open.
    """

    trace: Trace
    limits: Limits
    sentences: list[str] = field(init=False)
    opening: str = field(init=False)
    summary: "Summary | None" = None
    groups: "Groups | None" = None
    structure: "Structure | None" = None
    refill: "Refill | None" = None
    mapreduce: "MapReduce | None" = None
    plain: Document | None = None
    document: Document | None = None
    text: str | None = None
    sequential: str = ""
    distance: float | None = None
    path_distances: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sentences = split_sentences(self.trace.reasoning)
        numbered = number_sentences(self.sentences)
        self.opening = f"# Problem\n\n{self.trace.prompt}\n\n# Reasoning\n\n{numbered}"
