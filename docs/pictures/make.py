"""Make the pictures of the documentation from one real answer of the embedded model.

python docs/pictures/make.py          # the pictures of the viewer and of the app need Chromium

answer.svg is the answer, animated; branches.svg and layout.svg are still drawings; viewer.png is the page that
`multiverse view` makes of the answer; app.png is the page of `multiverse app` while it answers.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from animation import draw_answer
from recording import QUESTION, Recording, record
from stills import draw_branches, draw_layout

from multiverse_hf.viewing.page import html_page, view_data

WINDOW = "1100,870"  # all of the page


def draw() -> tuple[Recording, dict[str, str]]:
    """Return the answer, and the drawings by the names of their files."""
    recording = record()
    drawings = {"answer.svg": draw_answer(recording), "branches.svg": draw_branches(recording)}
    return recording, drawings | {"layout.svg": draw_layout()}


def photograph(recording: Recording, path: Path) -> bool:
    """Write a picture of the viewer's page. Return False, and leave the file as it is, if there is no Chromium."""
    browser = find_browser()
    if browser is None:
        return False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "answer.html"
        page.write_text(html_page(view_data([recording.trace], "answer.json")), encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--hide-scrollbars", "--force-device-scale-factor=1", f"--user-data-dir={folder}/profile"]
        options += [f"--window-size={WINDOW}", f"--screenshot={path.resolve()}", page.as_uri()]
        subprocess.run([browser, *options], check=True, capture_output=True, timeout=300)
    return True


def find_browser() -> str | None:
    """Return the path of Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def photograph_app(path: Path) -> bool:
    """Write a picture of the app while it answers. Return False, and leave the file as it is, without a browser."""
    browser = find_browser()
    if browser is None:
        return False
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "multiverse_hf.cli", "app", "--port", "0", "--example", QUESTION]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, sync_playwright() as driver:
        try:
            address = re.search(r"http://\S+", process.stderr.readline())[0]
            opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = opened.new_page(viewport={"width": 1000, "height": 760})
            page.set_default_timeout(120_000)
            page.goto(address)
            page.get_by_label("Problem").fill(QUESTION)
            page.get_by_role("button", name="Answer", exact=True).click()
            page.get_by_text("Follow chain").nth(2).wait_for()
            page.wait_for_timeout(1500)
            page.screenshot(path=path)
            opened.close()
        finally:
            process.terminate()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder; by default this one")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    recording, drawings = draw()
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing, encoding="utf-8")
        print(folder / name)
    for still, made in (
        (folder / "app.png", photograph_app(folder / "app.png")),
        (folder / "viewer.png", photograph(recording, folder / "viewer.png")),
    ):
        print(
            still if made else f"{still} is not made anew: no Chromium was found; apt-get install chromium brings it"
        )


if __name__ == "__main__":
    main()
