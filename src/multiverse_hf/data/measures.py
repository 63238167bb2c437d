"""Measures of a document: its blocks, its words and tokens by kind, and its # parallel."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from multiverse_hf.data.rows import KIND_BY_ROLE, TokenKind, token_kinds
from multiverse_hf.documents import Document, Element, Parallel, Text
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.tags import TagSet


@dataclass(frozen=True, slots=True)
class Measures:
    """Measures of one document, its prompt excluded."""

    num_blocks: int
    num_paths: int
    depth: int
    num_characters: int  # tags included
    num_words: int
    num_tokens: int
    length: int  # the critical path, in tokens
    words_by_kind: Counter[str]
    tokens_by_kind: Counter[str]

    @property
    def parallelism(self) -> float:
        """The paper's # parallel: tokens over length."""
        return self.num_tokens / self.length if self.length else 1.0


@dataclass(frozen=True)
class Ruler:
    """Measures documents with a tokenizer.

    Args:
        tokenizer: a transformers tokenizer that has the tags.
        tags: the control tags.
        name: name of the tokenizer, for people.
    """

    tokenizer: Any
    tags: TagSet
    name: str

    def measure(self, document: Document) -> Measures:
        """Measure a document."""
        text = document.render()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        kinds, _ = token_kinds(ids, self.tags)
        words: Counter[str] = Counter()
        num_blocks = 0
        for piece in document.walk():
            if isinstance(piece.node, Text):
                role = piece.parent.role if isinstance(piece.parent, Element) else None
                words[KIND_BY_ROLE.get(role, TokenKind.ANSWER).name.lower()] += len(piece.text.split())
            else:
                num_blocks += isinstance(piece.node, Parallel) and not piece.closes
        return Measures(
            num_blocks,
            document.num_paths,
            document.depth,
            len(text),
            words.total(),
            len(ids),
            build_layout(ids, self.tags).length,
            +words,
            Counter(kind.name.lower() for kind in kinds),
        )
