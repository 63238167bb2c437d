"""Display of an answer while it grows: its branches side by side in a terminal, or plain text.

Both displays are streamers for ``model.generate``. The live view draws the answer's tree as lines: text over the full
width, and a block as columns, one per path.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from multiverse_hf.modeling.tags import LABEL
from multiverse_hf.viewing.branches import BranchTree, Columns, Decode, Flow, Pace, Roles, TextRole, TextRun, TokenText

if TYPE_CHECKING:  # they import torch, which only a running model needs
    from multiverse_hf.modeling.state import BranchEvent
    from multiverse_hf.serving.events import StreamEvent

MIN_COLUMN = 24  # characters; in narrower columns, text breaks at every second word
FRAMES_PER_SECOND = 12
# All controls except newline and tab: a model's text may hold escape codes, which must not reach the terminal.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TextStream:
    """Streamer that writes an answer as plain text in document order, with a newline at the end.

    A terminal gets no control codes.
    """

    def __init__(self, file: TextIO, decode: Decode) -> None:
        self.file, self.text, self.num_written, self.is_prompt = file, TokenText(decode), 0, True

    def put(self, value: Any) -> None:
        """Write ids. The first call has the prompt's, which are not written."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            self.text.add(token)
        self._write(self.text.text)

    def end(self) -> None:
        """Write the rest."""
        self._write(self.text.full_text + "\n")

    def _write(self, text: str) -> None:
        if len(text) > self.num_written:
            self.file.write(printable(text[self.num_written :], self.file))
            self.file.flush()
            self.num_written = len(text)


def printable(text: str, file: TextIO) -> str:
    """Return text for a file, for a terminal without control codes."""
    return CONTROLS.sub("", text) if file.isatty() else text


def share(needs: Sequence[int], total: int) -> list[int]:
    """Return each row's part of ``total`` lines, distributed one by one to rows that need more."""
    given = [0] * len(needs)
    while total > 0 and given != list(needs):
        for row, need in enumerate(needs):
            if given[row] < need and total > 0:
                given[row] += 1
                total -= 1
    return given


