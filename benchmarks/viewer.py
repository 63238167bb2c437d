"""How long the viewer's page takes to open, to scroll and to search, in Chromium: 40,000 tokens in 300 branches.

A long task is one in which the page's thread answers nothing for over 50 ms, as the browser itself reports it.

    python benchmarks/viewer.py --output benchmarks/results/viewer_cpu.json
    python benchmarks/viewer.py --blocks 20 --repeats 1
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from report import count, environment, finish, make_parser, show_environment

from multiverse_hf.checkpoints import open_checkpoint
from multiverse_hf.viewing.page import html_page, view_data
from multiverse_hf.viewing.results import ViewedResult
from multiverse_hf.viewing.trace import TraceBuilder

GOAL_OPEN_S, GOAL_TASK_MS = 2.0, 200
PATHS = 30  # of each block
OBSERVE = "window.tasks = []; new PerformanceObserver(list => list.getEntries().forEach(each => tasks.push("
OBSERVE += "[each.startTime, each.duration]))).observe({type: 'longtask', buffered: true})"
# Returns when the page is drawn after what was done.
SETTLE = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))"


def make_document(blocks: int) -> str:
    """Return a document of blocks one after the other, each of 30 paths."""
    parts = []
    for block in range(blocks):
        numbers = range(1, PATHS + 1)
        goal = "".join(f"<Outline>\n{number}: part {number}\n</Outline>\n" for number in numbers)
        texts = {number: f"{number}: {'some words of a long path ' * 6}" for number in numbers}
        body = "".join(f"<Path>\n{text}\n</Path>\n" for text in texts.values())
        parts.append(
            f"Look {block}.\n<Parallel>\n<Goal>\n{goal}</Goal>\n{body}<Conclusion>\ndone\n</Conclusion>\n</Parallel>\n"
        )
    return "".join(parts)


def measure(browser: Browser, url: str) -> dict[str, float]:
    """Open, scroll and search once. Return seconds, and the longest task of each in milliseconds."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(300_000)
    page.add_init_script(OBSERVE)
    found: dict[str, float] = {}
    marks = [("open", 0.0)]

    def mark(name: str) -> None:
        marks.append((name, page.evaluate("performance.now()")))

    begin = time.perf_counter()
    page.goto(url)
    page.locator("html[data-ready=yes]").wait_for(state="attached")
    page.evaluate(SETTLE)
    found["open_s"] = time.perf_counter() - begin
    mark("scroll")
    begin = time.perf_counter()
    page.mouse.move(700, 700)
    for _ in range(60):
        page.mouse.wheel(0, 900)
        page.evaluate(SETTLE)
    page.keyboard.press("End")
    page.evaluate(SETTLE)
    found["scroll_s"] = time.perf_counter() - begin
    mark("search")
    begin = time.perf_counter()
    page.keyboard.press("/")
    page.keyboard.type("long path")
    page.locator("#hits:not(:empty)").wait_for()
    page.evaluate(SETTLE)
    for _ in range(5):
        page.keyboard.press("Enter")
        page.evaluate(SETTLE)
    found["search_s"] = time.perf_counter() - begin
    page.wait_for_timeout(200)  # the browser reports a task after it
    tasks = page.evaluate("tasks")
    ends = [at for _, at in marks[1:]] + [float("inf")]
    for (name, start), end in zip(marks, ends, strict=True):
        found[f"{name}_longest_task_ms"] = max((took for at, took in tasks if start <= at < end), default=0.0)
    page.close()
    return found


def main() -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--blocks", type=count, default=10, help="of 30 paths (default: %(default)s)")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        parser.error("no Chromium here; make system installs it")
    checkpoint = open_checkpoint(None)
    builder = TraceBuilder(checkpoint.tokenizer, checkpoint.tags, "multiverse-tiny")
    begin = time.perf_counter()
    trace = builder.build(ViewedResult("here", "one", make_document(args.blocks)))
    page = html_page(view_data([trace], "one"))
    result: dict[str, Any] = {"benchmark": "viewer", **environment()}
    result |= {name: trace["stats"][name] for name in ("num_tokens", "num_paths")}
    result |= {"make_s": time.perf_counter() - begin, "page_bytes": len(page.encode())}
    show_environment(result)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        result["browser"] = browser.version
        runs = [measure(browser, path.as_uri()) for _ in range(args.repeats)]
        browser.close()
    for name in runs[0]:
        values = [run[name] for run in runs]
        result[name] = {"median": statistics.median(values), "worst": max(values), "values": values}
        print(f"{name:24} median {result[name]['median']:8.2f}  worst {result[name]['worst']:8.2f}")
    longest = max(result[f"{name}_longest_task_ms"]["median"] for name in ("scroll", "search"))
    result["goals_met"] = result["open_s"]["median"] < GOAL_OPEN_S and longest < GOAL_TASK_MS
    print(f"opens within {GOAL_OPEN_S:g} s, no task over {GOAL_TASK_MS} ms: {'yes' if result['goals_met'] else 'no'}")
    finish(result, args.output)


if __name__ == "__main__":
    main()
