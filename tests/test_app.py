"""``multiverse app`` in a real browser: branches grow side by side, a race ends, and text stays text."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM
from endpoint import serving

from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.cli import run
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.serving.client import BranchClient
from multiverse_hf.serving.events import StreamEvent, StreamEvents
from multiverse_hf.viewing.live import Writing, draw_writing
from multiverse_hf.viewing.page import html_page, view_data
from multiverse_hf.viewing.results import ViewedResult
from multiverse_hf.viewing.sources import EndpointSource, LocalSource, Question
from multiverse_hf.viewing.trace import TraceBuilder

FLAT = "A=19-7+12; B=8+15-3; C=5+6; total?"
NESTED = "(A=5+6; B=7+8) (C=9-2; D=4+4) total?"
HOSTILE = "<script>document.title='hacked'</script></style><img src=x onerror=\"document.title='hacked'\">"
HOSTILE += "${document.title='hacked'}{{value}}\u202e\x1b[31m\x00"
PATIENCE = 120_000  # milliseconds


def written(*events: StreamEvent) -> Writing:
    writing = Writing(Question("x", Suffix.NONE, "guided", 10))
    for event in events:
        writing.feed(event)
    return writing


def tokens(branch: str, *texts: str) -> list[StreamEvent]:
    return [StreamEvent(kind="token", branch=branch, text=text, sampled=True) for text in texts]


def forked(*texts: str) -> list[StreamEvent]:
    """Return the events of a block whose paths have these texts and titles."""
    goal = [each for text in texts for each in ("<Outline>", text, "</Outline>")]
    events = [*tokens("", "<Parallel>", "<Goal>", *goal, "</Goal>")]
    events.append(StreamEvent(kind="fork", branch="", num_paths=len(texts)))
    for number, text in enumerate(texts, start=1):
        events += tokens(str(number), "<Path>", text)
    return events


def test_text_of_a_model_is_no_markup_and_a_frame_stays_small() -> None:
    drawn = draw_writing(written(*forked(HOSTILE, "x" * 1_000_000, "\ud800")), HOSTILE, HOSTILE)
    assert not re.search(r"<(script|img|/style)", drawn)
    assert re.findall(r"<(\w+)[ >]", drawn).count("section") == 4  # the answer, and three lanes
    assert len(drawn) < 20_000
    drawn.encode()


def test_an_event_that_fits_nothing_is_an_error_of_the_answer() -> None:
    writing = written(StreamEvent(kind="token", branch="7", text="x"))
    assert writing.is_done
    assert 'role="alert"' in draw_writing(writing)


@pytest.mark.slow  # imports Gradio
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "nothing"], ["'nothing'", "http://"]),
        (["--model-name", "x"], ["--model-name", "--url"]),
        (["--url", "http://a", "--device", "cpu"], ["--device", "--url"]),
    ],
)
def test_bad_usage_is_told_in_a_line(
    arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="the extra app is missing")
    assert run(["app", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make system installs it")
    pytest.importorskip("gradio", reason="the extra app is missing")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make venv installs it")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def local() -> Iterator[LocalSource]:
    checkpoint = open_checkpoint(None)
    model = load_model(checkpoint, Dtype.FLOAT32, Attention.SDPA, "cpu", None)
    with MultiverseEngine(model, checkpoint.tokenizer, max_num_seqs=4) as engine:
        yield LocalSource(engine, checkpoint)


@contextlib.contextmanager
def app_of(source: Any, examples: Sequence[str] = (FLAT, NESTED)) -> Iterator[str]:
    from multiverse_hf.cli.app import _free_port
    from multiverse_hf.viewing.app import App, make_page, open_page

    checkpoint = open_checkpoint(None)
    builder = TraceBuilder(checkpoint.tokenizer, checkpoint.tags, "multiverse-tiny")
    page, port = make_page(App(source, builder, 1024), examples, slow=12, num_visitors=4), _free_port("127.0.0.1")
    open_page(page, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def url(browser: Any, local: LocalSource) -> Iterator[str]:
    with app_of(local) as address:
        yield address


@contextlib.contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """Yield the app's page, which has to ask nothing of another address."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.get_by_label("Problem").wait_for()
    page.wait_for_function("window.gradio_config && document.querySelector('textarea').value !== ''")
    yield page
    page.close()
    assert all(re.match(r"http://127\.0\.0\.1[:/]|data:|blob:|about:", each) for each in asked), asked
    assert errors == []


def ask(page: Any, problem: str, button: str = "Answer") -> None:
    page.get_by_label("Problem").fill(problem)
    page.get_by_role("button", name=button, exact=True).click()


def lanes(page: Any) -> list[int]:
    return [len(text) for text in page.locator(".mv-lane").all_inner_texts()]


