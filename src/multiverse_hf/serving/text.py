"""From the events of an answer to its text: in document order, with reasoning apart, cut at stop strings."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multiverse_hf.modeling.sampling import TokenScores
from multiverse_hf.modeling.state import BranchEvent
from multiverse_hf.modeling.tags import TagSet

if TYPE_CHECKING:
    from .events import StreamEvent

REASONING, CONTENT = "reasoning", "content"
INCOMPLETE = "\ufffd"  # what a tokenizer writes for a character whose bytes are not all there

DecodeIds = Callable[[Sequence[int]], str]


def remember_short(decode: DecodeIds, size: int = 1 << 16) -> DecodeIds:
    """Return a decoder that remembers the texts of one and two tokens, which a stream asks for with each token."""
    known = functools.lru_cache(size)(decode)
    return lambda ids: known(tuple(ids)) if len(ids) <= 2 else decode(ids)


class TokenDecoder:
    """Decodes a run of tokens as they arrive: the pieces together are the text of all of them.

    A token is decoded together with the few before it, since in some tokenizers its text depends on what stands there.
    """

    def __init__(self, decode: DecodeIds) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the last place where the text was complete, and the token before it
        self._shown = ""

    def add(self, token: int) -> str:
        """Return the new text; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(INCOMPLETE) and len(self._ids) < 16:  # no character has so many tokens
            return ""
        new = text[len(self._shown) :]
        self._ids = [token]
        self._shown = self._decode(self._ids)
        return new

    def end(self) -> str:
        """Return what is left: characters that stay incomplete."""
        return self._decode(self._ids)[len(self._shown) :]


@dataclass(slots=True, eq=False)
class Run:
    """Tokens of one branch in order, and the block that follows them."""

    events: "list[BranchEvent | StreamEvent]" = field(default_factory=list)
    paths: "list[Run] | None" = None
    after: "Run | None" = None  # what follows the block's paths
    is_closed: bool = False


