"""The app of ``multiverse app``: a problem is typed, and its branches are seen while they are written."""

import html
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.viewing.live import Writing, draw_writing, follow
from multiverse_hf.viewing.page import html_page, view_data
from multiverse_hf.viewing.results import ViewedResult
from multiverse_hf.viewing.sources import Question, Source
from multiverse_hf.viewing.trace import TraceBuilder

MAX_PROBLEM = 20_000  # characters
MAX_WAITING = 64  # visitors; others are told to come again
PARALLEL, AUTOREGRESSIVE = "In parallel", "One line after the other"
HOW_RACED = (
    "Both sides are the same model and the same problem. Each runs alone: the second begins when the first is done. "
    "Each clock counts its own side's seconds, this display included. Answers to other visitors slow either side."
)


@dataclass(frozen=True)
class App:
    """What the page calls.

    Args:
        source: gives the answers.
        builder: lays a finished answer out for the viewer.
        max_new_tokens: most that a visitor may ask for.
    """

    source: Source
    builder: TraceBuilder
    max_new_tokens: int

    def answer(self, problem: str, *options: Any) -> Iterator[tuple[str, str]]:
        """Yield the answer while it is written, and empty space below it; at the end, the viewer's page there."""
        try:
            question, pace = self._question(problem, *options)
        except CommandError as err:
            yield _failed(err), ""
            return
        note = self.source.note(question.problem)
        for writing in follow(self.source, question, pace):
            yield draw_writing(writing, note=note), ""
        yield draw_writing(writing, note=note), self._viewer([("answer", writing)])

    def race(self, problem: str, *options: Any) -> Iterator[tuple[str, str]]:
        """Yield both sides of a race while they run, one after the other; at the end, both in the viewer's page."""
        try:
            question, _ = self._question(problem, *options)
        except CommandError as err:
            yield _failed(err), ""
            return
        if question.structure == "off":  # the second side of the race
            question = replace(question, structure="guided")
        note, first, second = self.source.note(question.problem), None, None
        for first in follow(self.source, question):
            yield _raced(first, None, note), ""
        if first.error is None:
            for second in follow(self.source, replace(question, structure="off")):
                yield _raced(first, second, note), ""
            yield _raced(first, second, note), self._viewer([(PARALLEL, first), (AUTOREGRESSIVE, second)])

    def _question(
        self,
        problem: str,
        max_new_tokens: float | None,
        temperature: str,
        seed: str,
        structure: str,
        suffix: str,
        pace: float | None,
    ) -> tuple[Question, float]:
        """Return what a visitor asks, and the pace of the display.

        Raises:
            CommandError: if an option is out of range. The page's own fields keep to it; other clients may not.
        """
        problem = str(problem or "").encode("utf-8", "replace").decode().strip()
        if not problem:
            raise CommandError("there is no problem; type one, or take an example")
        if len(problem) > MAX_PROBLEM:
            raise CommandError(f"the problem has {len(problem)} characters, at most {MAX_PROBLEM} fit; shorten it")
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= self.max_new_tokens:
            raise CommandError(f"Most tokens must be from 1 to {self.max_new_tokens}, got {limit:g}")
        heat = _number(temperature, float)
        if heat is not None and not 0 <= heat <= 2:
            raise CommandError(
                f"Temperature must be from 0 to 2, got {temperature!r:.40}; leave it empty for the model's"
            )
        whole = _number(seed, int)
        if whole is not None and not 0 <= whole < 2**53:
            raise CommandError(
                f"Seed must be a whole number from 0, got {seed!r:.40}; leave it empty for a random one"
            )
        if pace is not None and not 0 <= pace <= 1000:
            raise CommandError(f"Slow motion must be from 0 to 1000 steps a second, got {pace:g}")
        return Question(problem, Suffix(suffix), structure, int(limit), heat, whole), pace or 0

    def _viewer(self, written: Sequence[tuple[str, Writing]]) -> str:
        """Return the viewer's page of finished answers, in a frame of its own without rights."""
        done = [(title, writing) for title, writing in written if writing.document.strip()]
        if not done:
            return ""
        traces = []
        for title, writing in done:
            problem = writing.question.suffix.end(writing.question.problem)
            facts = {"model": self.source.name, "seconds": round(writing.seconds, 3)}
            counts = writing.counts or {"num_tokens": writing.num_tokens}
            result = ViewedResult(
                self.source.name, title, writing.document, problem, (), "answer", facts, counts, writing.error
            )
            traces.append(self.builder.build(result))
        page = html_page(view_data(traces, "Answer" if len(traces) == 1 else "Race"))
        frame = (
            f'<iframe title="The answer in the viewer" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'
        )
        return f"<h2>Who wrote when</h2>{frame}"