def find_faults(page: Any) -> dict[str, list[str]]:
    """Return serious faults that axe-core finds, by rule, with the elements."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="make venv installs it")
    found = axe.Axe().run(page).response["violations"]
    return {
        each["id"]: [node["html"][:200] for node in each["nodes"]]
        for each in found
        if each["impact"] in ("serious", "critical")
    }


@pytest.mark.slow
def test_branches_grow_at_the_same_time_and_the_answer_opens_in_the_viewer(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        ask(page, NESTED)
        page.locator(".mv-lane .mv-lane").nth(3).wait_for()  # nested: two of two
        first = lanes(page)
        page.wait_for_function(
            "before => [...document.querySelectorAll('.mv-lane .mv-lane')].filter((e, at) => "
            "e.innerText.length > before[at]).length > 1",
            arg=[len(text) for text in page.locator(".mv-lane .mv-lane").all_inner_texts()],
        )
        assert sum(late > early for early, late in zip(first, lanes(page), strict=False)) >= 2
        viewer = page.frame_locator("iframe")
        viewer.locator("html[data-ready=yes]").wait_for(state="attached")
        assert viewer.locator(".lane .chip").all_text_contents() == ["1", "1.1", "1.2", "2", "2.1", "2.2"]
        assert page.locator("iframe").get_attribute("sandbox") == "allow-scripts"
        assert "done" in page.locator(".mv-clock").inner_text()


@pytest.mark.slow
def test_a_race_runs_both_sides_to_their_end(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        ask(page, FLAT, "Race")
        told = page.locator(".mv-result").inner_text()
        counts = re.findall(r"(\d+) tokens in ([\d.]+) s", told)
        assert len(counts) == 2
        assert all(float(seconds) > 0 for _, seconds in counts)
        states = page.locator(".mv-clock").all_inner_texts()
        steps = [int(re.search(r"(\d+) steps", state)[1]) for state in states]
        assert steps[0] < steps[1]  # both really ran
        page.frame_locator("iframe").locator(".result").nth(1).wait_for()


@pytest.fixture
def slow_engine() -> Iterator[MultiverseEngine]:
    """An engine whose answers take so long that only cancelling ends them during a test."""
    checkpoint = open_checkpoint(None)
    model = load_model(checkpoint, Dtype.FLOAT32, Attention.SDPA, "cpu", None)
    with MultiverseEngine(model, checkpoint.tokenizer, max_num_seqs=4) as engine:
        engine._engine.on_step = lambda: time.sleep(0.2)
        yield engine


def until_idle(engine: MultiverseEngine) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while engine.memory()["num_running"] + engine.memory()["num_waiting"]:
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("button", ["Answer", "Race"])
@pytest.mark.parametrize("way", ["stops", "leaves"])
def test_a_visitor_who_stops_or_leaves_cancels_the_answer(
    browser: Any, slow_engine: MultiverseEngine, button: str, way: str
) -> None:
    with app_of(LocalSource(slow_engine, open_checkpoint(None))) as address, visit(browser, address) as page:
        ask(page, FLAT, button)
        page.locator(".mv-lane").first.wait_for()
        before = slow_engine.memory()["num_steps"]
        assert slow_engine.memory()["num_running"] == 1
        if way == "stops":
            page.get_by_role("button", name="Stop", exact=True).click()
            page.get_by_text("Stopped. The answer below is not complete.").wait_for()
        else:
            page.goto("about:blank")
        until_idle(slow_engine)
        assert slow_engine.memory()["num_steps"] < before + 40  # the answer takes more than a hundred


@pytest.mark.slow
def test_several_visitors_are_answered_at_once(browser: Any, slow_engine: MultiverseEngine) -> None:
    slow_engine._engine.on_step = lambda: time.sleep(0.05)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(app_of(LocalSource(slow_engine, open_checkpoint(None))))
        pages = [stack.enter_context(visit(browser, address)) for _ in range(3)]
        for page in pages:
            ask(page, FLAT)
        running = 0
        while running < 3:
            running = max(running, slow_engine.memory()["num_running"])
            pages[0].wait_for_timeout(50)
        for page in pages:
            page.frame_locator("iframe").locator(".lane").nth(2).wait_for()


@pytest.mark.slow
def test_empty_fields_are_the_models_own_and_bad_ones_are_told(browser: Any, url: str) -> None:
    with visit(browser, url) as page:
        page.get_by_role("button", name="Options").click()
        assert page.get_by_label("Temperature").input_value() == ""
        assert page.get_by_label("Seed").input_value() == ""
        for label, text in (("Temperature", "hot"), ("Temperature", "3"), ("Seed", "1.5"), ("Seed", "-1")):
            page.get_by_label(label).fill(text)
            ask(page, FLAT)
            page.get_by_role("alert").filter(has_text=f"{label} must be").filter(has_text=text).wait_for()
            page.get_by_label(label).fill("")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 800, 1600])
def test_an_error_is_shown_at_any_width_and_axe_finds_no_serious_fault(
    browser: Any, url: str, width: int, dark: bool
) -> None:
    size = {"width": width, "height": 900}
    with visit(browser, url, viewport=size, color_scheme="dark" if dark else "light") as page:
        page.get_by_role("button", name="Options").click()
        page.get_by_label("Slow motion").fill("0")
        ask(page, "A=1+1; " * 1000 + "total?")
        assert "shorten the prompt" in page.get_by_role("alert").inner_text()
        ask(page, FLAT)
        page.frame_locator("iframe").locator(".lane").first.wait_for()
        assert page.get_by_role("alert").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if pictures := os.environ.get("MULTIVERSE_PICTURES"):
            page.screenshot(path=f"{pictures}/app-{width}-{'dark' if dark else 'light'}.png", full_page=True)
        page.wait_for_function("!document.querySelector('.pending')")
        assert find_faults(page) == {}


@pytest.mark.slow
def test_an_endpoint_answers_as_a_model_does(browser: Any) -> None:
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(serving())
        address = stack.enter_context(app_of(EndpointSource(BranchClient(f"{served.url}/v1"), served.url)))
        page = stack.enter_context(visit(browser, address))
        ask(page, FLAT)
        viewer = page.frame_locator("iframe")
        viewer.locator(".lane").nth(2).wait_for()
        assert viewer.locator(".lane .chip").all_text_contents() == ["1", "2", "3"]
        ask(page, FLAT, "Race")
        page.locator(".mv-result").wait_for()


class Hostile(BaseHTTPRequestHandler):
    """An endpoint whose model writes markup, and which then fails."""

    def log_message(self, *_: Any) -> None:
        """Write no log."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        told = StreamEvents(choice=0, events=forked(HOSTILE, "y" * 1_000_000)).model_dump_json()
        self.wfile.write(b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],')
        self.wfile.write(f'"multiverse":{told}}}\n\n'.encode())
        self.wfile.write(b'data: {"error":{"message":"the model broke <b>down</b>"}}\n\n')


