"""An answer while it is written, as the app shows it: its branches as HTML, side by side, under a clock."""

import html
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.modeling.tags import LABEL
from multiverse_hf.serving.events import StreamEvent
from multiverse_hf.serving.text import DocumentOrder
from multiverse_hf.viewing.branches import TEXT_ROLES, BranchTree, Columns, Flow, Pace, TextRole, TextRun
from multiverse_hf.viewing.sources import Ended, Put, Question, Source

FRAME_S = 0.1  # seconds between two pictures of an answer
# Characters that a frame shows: the newest of every run. The viewer shows all of them afterwards.
MOST_OF_FRAME, MOST_OF_RUN, LEAST_OF_RUN = 60_000, 2_000, 80
NUM_COLORS = 8


@dataclass
class Writing:
    """One answer while it is written.

    Attributes:
        question: what was asked.
        pace: most steps shown in a second; 0 for the model's own speed.
        seconds: the model's own time, up to what is shown.
        counts: the engine's, once it is done.
        error: why it failed.
    """

    question: Question
    pace: float = 0
    seconds: float = 0.0
    num_tokens: int = 0
    num_paths: int = 0
    is_done: bool = False
    has_begun: bool = False
    counts: dict[str, object] = field(default_factory=dict)
    error: str | None = None

    def __post_init__(self) -> None:
        self.tree = BranchTree("".join, TEXT_ROLES)
        self.num_open = 1
        self._order, self._document = DocumentOrder(), []
        self._begun = time.monotonic()
        self._pace = Pace(self.pace)

    @property
    def document(self) -> str:
        """The answer with its tags, in document order, as far as it is settled."""
        self._document += [event.text or "" for event in self._order.settled()]
        return "".join(self._document)

    def read(self, events: "queue.SimpleQueue[tuple[float, StreamEvent | Ended]]") -> None:
        """Take in what happened, until a frame is due or the answer has ended."""
        until = time.monotonic() + FRAME_S
        while not self.is_done and time.monotonic() < until:
            try:
                moment, event = events.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                if not self.pace:
                    self.seconds = time.monotonic() - self._begun
                return
            if self.pace and isinstance(event, StreamEvent) and event.sampled:
                self._pace.keep(event.branch)
            self.has_begun, self.seconds = True, moment - self._begun
            self.feed(event)

    def feed(self, event: StreamEvent | Ended) -> None:
        """Take in one event."""
        if isinstance(event, Ended):
            self.error, self.counts, self.is_done = event.error, dict(event.counts), True
            return
        if event.text:  # half of a character cannot be sent to a browser
            event = event.model_copy(update={"text": event.text.encode("utf-8", "replace").decode()})
        try:
            self.tree.feed(event)
            self._order.feed(event)
        except (LookupError, TypeError, AttributeError):
            self.error, self.is_done = f"the endpoint sent an event that fits nothing: {event!r:.200}", True
        if event.kind == "token":
            self.num_tokens += 1
        elif event.kind == "fork" and event.num_paths:
            self.num_paths += event.num_paths
            self.num_open += event.num_paths - 1
        elif event.kind == "close":
            self.num_open -= 1
        elif event.kind == "reduce":
            self.num_open += 1


def follow(source: Source, question: Question, pace: float = 0) -> Iterator[Writing]:
    """Ask, and yield the answer several times a second until it has ended. If the loop ends early, it is cancelled."""
    events: queue.SimpleQueue[tuple[float, StreamEvent | Ended]] = queue.SimpleQueue()
    put: Put = events.put
    writing = Writing(question, pace)
    try:
        cancel = source.ask(question, put)
    except (CommandError, ValueError, TypeError) as err:
        writing.feed(Ended(one_line(err)))
        yield writing
        return
    try:
        while not writing.is_done:
            writing.read(events)
            yield writing
    finally:
        cancel()


# HTML. Text of a model is escaped here, and nowhere else becomes markup.


