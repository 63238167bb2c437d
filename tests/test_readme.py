"""What the README and the pages beside it show is run as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def test_the_python_snippets_run_as_pasted_one_after_the_other() -> None:
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(first.strip().splitlines()) <= 10
    end = "print('-' * 8)\n"
    done = subprocess.run([sys.executable, "-c", first + end + second], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    generated, served = done.stdout.split("-" * 8)
    assert "<Parallel>" in generated
    assert "Answer: 55" in generated
    assert float(re.findall(r"[\d.]+", generated)[-1]) > 1
    assert "\nfork" in served
    assert "Answer: 55" in served


def run_in(folder: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run commands of the README in a folder, where ``multiverse`` is this one."""
    (folder / "multiverse").write_text(f'#!/bin/sh\nexec {sys.executable} -m multiverse_hf.cli "$@"\n')
    (folder / "multiverse").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | {"PYTHONPATH": f"{ROOT}/src"}
    command = ["bash", "-ec", commands]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_the_commands_for_many_prompts_run_as_pasted(tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="needs multiverse_hf[batch]")
    answer, submit = (
        text
        for page in ("README.md", "docs/batch.md")
        for text in re.findall(r"```bash\n(.*?)```", PAGES[ROOT / page], re.DOTALL)
        if "generate --input" in text
    )
    done = run_in(tmp_path, answer + submit)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in rows] == [("a", "44"), ("b", "26")]
    assert rows[1]["level"] == 1
    assert "#SBATCH --array=0-63" in done.stdout


@pytest.mark.slow
def test_the_commands_of_evaluation_run_as_pasted(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs multiverse_hf[eval]")
    (block,) = (text for text in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "multiverse compare" in text)
    install, commands = block[: block.index("multiverse eval")], block[block.index("multiverse eval") :]
    assert [line.split()[0] for line in install.splitlines()] == ["pip", "pip"]
    done = run_in(tmp_path, commands)
    assert done.stdout.count("mv:chains") == 3
    comparison = json.loads((tmp_path / "runs/comparison/comparison.json").read_text())
    assert comparison["tasks"]["mv:chains"]["problems"] == 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_a_page_names_is_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if not link.startswith("http")]
    programs = re.findall(r"`(?:python|accelerate launch) ([\w/.-]+\.py)", PAGES[page])
    assert links or page.name != "README.md"
    for path in (*(page.parent / link for link in links), *(ROOT / program for program in programs)):
        assert path.exists(), path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("newest", ["python3.12", "python3.13", None])
def test_make_takes_the_first_python_that_runs_and_is_new_enough(tmp_path: Path, newest: str | None) -> None:
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        command = f'exec {sys.executable} "$@"' if name == newest else "exit 1"
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    # -n: says what it would run. Without it only where it fails before it installs.
    command = ["make", *(["-n"] if newest else []), "venv", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    if newest:
        assert f"{newest} -m venv" in done.stdout, done.stderr
    else:
        assert done.returncode != 0
        assert "needs Python 3.11 or newer" in done.stderr
        assert "PYTHON=/path/to/python3.11" in done.stderr
