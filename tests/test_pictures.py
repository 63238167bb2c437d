"""The pictures of the documentation are what their script makes of a real answer."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/pictures"
DRAWINGS = sorted(PICTURES.glob("*.svg"))


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PICTURES))
        return runpy.run_path(str(PICTURES / "make.py"))


def test_the_script_makes_the_drawings_again_and_without_a_browser_keeps_the_photograph(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "viewer.png").write_bytes(b"as it was")
    monkeypatch.setattr(sys, "argv", ["make.py", "--output", str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))  # no Chromium here
    script["main"]()
    assert {path.name for path in DRAWINGS} == {"answer.svg", "branches.svg", "layout.svg"}
    for path in DRAWINGS:  # they hold texts and steps, and no number of the model's arithmetic
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "viewer.png").read_bytes() == b"as it was"
    assert "apt-get install chromium" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.name)
def test_a_drawing_is_small_and_complete_by_itself(path: Path) -> None:
    drawing = path.read_text(encoding="utf-8")
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}
    assert names <= {"svg", "title", "style", "g", "rect", "circle", "path", "text"}  # no script, image or link
    assert not re.search(r"url\(|@import|@font-face|href|\son\w+=", drawing)
    assert "prefers-color-scheme:dark" in drawing
    assert len(drawing.encode()) < 150_000


def test_the_animated_answer_shows_every_token_and_stands_still_for_who_wants_no_motion() -> None:
    drawing = (PICTURES / "answer.svg").read_text(encoding="utf-8")
    texts = [element.text for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    written = "".join(texts[texts.index("answer") + 1 :])
    for line in (
        "<Path>3:FollowchainC=5+6,onetermatatime,",
        "19-7+12:19-0-7=19-7=12",
        "C+10=54+1=55</Think>Answer:55",
    ):
        assert line in written
    assert texts[-1] == "# parallel 1.98 = 281 tokens / length 142"
    assert texts[-3:-1] == ["steps 133", "tokens 281"]
    assert "prefers-reduced-motion:reduce" in drawing
    used = set(re.findall(r"animation-name:([\w-]+)", drawing))
    assert used == set(re.findall(r"@keyframes ([\w-]+)", drawing))
    classes = {name for value in re.findall(r'class="([^"]*)"', drawing) for name in value.split()}
    assert used <= classes