@pytest.mark.slow
def test_text_of_a_hostile_endpoint_does_nothing_and_its_error_is_told(browser: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/v1"
    with contextlib.ExitStack() as stack:
        stack.callback(server.shutdown)
        source = EndpointSource(BranchClient(base, model="m", max_retries=0), base)
        address = stack.enter_context(app_of(source))
        page = stack.enter_context(visit(browser, address, viewport={"width": 800, "height": 900}))
        ask(page, "Why?")
        assert "the model broke <b>down</b>" in page.get_by_role("alert").inner_text()
        page.frame_locator("iframe").locator(".result").wait_for()
        assert page.title() == "Multiverse"
        assert page.locator(".mv-board :is(img, script, style)").count() == 0
        assert "{{value}}" in page.locator(".mv-lane").first.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 800


@pytest.mark.slow
def test_a_space_starts_from_its_folder_alone(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra app is missing")
    folder = tmp_path / "space"
    assert run(["app", "--space", str(folder), "--example", FLAT, "--max-new-tokens", "77"]) == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "app.py", "requirements.txt", "multiverse_hf"}
    header = (folder / "README.md").read_text().split("---")[1]
    assert re.search(r"sdk: gradio\nsdk_version: \d+\.\d+\.\d+\n", header)
    needed = (folder / "requirements.txt").read_text()
    assert all(f"\n{name}==" in needed for name in ("torch", "transformers", "gradio", "openai"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": "0", "SPACE_ID": "me/space", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        address = re.search(r"ready: (http://127\.0\.0\.1:\d+)", line)
        assert address, line + process.stderr.read()
        import httpx

        shown = httpx.get(address[1], trust_env=False).text
        assert "Duplicate this Space" in shown
        assert FLAT in shown
    finally:
        process.kill()
        process.wait(20)
        process.stderr.close()


@pytest.mark.slow
def test_axe_finds_no_serious_fault_in_the_viewer(browser: Any, tmp_path: Path) -> None:
    from test_view import NESTED as DOCUMENT
    from test_view import builder

    traces = [builder().build(ViewedResult("a", name, DOCUMENT, "Why?", key="k")) for name in ("first", "second")]
    (tmp_path / "page.html").write_text(html_page(view_data(traces, "one")), encoding="utf-8")
    for dark, width in itertools.product(("light", "dark"), (320, 800, 1600)):
        page = browser.new_page(color_scheme=dark, viewport={"width": width, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        page.locator("html[data-ready=yes]").wait_for(state="attached")
        assert find_faults(page) == {}
        page.close()