@dataclass(frozen=True, slots=True)
class Painter:
    """Draws flows as lines.

    Args:
        console: wraps text by the width of its characters.
        ascii_only: use no box-drawing characters.
    """

    console: Console
    ascii_only: bool = False

    def flow(self, flow: Flow, width: int, height: int | None = None, begin: int = 0) -> list[Text]:
        """Return the lines of a flow.

        Args:
            flow: the answer or a path.
            width: characters per line.
            height: most lines; the newest are kept. None for all.
            begin: index of the first item to draw.
        """
        lines: list[Text] = []
        for index in reversed(range(begin, len(flow.items))):
            room = None if height is None else height - len(lines)
            if room == 0:
                break
            item = flow.items[index]
            if isinstance(item, Columns):
                lines = self.columns(item, width, room) + lines
            else:
                lines = self.run(item, width, room, has_label=index == self._first_text(flow)) + lines
        return lines

    @staticmethod
    def _first_text(flow: Flow) -> int | None:
        """Return the index of a path's first item with text, which begins with the path's label."""
        runs = (
            index
            for index, item in enumerate(flow.items)
            if flow.label and isinstance(item, TextRun) and item.content.text.strip()
        )
        return next(runs, None)

    def run(self, run: TextRun, width: int, height: int | None = None, has_label: bool = False) -> list[Text]:
        """Return the lines of a run of text, without blank lines around it."""
        text = run.content.text
        if has_label:
            text = LABEL.sub("", text, count=1).lstrip(" ")
        text = CONTROLS.sub("", text).expandtabs(4).strip("\n").rstrip()
        if not text.strip():
            return []
        source = text.split("\n")
        if height is not None:
            source = source[-height:]
        mark, style = {
            TextRole.TEXT: ("", ""),
            TextRole.OUTLINE: ("* " if self.ascii_only else "· ", "dim"),
            TextRole.CONCLUSION: ("=> " if self.ascii_only else "⇒ ", "italic"),
        }[run.part]
        lines = [
            Text(mark if number == 0 else " " * len(mark), style) + piece
            for number, piece in enumerate(
                piece
                for line in source
                for piece in Text(line.rstrip(), style).wrap(self.console, max(width - len(mark), 1)) or [Text("")]
            )
        ]
        return lines if height is None else lines[-height:]

    def columns(self, block: Columns, width: int, height: int | None = None) -> list[Text]:
        """Return the lines of a block: its paths in columns, in several rows if one row is too narrow."""
        gutter = " | " if self.ascii_only else " │ "
        num_paths = len(block.paths)
        num_rows = -(-num_paths // max((width + len(gutter)) // (MIN_COLUMN + len(gutter)), 1))
        num_columns = -(-num_paths // num_rows)
        column = (width - len(gutter) * (num_columns - 1)) // num_columns
        rows = [block.paths[at : at + num_columns] for at in range(0, num_paths, num_columns)]
        budgets: list[int | None] = [None] * len(rows)
        if height is not None:
            needs = [max(len(self.path(path, column, height)) for path in row) for row in rows]
            budgets = list(share(needs, height))
        lines = []
        for row, budget in zip(rows, budgets, strict=True):
            if budget == 0:
                continue
            cells = [self.path(path, column, budget) for path in row]
            for number in range(max(map(len, cells))):
                line = Text()
                for place, cell in enumerate(cells):
                    piece = cell[number].copy() if number < len(cell) else Text()
                    piece.truncate(column, pad=True)
                    line.append(gutter if place else "", "dim")
                    line.append_text(piece)
                line.rstrip()
                lines.append(line)
        return lines

    def path(self, path: Flow, width: int, height: int | None = None) -> list[Text]:
        """Return the lines of a path: a heading with its label, and its text below."""
        holds_block = any(isinstance(item, Columns) for item in path.items)
        rule, done = ("=" if holds_block else "-", "done") if self.ascii_only else ("━" if holds_block else "─", "✓")
        heading = Text(f"{rule} {path.label}", "bold cyan" if path.is_open else "bold green")
        heading.append(f" {CONTROLS.sub('', path.title)}" if path.title else "", "not bold")
        mark = "" if path.is_open else f" {done}"
        heading.truncate(width - len(mark), overflow="crop" if self.ascii_only else "ellipsis")
        heading.append(mark)
        if (space := width - heading.cell_len) > 1:
            heading.append(" " + rule * (space - 1), "dim not bold")
        return [heading, *(self.flow(path, width, None if height is None else height - 1) if height != 1 else [])]


class LiveView:
    """Streamer that shows the branches of one answer side by side in a terminal.

    Final text, before a block and after its merge, is printed and scrolls. Unfinished text is redrawn below it: the
    newest lines of every branch. Use it as a context manager, which restores the terminal.

    Args:
        console: the terminal.
        decode, roles: as for :class:`BranchTree`.
        pace: most steps per second, so that people can read; None for the model's own speed.
    """

    def __init__(self, console: Console, decode: Decode, roles: Roles, pace: float | None = None) -> None:
        self.console, self.pace = console, None if pace is None else Pace(pace)
        self.tree = BranchTree(decode, roles)
        self.painter = Painter(console, console.options.ascii_only)
        self.num_printed = 0  # items of the answer that were printed
        self._lock = threading.Lock()  # the live display draws in another thread
        self._live = Live(self, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True)

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._print_settled(len(self.tree.root.items))
        self._live.stop()

    def on_event(self, event: "BranchEvent | StreamEvent") -> None:
        """Handle an event of the generation."""
        if self.pace is not None and event.sampled:
            self.pace.keep(event.branch)
        with self._lock:
            self.tree.feed(event)
        if event.branch == "" and event.kind == "fork":
            self._print_settled(len(self.tree.root.items) - 1)
        elif event.branch == "" and event.kind == "reduce":
            self._print_settled(len(self.tree.root.items))

    def _print_settled(self, end: int) -> None:
        """Print the answer's items up to ``end``, which are final."""
        with self._lock:  # released before printing: the display's thread takes the two locks in the other order
            lines: list[Text] = []
            settled = Flow(items=self.tree.root.items[self.num_printed : end])
            lines = self.painter.flow(settled, self.console.width)
            self.num_printed = max(self.num_printed, end)
        if lines:
            self.console.print(Text("\n").join(lines), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            # one line less than the terminal has: the cursor is below, and a full screen would scroll
            lines = self.painter.flow(self.tree.root, options.max_width, options.size.height - 1, self.num_printed)
        yield Text("\n").join(lines)
