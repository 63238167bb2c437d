"""What a branch's tokens mean: which tags may come next, what a tag does, and how to close what is open.

A pure state machine over token ids, without a model. What a tag *does* is decided by the layout's own
:class:`~.layout.Scanner`; this module adds what only generation needs: the stage inside a block, the outlines' labels,
the tags a guided answer may not write here, and the tokens that bring a cut-off branch to a well-formed end.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from .layout import Event, Scanner
from .tags import TagSet


class Stage(Enum):
    """Where a branch stands in the grammar of a block."""

    TEXT = auto()  # free text: outside any block, or inside a path
    ARMED = auto()  # <Parallel> read, <Goal> to come
    GOAL = auto()  # inside the goal, between outlines
    OUTLINE = auto()  # inside an outline
    FORKED = auto()  # a path begins, its <Path> to come
    REDUCED = auto()  # the paths are merged, <Conclusion> to come
    CONCLUSION = auto()  # inside the conclusion
    CONCLUDED = auto()  # </Conclusion> read, </Parallel> to come


@dataclass(frozen=True, eq=False)
class Mask:
    """Ids that may not be chosen next, or with ``only`` the ones that may. Told apart by identity: made once each."""

    ids: tuple[int, ...]
    only: bool = False
    tensors: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def apply(self, scores: torch.Tensor) -> None:
        """Put what may not be chosen at minus infinity in (N, V) scores, in place."""
        if scores.device not in self.tensors:
            self.tensors[scores.device] = torch.tensor(self.ids, dtype=torch.long, device=scores.device)
        ids = self.tensors[scores.device]
        if self.only:
            kept = scores.index_select(1, ids)
            scores.fill_(-torch.inf).index_copy_(1, ids, kept)
        else:
            scores.index_fill_(1, ids, -torch.inf)


# The longest label taken over from an outline, in tokens; a longer one is replaced by the ordinal.
MAX_LABEL_TOKENS = 8


@dataclass(slots=True)
class Structure:
    """State of one branch, or of a whole document read from left to right."""

    tags: TagSet
    scanner: Scanner = field(init=False)
    stage: Stage = Stage.TEXT
    thinking: bool = False
    has_thought: bool = False
    has_text: bool = False  # something but newlines stands in the outline, path or conclusion being written
    outlines: list[list[int]] = field(default_factory=list)  # of the goal being written
    labels: list[list[list[int]]] = field(default_factory=list)  # of every open block, one per path
    malformed: int = 0  # tags that fitted no rule
    masks: dict[Any, Mask] = field(default_factory=dict, repr=False)  # made so far; shared by all copies

    def __post_init__(self) -> None:
        self.scanner = Scanner(self.tags)

    @property
    def depth(self) -> int:
        """Number of blocks whose paths are being written around this point."""
        return len(self.scanner.open_blocks)

    def feed(self, token: int) -> Event:
        """Take the next token and say what it does.

        After ``FORK`` this state is that of the first path; after ``REDUCE`` that of the text after the paths.
        """
        tags = self.tags
        if not self.scanner.hears(token) or token not in tags.roles:
            if self.stage is Stage.OUTLINE:
                self.outlines[-1].append(token)
            self.has_text = self.has_text or token not in tags.newline
            return Event.TEXT
        if token not in self._allowed():
            self.malformed += 1
        in_goal = self.scanner.num_outlines is not None
        event = self.scanner.feed(token)
        role, opens = tags.roles[token]
        self.has_text = not opens  # a nested block or a region that ends here is something, too
        if event is Event.FORK:
            self.labels.append(self.path_labels())
            self.outlines = []
            self.stage = Stage.FORKED
        elif event is Event.NEXT_PATH:
            self.stage = Stage.FORKED
        elif event is Event.REDUCE:
            self.labels.pop()
            self.stage = Stage.REDUCED
        elif in_goal:
            if role == "outline":
                if opens and self.stage is Stage.GOAL:
                    self.outlines.append([])
                self.stage = Stage.OUTLINE if self.scanner.in_outline else Stage.GOAL
            elif self.scanner.num_outlines is None:  # an empty goal: it goes on as text
                self.malformed += 1
                self.stage = Stage.TEXT
        elif role == "think":
            if self.depth == 0:
                self.thinking = opens
                self.has_thought = True
        elif role == "parallel":
            self.stage = Stage.ARMED if opens else Stage.TEXT
        elif role == "goal" and self.scanner.num_outlines is not None:
            self.stage, self.outlines = Stage.GOAL, []
        elif role == "path" and opens and self.stage is Stage.FORKED:
            self.stage = Stage.TEXT
        elif role == "conclusion":
            if opens and self.stage is Stage.REDUCED:
                self.stage = Stage.CONCLUSION
            elif not opens and self.stage is Stage.CONCLUSION:
                self.stage = Stage.CONCLUDED if tags.names.parallel is not None else Stage.TEXT
        return event

    def path_labels(self) -> list[list[int]]:
        """Give the label of every path that the outlines written so far ask for."""
        tags = self.tags
        labels = [tags.label(outline, n) for n, outline in enumerate(self.outlines, 1)]
        labels = [label if len(label) <= MAX_LABEL_TOKENS else tags.ordinal(n) for n, label in enumerate(labels, 1)]
        if len({tuple(label) for label in labels}) < len(labels):  # siblings could not be told apart
            labels = [tags.ordinal(n) for n in range(1, len(labels) + 1)]
        return labels

    def path_prefix(self, path: int) -> list[int]:
        """Give what the engine writes at the start of a path of the innermost open block."""
        return self.tags.path_prefix(self.labels[-1][path])

    def for_path(self, path: int) -> "Structure":
        """Give the state of a path of the innermost open block, ready for its first token."""
        other = self.copy()
        other.scanner.open_blocks[-1].path = path
        other.stage = Stage.FORKED
        other.malformed = 0
        return other

    def after_reduce(self) -> "Structure":
        """Give the state that follows the last path of the innermost open block."""
        other = self.copy()
        other.scanner.open_blocks.pop()
        other.labels.pop()
        other.stage = Stage.REDUCED
        other.malformed = 0
        return other

    def copy(self) -> "Structure":
        """Give an independent copy; label lists are shared, none is written to once it is stored."""
        other = copy.copy(self)
        other.scanner = copy.copy(self.scanner)
        other.scanner.open_blocks = [copy.copy(block) for block in self.scanner.open_blocks]
        other.outlines, other.labels = [list(outline) for outline in self.outlines], list(self.labels)
        return other

    # What may come next

    def mask(self, is_guided: bool, max_depth: int, max_paths: int, end_tokens: frozenset[int]) -> Mask | None:
        """Return what may not be chosen next.

        Budgets are not among the reasons: a model kept from opening a block that it wants to open writes what it never
        learned to.

        Args:
            is_guided: the grammar counts, not the limits alone.
            max_depth: most blocks around any token.
            max_paths: most outlines of a block.
            end_tokens: tokens that end a branch.
        """
        may_open, may_outline = self.depth < max_depth, len(self.outlines) < max_paths
        return self.guide(may_open, may_outline, end_tokens) if is_guided else self.bound(may_open, may_outline)

    def guide(self, may_open: bool, may_outline: bool, end_tokens: frozenset[int] = frozenset()) -> Mask:
        """Give what a guided answer may not write next.

        Control tags that the grammar does not allow; where only tags may stand, everything but those and newlines;
        the end of an outline, a path or a conclusion that has nothing in it but its label; and an end token in an
        outline. So what is written is fit to be a training row (:func:`~multiverse_hf.documents.validate`).

        Args:
            may_open: a block may begin here, as far as the limits go.
            may_outline: a further outline may begin here, as far as the limits go.
            end_tokens: tokens that end a branch.
        """
        is_bare = self._is_bare()
        may_outline = may_outline and self.stage is Stage.GOAL
        state = self.stage, self.depth > 0, self.thinking, self.has_thought, bool(self.outlines), is_bare
        key = (*state, may_open, may_outline, end_tokens)
        if key not in self.masks:
            allowed = self._allowed(may_open, may_outline)
            if self.stage in (Stage.ARMED, Stage.GOAL, Stage.CONCLUDED):
                mask = Mask((*sorted(allowed), *dict.fromkeys(self.tags.newline)), only=True)
            else:
                closing = {self.tags.close(role) for role in ("outline", "path", "conclusion")} if is_bare else set()
                ending = end_tokens if is_bare or self.stage is Stage.OUTLINE else set()
                mask = Mask(tuple(sorted(set(self.tags.control_ids) - allowed | closing | ending)))
            self.masks[key] = mask
        return self.masks[key]

    def _is_bare(self) -> bool:
        """Say whether the outline, path or conclusion being written has nothing in it but its label."""
        if self.stage is Stage.OUTLINE:
            outline = self.outlines[-1]
            if len(outline) > MAX_LABEL_TOKENS + 2:
                return False
            label = self.tags.label(outline, 0)
            rest = outline[len(label) :] if outline[: len(label)] == label else outline
            return all(token in self.tags.newline for token in rest)
        is_inside = self.stage is Stage.CONCLUSION or (self.stage is Stage.TEXT and self.depth > 0)
        return is_inside and not self.has_text

    def bound(self, may_open: bool, may_outline: bool) -> Mask | None:
        """Give the tags that would break a limit here, whatever the grammar says (``structure="lenient"``)."""
        tags, over = self.tags, set()
        if not may_open and self.stage is not Stage.ARMED:
            over |= {tags.open("parallel"), tags.open("goal")}
        if not may_outline and self.stage is Stage.GOAL and self.outlines:
            over.add(tags.open("outline"))
        ids = tuple(sorted(token for token in over if token is not None))
        if ids and ids not in self.masks:
            self.masks[ids] = Mask(ids)
        return self.masks[ids] if ids else None

    def _allowed(self, may_open: bool = True, may_outline: bool = True) -> set[int]:
        """Give the control tags the grammar allows as the next token."""
        tags, stage = self.tags, self.stage
        allowed: list[int | None] = []
        if stage is Stage.TEXT:
            if may_open:
                allowed.append(tags.open("goal") if tags.names.parallel is None else tags.open("parallel"))
            if self.depth:
                allowed.append(tags.close("path"))
            elif self.thinking:
                allowed.append(tags.close("think"))
            elif not self.has_thought:
                allowed.append(tags.open("think"))
        elif stage is Stage.ARMED:
            allowed.append(tags.open("goal"))
        elif stage is Stage.GOAL:
            if may_outline or not self.outlines:
                allowed.append(tags.open("outline"))
            if self.outlines:
                allowed.append(tags.close("goal"))
        elif stage is Stage.OUTLINE:
            allowed.append(tags.close("outline"))
        elif stage is Stage.FORKED:
            allowed.append(tags.open("path"))
        elif stage is Stage.REDUCED:
            allowed.append(tags.open("conclusion"))
        elif stage is Stage.CONCLUSION:
            allowed.append(tags.close("conclusion"))
        elif stage is Stage.CONCLUDED:
            allowed.append(tags.close("parallel"))
        return {token for token in allowed if token is not None}

    # Closing what is open

    def closing_tokens(self) -> list[int]:
        """Give the tokens that end what this branch is in the middle of: a goal (it then forks), a conclusion, its
        path, or, outside every block, the thinking. As few as will do. Empty when nothing is open."""
        tags = self.tags
        if self.stage in (Stage.ARMED, Stage.GOAL, Stage.OUTLINE):
            tokens = [tags.open("goal")] if self.stage is Stage.ARMED else []
            if not self.outlines:
                tokens += [tags.open("outline"), *tags.ordinal(1), tags.close("outline")]
            elif self.stage is Stage.OUTLINE:
                tokens.append(tags.close("outline"))
            return [*tokens, tags.close("goal")]
        tokens = []
        if self.stage is Stage.REDUCED:
            tokens += tags.conclusion_prefix()
        if self.stage in (Stage.REDUCED, Stage.CONCLUSION):
            tokens.append(tags.close("conclusion"))
        if self.stage in (Stage.REDUCED, Stage.CONCLUSION, Stage.CONCLUDED) and tags.names.parallel is not None:
            tokens.append(tags.close("parallel"))
        if self.depth:
            if self.stage is Stage.FORKED:
                tokens += self.path_prefix(self.scanner.open_blocks[-1].path)
            tokens.append(tags.close("path"))
        elif self.thinking:
            tokens.append(tags.close("think"))
        return tokens