class DocumentOrder:
    """Gives the tokens of an answer in document order, each as soon as all before it are written."""

    def __init__(self) -> None:
        self._open = {"": Run()}  # by label; a later block reuses the labels of an earlier one
        self._walk = self._settled(self._open[""])

    def feed(self, event: "BranchEvent | StreamEvent") -> None:
        """Add the next event of the engine, or of an endpoint."""
        run = self._open[event.branch]
        if event.kind == "token":
            run.events.append(event)
        elif event.kind == "fork":
            run.paths = [Run() for _ in range(event.num_paths)]
            prefix = f"{event.branch}." if event.branch else ""
            self._open |= {f"{prefix}{number}": path for number, path in enumerate(run.paths, 1)}
        elif event.kind == "close":
            run.is_closed = True
        elif event.kind == "reduce":
            run.after = self._open[event.branch] = Run()
        elif event.kind == "finish":
            run.is_closed = True

    def settled(self) -> "Iterator[BranchEvent | StreamEvent]":
        """Return the token events that are settled since the last call."""
        while (event := next(self._walk, None)) is not None:
            yield event

    def _settled(self, run: Run) -> "Iterator[BranchEvent | StreamEvent | None]":
        at = 0
        while True:
            while at < len(run.events):
                yield run.events[at]
                at += 1
            if run.paths is not None:
                for path in run.paths:
                    yield from self._settled(path)
                while run.after is None:
                    yield None
                run, at = run.after, 0
            elif run.is_closed:
                return
            else:
                yield None


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token as log-probabilities name it."""

    token: int
    text: str
    scores: TokenScores | None  # None where the engine wrote it


@dataclass(slots=True)
class Delta:
    """New text of an answer.

    Attributes:
        part: ``"reasoning"`` or ``"content"``.
        text: the text.
        tokens: whose text it is.
    """

    part: str
    text: str
    tokens: list[TextToken] = field(default_factory=list)


class AnswerText:
    """Splits an answer into reasoning and content, token by token in document order.

    Reasoning is what stands between the think tags, and content what follows, each without the line breaks around it.
    An answer that does not begin with the think tag is all content. The text ends before the first stop string in
    document order.

    Args:
        decode: of token ids, without end tokens.
        tags: the control tags; None to keep an answer whole, as ``/v1/completions`` does.
        hidden: end and padding tokens, which have no text.
        stops: stop strings.
        begins_inside: the prompt opened the reasoning.
    """

    def __init__(
        self,
        decode: DecodeIds,
        tags: TagSet | None,
        hidden: Collection[int],
        stops: Sequence[str] = (),
        begins_inside: bool = False,
    ) -> None:
        self._decode, self._hidden, self._stops = decode, hidden, stops
        self._opens = None if tags is None else tags.open("think")
        self._closes = None if tags is None else tags.close("think")
        self._decoder = TokenDecoder(decode)
        self._has_begun = begins_inside or self._opens is None
        self.part = REASONING if begins_inside else CONTENT
        self._trims = tags is not None  # line breaks at the beginning of a part
        self._held: list[tuple[TextToken, str]] = []  # tokens that are not sent yet, each with the text it adds
        self.num_reasoning = 0
        self.is_stopped = False  # a stop string was found; nothing follows

    def add(self, token: int, scores: TokenScores | None = None) -> list[Delta]:
        """Add the next token. Return the text that is sure by now."""
        if self.is_stopped:
            return []
        if self.part == REASONING or token == self._opens:
            self.num_reasoning += 1
        if token in self._hidden:
            return []
        if not self._has_begun and token == self._opens:
            self._has_begun = True
            self._held.clear()  # white space before it
            self.part = REASONING
            return []
        if self.part == REASONING and token == self._closes:
            rest = self._end_part()
            self.part, self._trims = CONTENT, True
            return rest
        self._held.append((TextToken(token, self._decode([token]), scores), self._decoder.add(token)))
        if not self._has_begun:
            if not any(piece.strip() for _, piece in self._held):
                return []  # the think tag may follow
            self._has_begun = True
        return self._send(is_last=False)

    def end(self) -> list[Delta]:
        """Return the rest, after the last token."""
        return [] if self.is_stopped else self._end_part()

    def _end_part(self) -> list[Delta]:
        if self._held and (rest := self._decoder.end()):
            token, piece = self._held[-1]
            self._held[-1] = token, piece + rest
        self._decoder = TokenDecoder(self._decode)
        deltas = self._send(is_last=True)
        self._held.clear()
        return deltas

    def _send(self, is_last: bool) -> list[Delta]:
        """Return what of the held text is sure: no stop string, no trailing line breaks, nor what may become one."""
        if self._trims:
            first = next((at for at, (_, piece) in enumerate(self._held) if piece.strip("\n")), None)
            if first is None:
                return []
            breaks = [at for at, (_, piece) in enumerate(self._held[:first]) if piece]
            del self._held[: breaks[-1] + 1 if breaks else 0]  # not the first tokens of an incomplete character
            at = next(at for at, (_, piece) in enumerate(self._held) if piece)
            token, piece = self._held[at]
            self._held[at], self._trims = (token, piece.lstrip("\n")), False
        text = "".join(piece for _, piece in self._held)
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.is_stopped = is_last = True
        end = len(text) if found is None else found
        if self.part == REASONING:
            end = len(text[:end].rstrip("\n"))
        if not is_last:
            end -= max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        tokens, length = [], 0
        for token, piece in self._held:  # a token goes with the text that it begins; the others wait
            if (length >= end and piece) if is_last else length + len(piece) > end:
                break
            tokens.append(token)
            length += len(piece)
        if not length:
            return []
        del self._held[: len(tokens)]
        return [Delta(self.part, text[: min(length, end)], tokens)]


def _overlap(text: str, stop: str) -> int:
    """Return how much of a text's end may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
