"""The grammar of a document: what each tag does, which tags may come next, and how to close what is open.

Pure state machines over token ids, without a model. :class:`Scanner` is the one definition of what a tag does. The
layout runs it over whole documents. The engine runs a :class:`Structure` for each branch: a scanner that also keeps
what only generation needs, such as the outlines' labels. Comments name Multiverse's tags; the family of the tag set
says which tags there are, which opens the paths, and which follow them.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from .tags import TagSet


class Event(Enum):
    """What a token does to the structure around it."""

    TEXT = auto()  # nothing: ordinary text, or a tag that fits no rule here
    FORK = auto()  # </Goal> with outlines: the next token begins the first path
    NEXT_PATH = auto()  # </Path>, more paths to come: the next token begins the next path
    REDUCE = auto()  # the last </Path>: the next token sees all paths


class Stage(Enum):
    """Where a branch stands in the grammar of a block."""

    TEXT = auto()  # free text: outside any block, or inside a path
    ARMED = auto()  # <Parallel> read, <Goal> to come
    GOAL = auto()  # inside the goal, between outlines
    OUTLINE = auto()  # inside an outline
    FORKED = auto()  # a path begins, its <Path> to come
    REDUCED = auto()  # the paths are merged, the text that the engine writes to come
    CONCLUSION = auto()  # inside the conclusion
    CONCLUDED = auto()  # past that text and outside the conclusion, another tag of the block's ending to come


IN_GOAL = (Stage.GOAL, Stage.OUTLINE)
IN_ENDING = (Stage.REDUCED, Stage.CONCLUSION, Stage.CONCLUDED)


@dataclass(slots=True)
class OpenBlock:
    """A block whose goal is closed and whose last path is not."""

    num_paths: int
    path: int = 0  # paths closed so far


@dataclass(slots=True)
class Scanner:
    """Follows the tags of a document from left to right. Total: any sequence of tokens is accepted.

    Attributes:
        tags: the control tags.
        stage: where the last token stands in the grammar.
        open_blocks: blocks whose paths are being read, outermost first.
        num_outlines: of the goal being read, opened so far.
        num_ended: tags of the ending of the block read last, which follow its paths.
        turn_end: in a turn of the user's or the system's, where tags are text: the token that ends it.
        recent: the last tokens outside every block, among which such a turn may open.
    """

    tags: TagSet
    stage: Stage = Stage.TEXT
    open_blocks: list[OpenBlock] = field(default_factory=list)
    num_outlines: int = 0
    num_ended: int = 0
    turn_end: int | None = None
    recent: tuple[int, ...] = ()

    def hears(self, token: int) -> bool:
        """Take any token, and return whether a tag acts here: not in a turn that is not the assistant's.

        Such a turn opens outside every block only.
        """
        if self.turn_end is not None:
            if token == self.turn_end:
                self.turn_end = None
            return False
        turns = self.tags.turns
        if turns and not self.open_blocks and self.stage not in IN_GOAL:
            self.recent = (*self.recent[1 - max(len(opening) for opening, _ in turns) :], token)
            self.open_turn(self.recent)
        return True

    def open_turn(self, ids: tuple[int, ...]) -> None:
        """Open a turn if ``ids`` end in what opens one."""
        for opening, end in self.tags.turns:
            if ids[-len(opening) :] == opening:
                self.turn_end = end
                if self.stage is Stage.ARMED:
                    self.stage = Stage.TEXT

    def feed(self, token: int) -> Event:
        """Take the next token, and return what it does."""
        is_tag = self.hears(token) and token in self.tags.roles
        return self.read_tag(token) if is_tag else Event.TEXT

    def read_tag(self, token: int) -> Event:
        """Take a control tag, and return what it does."""
        tags, stage = self.tags, self.stage
        role, opens = tags.roles[token]
        if stage in IN_GOAL:  # here only the goal's own tags count
            return self._read_in_goal(role, opens)
        if stage in IN_ENDING and token == tags.ending[self.num_ended]:
            self.num_ended += 1
            is_last = self.num_ended == len(tags.ending)
            inside = Stage.CONCLUSION if role == "conclusion" and opens else Stage.CONCLUDED
            self.stage = Stage.TEXT if is_last else inside
        elif role == "parallel" and opens and tags.names.num_paths is not None:
            return self._fork(tags.names.num_paths)
        elif role == "parallel":
            self.stage = Stage.ARMED if opens else Stage.TEXT
        elif role == "goal" and opens and (stage is Stage.ARMED or tags.names.parallel is None):
            self.stage, self.num_outlines = Stage.GOAL, 0
        elif role == "path" and not opens and self.open_blocks:
            block = self.open_blocks[-1]
            block.path += 1
            if block.path < block.num_paths:
                self.stage = Stage.FORKED
                return Event.NEXT_PATH
            self.open_blocks.pop()
            self.stage, self.num_ended = Stage.REDUCED, 0
            return Event.REDUCE
        elif role == "path" and opens and stage is Stage.FORKED:
            self.stage = Stage.TEXT
        return Event.TEXT

    def _read_in_goal(self, role: str, opens: bool) -> Event:
        if role == "outline":
            self.num_outlines += opens and self.stage is Stage.GOAL
            self.stage = Stage.OUTLINE if opens else Stage.GOAL
        elif role == "goal" and not opens:
            self.stage = Stage.TEXT  # an empty goal goes on as text
            if self.num_outlines:
                num_paths, self.num_outlines = self.num_outlines, 0
                return self._fork(num_paths)
        return Event.TEXT

    def _fork(self, num_paths: int) -> Event:
        self.stage = Stage.FORKED
        self.open_blocks.append(OpenBlock(num_paths))
        return Event.FORK


@dataclass(frozen=True, eq=False)
class TokenMask:
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
class Structure(Scanner):
    """State of one branch, or of a whole document read from left to right.

    Attributes:
        thinking: inside the thinking region, and ``has_thought`` after its opening tag.
        has_text: something but newlines stands in the outline, path or conclusion being written.
        outlines: token ids of each outline of the goal being written.
        labels: of every open block, the label of each path.
        num_blocks: blocks opened so far, those in other paths not counted; a turn of the user's begins anew.
        malformed: tags that fitted no rule.
        masks: made so far; shared by all copies.
    """

    thinking: bool = False
    has_thought: bool = False
    has_text: bool = False
    outlines: list[list[int]] = field(default_factory=list)
    labels: list[list[list[int]]] = field(default_factory=list)
    malformed: int = 0
    num_blocks: int = 0
    masks: dict[Any, TokenMask] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """Number of blocks whose paths are being written around this point."""
        return len(self.open_blocks)

    def feed(self, token: int) -> Event:
        """Take the next token, and return what it does.

        After ``FORK`` this state is that of the first path; after ``REDUCE`` that of the text after the paths.
        """
        tags, stage = self.tags, self.stage
        if not self.hears(token) or token not in tags.roles:
            if stage is Stage.OUTLINE:
                self.outlines[-1].append(token)
            elif stage is Stage.REDUCED and not tags.names.num_started:  # the engine's text has no tag
                self.stage = Stage.CONCLUDED
            if self.turn_end is not None:
                self.num_blocks = 0
            self.has_text = self.has_text or token not in tags.newline
            return Event.TEXT
        if token not in self._allowed():
            self.malformed += 1
        event = self.read_tag(token)
        role, opens = tags.roles[token]
        self.has_text = not opens  # a nested block or a region that ends here is something, too
        if event is Event.FORK:
            self.labels.append(self.path_labels())
            self.outlines = []
            self.num_blocks += 1
        elif event is Event.REDUCE:
            self.labels.pop()
        elif stage is Stage.GOAL and self.stage is Stage.OUTLINE:
            self.outlines.append([])
        elif stage is Stage.GOAL and self.stage is Stage.TEXT:  # an empty goal
            self.malformed += 1
        elif stage not in IN_GOAL and self.stage is Stage.GOAL:
            self.outlines = []
        elif role == "think" and stage not in IN_GOAL and not self.open_blocks:
            self.thinking, self.has_thought = opens, True
        return event

    @property
    def may_open(self) -> bool:
        """Whether the grammar allows a block to begin here, limits aside."""
        return self.tags.ids[self.tags.names.opener] in self._allowed()

    def path_labels(self) -> list[list[int]]:
        """Return the label of every path that the outlines written so far ask for; none has one without outlines."""
        tags = self.tags
        if tags.names.num_paths is not None:
            return [[] for _ in range(tags.names.num_paths)]
        labels = [tags.label(outline, n) for n, outline in enumerate(self.outlines, 1)]
        labels = [label if len(label) <= MAX_LABEL_TOKENS else tags.ordinal(n) for n, label in enumerate(labels, 1)]
        if len({tuple(label) for label in labels}) < len(labels):  # siblings could not be told apart
            labels = [tags.ordinal(n) for n in range(1, len(labels) + 1)]
        return labels

    def path_prefix(self, path: int) -> list[int]:
        """Return what the engine writes at the start of a path of the innermost open block."""
        return self.tags.path_prefix(self.labels[-1][path])

    def for_path(self, path: int) -> "Structure":
        """Return the state of a path of the innermost open block, ready for its first token."""
        other = self.copy()
        other.open_blocks[-1].path = path
        other.stage = Stage.FORKED
        other.malformed = 0
        return other

    def after_reduce(self) -> "Structure":
        """Return the state that follows the last path of the innermost open block."""
        other = self.copy()
        other.open_blocks.pop()
        other.labels.pop()
        other.stage, other.num_ended = Stage.REDUCED, 0
        other.malformed = 0
        return other

    def copy(self) -> "Structure":
        """Return an independent copy; label lists are shared, none is written to once it is stored."""
        other = copy.copy(self)
        other.open_blocks = [copy.copy(block) for block in self.open_blocks]
        other.outlines, other.labels = [list(outline) for outline in self.outlines], list(self.labels)
        return other

    # What may come next

    def mask(
        self,
        is_guided: bool,
        max_depth: int,
        max_paths: int,
        end_tokens: frozenset[int] = frozenset(),
        max_blocks: int | None = None,
    ) -> TokenMask | None:
        """Return what may not be chosen next.

        A guided answer may not write control tags that the grammar does not allow; where only tags may stand, anything
        but those and newlines; the end of an outline, a path or a conclusion that has nothing in it but its label; and
        an end token in an outline. So what is written is fit to be a training row
        (:func:`~multiverse_hf.documents.validate`).

        Budgets are not among the reasons: a model kept from opening a block that it wants to open writes what it never
        learned to.

        Args:
            is_guided: the grammar counts, not the limits alone.
            max_depth: most blocks around any token.
            max_paths: most outlines of a block.
            end_tokens: tokens that end a branch.
            max_blocks: most blocks, as :attr:`num_blocks` counts them.
        """
        stage, depth = self.stage, len(self.open_blocks)
        may_open, may_outline = depth < max_depth, len(self.outlines) < max_paths
        may_open = may_open and (max_blocks is None or self.num_blocks < max_blocks)
        may_open = may_open and (self.tags.names.num_paths or 0) <= max_paths
        if not is_guided:
            return self._bound(may_open, may_outline)
        if stage is Stage.OUTLINE:
            is_bare = self._is_bare_outline()
        else:
            is_bare = not self.has_text and (stage is Stage.CONCLUSION or (stage is Stage.TEXT and depth > 0))
        may_outline = may_outline and stage is Stage.GOAL
        ended = self.num_ended if stage in IN_ENDING else 0
        state = stage, ended, depth > 0, self.thinking, self.has_thought, bool(self.outlines), is_bare
        key = (*state, may_open, may_outline, end_tokens)
        if key not in self.masks:
            allowed = self._allowed(may_open, may_outline)
            if stage in (Stage.ARMED, Stage.GOAL, Stage.CONCLUDED):
                mask = TokenMask((*sorted(allowed), *dict.fromkeys(self.tags.newline)), only=True)
            else:
                closing = {self.tags.close(role) for role in ("outline", "path", "conclusion")} if is_bare else set()
                ending = end_tokens if is_bare or stage is Stage.OUTLINE else set()
                mask = TokenMask(tuple(sorted((set(self.tags.control_ids) - allowed | closing | ending) - {None})))
            self.masks[key] = mask
        return self.masks[key]

    def _is_bare_outline(self) -> bool:
        """Return whether the outline being written has nothing in it but its label."""
        outline = self.outlines[-1]
        if len(outline) > MAX_LABEL_TOKENS + 2:
            return False
        label = self.tags.label(outline, 0)
        rest = outline[len(label) :] if outline[: len(label)] == label else outline
        return all(token in self.tags.newline for token in rest)

    def _bound(self, may_open: bool, may_outline: bool) -> TokenMask | None:
        """Return the tags that would break a limit here, whatever the grammar says (``structure="lenient"``)."""
        tags, over = self.tags, set()
        if not may_open and self.stage is not Stage.ARMED:
            over |= {tags.open("parallel"), tags.open("goal")}
        if not may_outline and self.stage is Stage.GOAL and self.outlines:
            over.add(tags.open("outline"))
        ids = tuple(sorted(token for token in over if token is not None))
        if ids and ids not in self.masks:
            self.masks[ids] = TokenMask(ids)
        return self.masks[ids] if ids else None

    def _allowed(self, may_open: bool = True, may_outline: bool = True) -> set[int]:
        """Return the control tags the grammar allows as the next token."""
        tags, stage = self.tags, self.stage
        allowed: list[int | None] = []
        if stage is Stage.TEXT:
            if may_open:
                allowed.append(tags.ids[tags.names.opener])
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
        elif stage in IN_ENDING:
            allowed.append(tags.ending[self.num_ended])
        return {token for token in allowed if token is not None}

    # Closing what is open

    def closing_tokens(self) -> list[int]:
        """Return the tokens that end what this branch is in the middle of: a goal (it then forks), a conclusion, its
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
        if self.stage in IN_ENDING:
            num_ended = self.num_ended
            if self.stage is Stage.REDUCED or num_ended < tags.names.num_started:  # the engine's text is not complete
                begun = tags.reduce_prefix.index(tags.ending[num_ended - 1]) + 1 if num_ended else 0
                tokens += tags.reduce_prefix[begun:]
                num_ended = tags.names.num_started
            tokens += tags.ending[num_ended:]
        if self.depth:
            if self.stage is Stage.FORKED:
                tokens += self.path_prefix(self.open_blocks[-1].path)
            tokens.append(tags.close("path"))
        elif self.thinking:
            tokens.append(tags.close("think"))
        return tokens