def draw_writing(writing: Writing | None, heading: str = "", note: str | None = None) -> str:
    """Return an answer as HTML: clock, branches side by side, and an error if there is one."""
    title = f"<h2>{html.escape(heading)}</h2>" if heading else ""
    if writing is None:
        return f'<section class="mv-side">{title}<p class="mv-clock"><b>0.00 s</b> waits</p></section>'
    parts = [title, f'<p class="mv-clock"><b>{writing.seconds:.2f} s</b> {_state(writing)}</p>']
    if note:
        parts.append(f'<p class="mv-note">{_text(note)}</p>')
    runs = _num_runs(writing.tree.root)
    most = max(LEAST_OF_RUN, min(MOST_OF_RUN, MOST_OF_FRAME // max(runs, 1)))
    parts.append(f'<div class="mv-flow">{_flow(writing.tree.root, most, 0)}</div>')
    if writing.error is not None:
        parts.append(f'<p class="mv-error" role="alert"><strong>Error:</strong> {_text(writing.error)}</p>')
    return f'<section class="mv-side">{"".join(parts)}</section>'


def _state(writing: Writing) -> str:
    if writing.is_done:
        shown = [f"{writing.num_tokens} tokens"]
        if "num_steps" in writing.counts:
            shown += [f"{writing.counts['num_steps']} steps", f"# parallel {writing.counts['parallelism']:.2f}"]
        if (reason := writing.counts.get("finish_reason")) not in (None, "stop"):
            shown.append(f"cut off by {html.escape(str(reason))}")
        return ("failed" if writing.error else "done") + ", " + ", ".join(shown)
    if not writing.has_begun:
        return "reads the problem, or waits for its turn"
    branches = "1 branch" if writing.num_open == 1 else f"{writing.num_open} branches"
    slow = f", shown slowed to {writing.pace:g} steps a second" if writing.pace else ""
    return f"{branches} writing, {writing.num_tokens} tokens{slow}"


def _num_runs(flow: Flow) -> int:
    return sum(sum(map(_num_runs, item.paths)) if isinstance(item, Columns) else 1 for item in flow.items)


def _flow(flow: Flow, most: int, color: int) -> str:
    parts, has_label = [], bool(flow.label)
    for item in flow.items:
        if isinstance(item, Columns):
            parts.append(_lanes(item, most, color))
        elif drawn := _run(item, most, has_label):
            parts.append(drawn)
            has_label = False
    return "".join(parts)


def _run(run: TextRun, most: int, has_label: bool) -> str:
    text = run.content.text
    if has_label:
        text = LABEL.sub("", text, count=1).lstrip(" ")
    text = text.strip("\n").rstrip()
    if not text.strip():
        return ""
    kind = {TextRole.OUTLINE: " mv-outline", TextRole.CONCLUSION: " mv-conclusion"}.get(run.part, "")
    return f'<p class="mv-run{kind}">{_text(text if len(text) <= most else f"…{text[-most:]}")}</p>'


def _lanes(block: Columns, most: int, color: int) -> str:
    lanes = []
    for number, path in enumerate(block.paths):
        tint = 1 + (color + number) % NUM_COLORS
        state = "mv-open" if path.is_open else "mv-closed"
        title = path.title if len(path.title) <= most else f"{path.title[:most]}…"
        heading = f'<h3><span class="mv-chip">{_text(path.label)}</span> {_text(title)}</h3>'
        body = _flow(path, most, color + number + 1)
        style = f"--tint: var(--mv-c{tint}); --leaves: {_leaves(path)}"
        lanes.append(f'<section class="mv-lane {state}" style="{style}">{heading}{body}</section>')
    return f'<div class="mv-lanes">{"".join(lanes)}</div>'


def _leaves(flow: Flow) -> int:
    """Return how many lanes stand side by side within a flow at most."""
    return max((sum(map(_leaves, item.paths)) for item in flow.items if isinstance(item, Columns)), default=1)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
