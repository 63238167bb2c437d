"""From a document to what the viewer shows of it: tokens, segments, branches and the tree of lanes, as plain JSON.

Positions and visibility are the layout's (:mod:`multiverse_hf.modeling.layout`). Steps follow from the structure: each
chosen token takes a step of its branch, and the engine writes forced tokens within the step before.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.data.rows import IGNORE, document_labels, with_forced_starts
from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.modeling.families import FAMILIES
from multiverse_hf.modeling.grammar import IN_GOAL, Event, Stage, Structure
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.tags import LABEL, TagSet
from multiverse_hf.viewing.results import ViewedResult

# Kind of a token that is no tag, by where it stands; elsewhere it belongs to the tags around it.
_KINDS = {Stage.TEXT: "text", Stage.OUTLINE: "outline", Stage.CONCLUSION: "conclusion"}

# From a result and the ids of its document: the log-probability of each token.
LogProbs = Callable[[ViewedResult, Sequence[int]], Sequence[float | None]]


@dataclass(slots=True)
class _Lane:
    """One branch: the answer itself, or a path."""

    number: int
    name: str
    parent: int | None
    depth: int
    block: int  # number of its block; -1 for the answer itself
    outline: tuple[int, int] = (0, 0)  # its tokens in the goal
    items: list[dict[str, Any]] = field(default_factory=list)
    goal: int = 0  # index of the first item of the goal being written
    tokens: list[int] = field(default_factory=list)  # indices of its own tokens


@dataclass(slots=True)
class _OpenBlock:
    """A block whose paths are being read."""

    number: int
    fork_step: int
    item: dict[str, Any]
    ends: list[int] = field(default_factory=list)  # step of each closed path's last token


def tags_of(text: str, tokenizer: Any, tags: TagSet) -> tuple[Any, TagSet]:
    """Return a tokenizer and tags that fit a document: of another family if the document has its tags."""
    if not (found := [each for each in FAMILIES.values() if each.is_in(text)]) or tags.names.is_in(text):
        return tokenizer, tags
    tokenizer = copy.deepcopy(tokenizer)
    return tokenizer, TagSet.add_to(tokenizer, found[0])


@dataclass(frozen=True)
class TraceBuilder:
    """Builds the traces of documents.

    Args:
        tokenizer: a transformers tokenizer.
        tags: its control tags.
        name: name of its model, for people.
        logprobs: gives log-probabilities of a document; None for a page without them.
    """

    tokenizer: Any
    tags: TagSet
    name: str
    logprobs: LogProbs | None = None

    def build(self, result: ViewedResult) -> dict[str, Any]:
        """Return the trace of a result.

        Returns:
            ``tokens`` has the lists ``text``, ``step`` and ``logprob``, and ``forced``, runs of indices. ``segments``
            have ``start`` and ``stop``, the ``position`` of their first token, their ``branch``, and ``sees``, runs of
            segments. ``branches`` have their times. ``tree`` is a list of items: runs of tokens by kind, and blocks
            with ``goal`` and ``paths``. Positions count from the first token of the answer.
        """
        text = result.document
        tokenizer, tags = tags_of(text, self.tokenizer, self.tags)
        ids = with_forced_starts(tokenizer.encode(text, add_special_tokens=False), text, tokenizer, tags)
        forced = [label == IGNORE for label in document_labels(ids, tags)]
        layout = build_layout(ids, tags)
        positions, numbers = layout.position_ids.tolist(), layout.segment_ids.tolist()
        lanes, branch_of, steps = _follow(ids, forced, tokenizer, tags)
        texts = token_texts(ids, tokenizer)
        logprobs = None
        if self.logprobs is not None and ids:
            scores = zip(forced, self.logprobs(result, ids), strict=True)
            logprobs = [None if skip or score is None else round(score, 4) for skip, score in scores]
        return {
            "title": result.title,
            "source": result.source,
            "key": result.key,
            "prompt": result.prompt,
            "error": result.error,
            "facts": dict(result.facts),
            "counts": dict(result.counts),
            "tokenizer": self.name,
            "notes": self._notes(result, len(ids), max(steps, default=-1) + 1),
            "stats": {
                "num_tokens": len(ids),
                "length": layout.length,
                "parallelism": round(len(ids) / layout.length, 4) if ids else 1.0,
                "num_steps": max(steps, default=-1) + 1,
                "num_paths": len(lanes) - 1,
                "depth": max(lane.depth for lane in lanes),
            },
            "tokens": {
                "text": texts,
                "step": steps,
                "forced": runs([index for index, each in enumerate(forced) if each]),
                "logprob": logprobs,
            },
            "segments": _segments(numbers, positions, branch_of, layout.visible, layout.length),
            "branches": _branches(lanes, texts, positions, steps, forced),
            "tree": lanes[0].items,
        }

    def _notes(self, result: ViewedResult, num_tokens: int, num_steps: int) -> list[str]:
        """Return what a reader has to know: a text that does not parse, or counts that differ from the engine's."""
        notes = []
        if result.document:
            try:
                parse_document(result.document, tags_of(result.document, self.tokenizer, self.tags)[1].names)
            except DocumentError as err:
                notes.append(f"The document does not parse, so it is laid out as far as its tags go. {err}")
        # the end token is counted, and is not in the document
        if (counted := result.counts.get("num_tokens")) is not None and counted - num_tokens not in (0, 1):
            notes.append(
                f"The engine counted {counted} tokens. The {num_tokens} here are those of {self.name}'s tokenizer; "
                "name the model with --model."
            )
        elif (counted := result.counts.get("num_steps")) is not None and abs(counted - num_steps) > 1:
            notes.append(
                f"The engine took {counted} steps, the structure alone needs {num_steps}: paths waited, or a limit "
                "closed them."
            )
        return notes


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token. They join to the document. Part of a character is at its last token."""
    texts, last, pending = [], [], []
    known: dict[tuple[int, ...], str] = {}

    def decode(tokens: Sequence[int]) -> str:
        key = tuple(tokens)
        if key not in known:
            known[key] = tokenizer.decode(tokens, skip_special_tokens=False) if key else ""
        return known[key]

    for number, token in enumerate(ids, start=1):
        pending.append(token)
        # after the token before: alone, a decoder may drop the space at the beginning
        text = decode([*last, *pending])[len(decode(last)) :]
        if text.endswith("\ufffd") and number < len(ids) and len(pending) < 5:
            texts.append("")
            continue
        texts.append(text)
        last, pending = pending, []
    return texts


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as runs ``[first, last]``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _follow(
    ids: Sequence[int], forced: Sequence[bool], tokenizer: Any, tags: TagSet
) -> tuple[list[_Lane], list[int], list[int]]:
    """Return the lanes of a document, and the branch and the step of each token."""
    structure = Structure(tags)
    lane = _Lane(0, "", None, 0, -1)
    lanes: list[_Lane] = [lane]
    blocks: list[_OpenBlock] = []
    num_blocks, step = 0, -1
    branch_of: list[int] = []
    steps: list[int] = []
    for index, token in enumerate(ids):
        before, malformed = structure.stage, structure.malformed
        event = structure.feed(token)
        step += not forced[index]
        branch_of.append(lane.number)
        steps.append(max(step, 0))
        lane.tokens.append(index)
        is_tag = forced[index] or (token in tags.roles and structure.malformed == malformed)
        begins = event is Event.FORK or structure.stage in (Stage.ARMED, *IN_GOAL)
        if before not in (Stage.ARMED, *IN_GOAL) and begins:
            lane.goal = len(lane.items)
        _add(lane, "tag" if is_tag else _KINDS.get(structure.stage, "tag"), index)
        if event is Event.TEXT:
            continue
        if event is Event.FORK:
            item = {"kind": "block", "goal": lane.items[lane.goal :], "paths": []}
            blocks.append(_OpenBlock(num_blocks, step, item))
            num_blocks += 1
            lane.items[lane.goal :] = [item]
            parent = lane
        else:
            parent = lanes[lane.parent or 0]
            blocks[-1].ends.append(step)
        block = blocks[-1]
        if event is Event.REDUCE:
            lane, step = parent, max(block.ends)
            blocks.pop()
            continue
        place, step = len(block.item["paths"]), block.fork_step
        outlines = [item for item in block.item["goal"] if item["kind"] == "outline"]
        at = (outlines[place]["start"], outlines[place]["stop"]) if place < len(outlines) else (0, 0)
        name = tokenizer.decode(structure.labels[-1][place]).strip().rstrip(":") or str(place + 1)
        lane = _Lane(len(lanes), name, parent.number, len(blocks), block.number, at)
        lanes.append(lane)
        block.item["paths"].append({"branch": lane.number, "items": lane.items})
    return lanes, branch_of, steps


def _add(lane: _Lane, kind: str, index: int) -> None:
    """Add a token to the last item of a lane, or to a new one where a goal begins or the kind changes."""
    last = lane.items[-1] if len(lane.items) > lane.goal else None
    if last is not None and last["kind"] == kind and last["stop"] == index:
        last["stop"] = index + 1
    else:
        lane.items.append({"kind": kind, "start": index, "stop": index + 1})


def _segments(
    numbers: Sequence[int], positions: Sequence[int], branch_of: Sequence[int], visible: Any, length: int
) -> list[dict[str, Any]]:
    """Return the segments of a layout. One that would follow the last token is empty."""
    starts: dict[int, int] = {}
    for index, number in enumerate(numbers):
        starts.setdefault(number, index)
    found: list[dict[str, Any]] = []
    stop = len(numbers)
    for number in reversed(range(len(visible))):
        start = starts.get(number, stop)
        found.append(
            {
                "start": start,
                "stop": stop,
                "position": positions[start] if start < len(positions) else length,
                "branch": branch_of[start] if start < stop else 0,
                "sees": runs(visible[number].nonzero().flatten().tolist()),
            }
        )
        stop = start
    return found[::-1]


def _branches(
    lanes: Sequence[_Lane],
    texts: Sequence[str],
    positions: Sequence[int],
    steps: Sequence[int],
    forced: Sequence[bool],
) -> list[dict[str, Any]]:
    """Return the branches: where and when each was written, whom it waited for, and its row in a timeline."""
    blocks: dict[int, list[_Lane]] = {}
    inside: dict[int, list[_Lane]] = {lane.number: [] for lane in lanes}  # paths of a branch's blocks
    for lane in lanes:
        blocks.setdefault(lane.block, []).append(lane)
        if lane.parent is not None:
            inside[lane.parent].append(lane)
    ends: dict[int, dict[str, int]] = {}  # one past the last position and step of a branch, nested ones included
    for lane in reversed(lanes):
        own = [{"position": positions[lane.tokens[-1]] + 1, "step": steps[lane.tokens[-1]] + 1}] if lane.tokens else []
        inner = [ends[each.number] for each in inside[lane.number]]
        ends[lane.number] = {of: max((each[of] for each in (*own, *inner)), default=0) for of in ("position", "step")}
    heights: dict[int, int] = {}  # rows of a branch with all that is nested in it
    for lane in reversed(lanes):
        inner_blocks = [blocks[number] for number in {each.block for each in inside[lane.number]}]
        heights[lane.number] = 1 + max((sum(heights[e.number] for e in block) for block in inner_blocks), default=0)
    rows, critical = {0: 0}, {0}
    found = []
    for number, siblings in blocks.items():
        if number < 0:
            continue
        row = rows[siblings[0].parent or 0] + 1
        for lane in siblings:
            rows[lane.number] = row
            row += heights[lane.number]
        longest = max(siblings, key=lambda lane: ends[lane.number]["position"])
        if longest.parent in critical:
            critical.add(longest.number)
    for lane in lanes:
        title = "".join(texts[slice(*lane.outline)])
        last = {of: max(ends[each.number][of] for each in blocks[lane.block]) for of in ("position", "step")}
        waits_for = next(each.number for each in blocks[lane.block] if ends[each.number]["step"] == last["step"])
        first = lane.tokens[0] if lane.tokens else None
        chosen = next((index for index in lane.tokens if not forced[index]), first)
        found.append(
            {
                "name": lane.name,
                "title": " ".join(LABEL.sub("", title, count=1).split()),
                "parent": lane.parent,
                "block": lane.block,
                "depth": lane.depth,
                "row": rows[lane.number],
                "outline": list(lane.outline),
                "num_tokens": len(lane.tokens),
                "position": [positions[first] if first is not None else 0, ends[lane.number]["position"]],
                "step": [steps[chosen] if chosen is not None else 0, ends[lane.number]["step"]],
                "reduce": [last["position"], last["step"]],  # when the last of its siblings ended
                "waits_for": None if ends[lane.number]["step"] == last["step"] else waits_for,
                "critical": lane.number in critical,
            }
        )
    return found
