"""An answer as a tree of branches while it is written: flows of text, and in them blocks with a flow for each path."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from multiverse_hf.modeling.families import FAMILIES
from multiverse_hf.modeling.tags import LABEL

if TYPE_CHECKING:  # they import torch, which only a running model needs
    from multiverse_hf.modeling.state import BranchEvent
    from multiverse_hf.serving.events import StreamEvent

Token = int | str  # an id, or from an endpoint the text that the token adds
Decode = Callable[[Sequence[Token]], str]
Roles = Mapping[Token, tuple[str, bool]]  # of each tag: its role, and whether it opens
# The tags of all families, for events that carry text.
TEXT_ROLES: Roles = {
    tag: (role, opens)
    for family in FAMILIES.values()
    for role, _ in family.items()
    for tag, opens in ((family.open(role), True), (family.close(role), False))
}


class Pace:
    """Slows the display of an answer down.

    Args:
        rate: most steps shown in a second.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._stepped: set[str] = set()  # branches that chose a token in this step
        self._next_step = 0.0

    def keep(self, branch: str) -> None:
        """Wait at the start of a step: at a branch that has chosen a token since the last wait."""
        if branch in self._stepped:
            self._stepped.clear()
            time.sleep(max(self._next_step - time.monotonic(), 0))
        if not self._stepped:
            self._next_step = time.monotonic() + 1 / self.rate
        self._stepped.add(branch)


class TokenText:
    """The text of a run of tokens, decoded line by line as they arrive."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._lines, self._ids, self._tail = decode, "", [], ""
        self._before = ""  # text of the token at the end of the line before

    def add(self, token: Token) -> None:
        """Add the next token."""
        self._ids.append(token)
        self._tail = self._decode(self._ids)[len(self._before) :]
        if self._tail.endswith("\n"):  # a complete line is not decoded again
            self._lines, self._ids, self._tail = self._lines + self._tail, [token], ""
            self._before = self._decode(self._ids)  # without it a decoder drops whitespace at the start of a line

    @property
    def text(self) -> str:
        """All text so far, without an incomplete last character."""
        return self._lines + self._tail.rstrip("\ufffd")

    @property
    def full_text(self) -> str:
        """All text, after the last token."""
        return self._lines + self._tail


class TextRole(Enum):
    """The role of a run of text."""

    TEXT = "text"
    OUTLINE = "outline"
    CONCLUSION = "conclusion"


@dataclass(slots=True, eq=False)
class TextRun:
    """A run of text between two tags."""

    part: TextRole
    content: TokenText


@dataclass(slots=True, eq=False)
class Columns:
    """A block: a flow for each of its paths."""

    paths: list["Flow"]


@dataclass(slots=True, eq=False)
class Flow:
    """One path, or the answer itself, whose label is empty: text and blocks in order."""

    label: str = ""
    title: str = ""
    items: list[TextRun | Columns] = field(default_factory=list)
    is_open: bool = True


class BranchTree:
    """An answer as a tree of flows, built from the events of a generation. Tags become structure and are not shown.

    Args:
        decode: returns the text of tokens; ``"".join`` for events of an endpoint, which carry text.
        roles: the model's control tags; :data:`TEXT_ROLES` for events of an endpoint.
    """

    def __init__(self, decode: Decode, roles: Roles) -> None:
        self.root = Flow()
        self._decode, self._roles = decode, roles
        self._flows = {"": self.root}  # by label; a later block reuses the labels of an earlier one

    def feed(self, event: "BranchEvent | StreamEvent") -> None:
        """Add the next event."""
        flow = self._flows[event.branch]
        text = getattr(event, "text", None)
        token = event.token if text is None else text
        if event.kind == "token" and token is not None:
            role, opens = self._roles.get(text.strip() if text else token, (None, False))
            if role is None:
                if not flow.items or isinstance(flow.items[-1], Columns):
                    self._start(flow, TextRole.TEXT)
                flow.items[-1].content.add(token)
            else:
                begins = {"outline": TextRole.OUTLINE, "conclusion": TextRole.CONCLUSION}.get(role) if opens else None
                self._start(flow, begins or TextRole.TEXT)
        elif event.kind == "fork":
            self._fork(flow, event.num_paths)
        elif event.kind == "close":
            flow.is_open = False
        elif event.kind == "finish":
            self.root.is_open = False

    def _start(self, flow: Flow, part: TextRole) -> None:
        flow.items.append(TextRun(part, TokenText(self._decode)))

    def _fork(self, flow: Flow, num_paths: int) -> None:
        """Turn the outlines of the last goal into headings of columns."""
        titles: list[str] = []
        while flow.items and len(titles) < num_paths:
            item = flow.items[-1]
            if isinstance(item, Columns) or (item.part is not TextRole.OUTLINE and item.content.text.strip()):
                break
            flow.items.pop()
            if item.part is TextRole.OUTLINE:
                titles.append(" ".join(LABEL.sub("", item.content.full_text, count=1).split()))
        titles += [""] * (num_paths - len(titles))
        paths = [
            Flow(f"{flow.label}.{number}".lstrip("."), title) for number, title in enumerate(reversed(titles), start=1)
        ]
        self._flows |= {path.label: path for path in paths}
        flow.items.append(Columns(paths))