def _number(text: str | None, kind: type[int] | type[float]) -> float | None:
    """Return the number in a field that may be empty; not a number where it holds anything else."""
    text = str(text or "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        return math.nan


def _failed(error: Exception) -> str:
    return f'<p class="mv-error" role="alert"><strong>Error:</strong> {html.escape(one_line(error))}</p>'


def _raced(first: Writing | None, second: Writing | None, note: str | None) -> str:
    sides = f'<div class="mv-race">{draw_writing(first, PARALLEL)}{draw_writing(second, AUTOREGRESSIVE)}</div>'
    notes = "".join(f'<p class="mv-note">{html.escape(each)}</p>' for each in (HOW_RACED, note) if each)
    return f"{notes}{sides}{_result(first, second)}"


def _result(first: Writing | None, second: Writing | None) -> str:
    """Return who was faster, once both sides are done."""
    if first is None or second is None or not second.is_done or first.error or second.error:
        return ""
    told = [
        f"{name}: {side.num_tokens} tokens in {side.seconds:.2f} s ({side.num_tokens / max(side.seconds, 1e-9):.0f} a "
        "second)."
        for name, side in ((PARALLEL, first), (AUTOREGRESSIVE, second))
    ]
    ratio = second.seconds / max(first.seconds, 1e-9)
    faster = f"In parallel it took {first.seconds / max(second.seconds, 1e-9):.0%} of the time ({ratio:.2f}x as fast)."
    return f'<p class="mv-result" role="status">{" ".join([*told, faster])}</p>'


def make_page(app: App, examples: Sequence[str], slow: float, num_visitors: int) -> Any:
    """Return the page as Gradio's blocks.

    Args:
        app: what it calls.
        examples: problems to take.
        slow: pace of the display at first, in steps a second; 0 for the model's own.
        num_visitors: answers written at once; other visitors wait.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, and later
    import gradio as gr

    limit, name = app.max_new_tokens, html.escape(app.source.name)
    with gr.Blocks(title="Multiverse", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>Watch a model think in parallel</h1><p>Type a problem. The model splits its answer into branches, "
            f"writes them at the same time, and merges them. Model: <b>{name}</b></p>"
        )
        problem = gr.Textbox(label="Problem", lines=2, max_length=MAX_PROBLEM, value=examples[0] if examples else "")
        with gr.Row():
            start = gr.Button("Answer", variant="primary", min_width=120)
            race = gr.Button("Race", min_width=120)
            stop = gr.Button("Stop", min_width=120)
        if examples:
            gr.Examples([[each] for each in examples], problem, label="Examples")
        with gr.Accordion("Options", open=False):
            with gr.Row():
                tokens = gr.Number(
                    limit, label="Most tokens", info="along the longest path", precision=0, minimum=1, maximum=limit
                )
                # text, since a field of numbers shows 0 where it is empty
                temperature = gr.Textbox(label="Temperature", info="0: greedy; empty: the model's own", max_length=20)
                seed = gr.Textbox(label="Seed", info="empty: a random one", max_length=20)
            with gr.Row():
                structure = gr.Dropdown(
                    ["guided", "lenient", "off"], value="guided", label="Structure", info="off: no branches"
                )
                suffix = gr.Dropdown(
                    [each.value for each in Suffix], value="parallel", label="Sentence at the prompt's end",
                    info="asks for a form of answer",
                )  # fmt: skip
                pace = gr.Number(slow, label="Slow motion", info="most steps a second shown; 0: the model's own speed")
        said = gr.HTML(elem_classes="mv-board")
        board = gr.HTML(elem_classes="mv-board")
        viewer = gr.HTML(elem_classes=["mv-board", "mv-viewer-box"])
        if os.environ.get("SPACE_ID"):
            gr.DuplicateButton("Duplicate this Space")
        inputs = [problem, tokens, temperature, seed, structure, suffix, pace]
        same: dict[str, Any] = {"inputs": inputs, "outputs": [board, viewer], "show_progress": "minimal"}
        same |= {"api_visibility": "private", "trigger_mode": "once"}
        gr.on([problem.submit, start.click, race.click], lambda: "", outputs=said, api_visibility="private")
        running = gr.on([problem.submit, start.click], app.answer, concurrency_limit=num_visitors, **same)
        # races wait for each other, so that none slows another
        racing = race.click(app.race, concurrency_limit=1, **same)
        stop.click(
            lambda: '<p class="mv-note" role="status">Stopped. The answer below is not complete.</p>',
            outputs=said, cancels=[running, racing], api_visibility="private",
        )  # fmt: skip
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def open_page(page: Any, host: str, port: int) -> None:
    """Serve the page from threads of this process. Nothing but its address is asked for, also by a browser.

    Raises:
        CommandError: if the address is taken, or there is none.
    """
    import gradio as gr

    css = (resources.files("multiverse_hf.viewing") / "page" / "app.css").read_text(encoding="utf-8")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts).set(  # the default's contrast is too low to read for some people
        block_info_text_color="#4b5563", block_info_text_color_dark="#d1d5db",
        block_title_text_color="#374151", block_title_text_color_dark="#e5e7eb",
        block_label_text_color="#374151", block_label_text_color_dark="#e5e7eb",
        button_primary_background_fill="#0b5cad", button_primary_background_fill_dark="#0b5cad",
        button_primary_background_fill_hover="#094a8c", button_primary_background_fill_hover_dark="#094a8c",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
    )  # fmt: skip
    try:
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            ssr_mode=False, pwa=False, mcp_server=False, run_history=False, enable_monitoring=False, footer_links=[],
            max_file_size=1, theme=theme, css=css,
        )  # fmt: skip
    except OSError as err:
        raise CommandError(f"cannot listen on {host}:{port}: {one_line(err, 100)}; choose another --port", 1) from err
