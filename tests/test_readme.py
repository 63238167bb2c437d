"""What the README and the pages beside it show is run as it stands."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import multiverse_hf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}


def code(page: str, language: str, holds: str = "") -> str:
    """Return the one block of code of a page that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGES[ROOT / page], re.DOTALL)
    (block,) = (text for text in blocks if holds in text)
    return block


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_the_python_snippets_run_as_pasted_one_after_the_other() -> None:
    first, second = code("README.md", "python"), code("docs/engine.md", "python")
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
    answer = code("docs/batch.md", "bash", "prompts.jsonl\nmultiverse generate --input")
    submit = code("docs/batch.md", "bash", "--executor slurm")
    done = run_in(tmp_path, answer + submit)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in rows] == [("a", "44"), ("b", "26")]
    assert rows[1]["level"] == 1
    assert "#SBATCH --array=0-63" in done.stdout


@pytest.mark.slow
def test_the_commands_of_evaluation_run_as_pasted(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs multiverse_hf[eval]")
    block = code("docs/evaluation.md", "bash", "multiverse compare")
    install, commands = block[: block.index("multiverse eval")], block[block.index("multiverse eval") :]
    assert [line.split()[0] for line in install.splitlines()] == ["pip", "pip"]
    done = run_in(tmp_path, commands)
    assert done.stdout.count("mv:chains") == 3
    comparison = json.loads((tmp_path / "runs/comparison/comparison.json").read_text())
    assert comparison["tasks"]["mv:chains"]["problems"] == 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_a_page_names_is_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if not link.startswith("http")]
    programs = re.findall(r"`(?:python|accelerate launch) ([\w/.-]+\.py)", PAGES[page])
    assert links or page != ROOT / "README.md"
    for path in (*(page.parent / link for link in links), *(ROOT / program for program in programs)):
        assert path.exists(), path


def test_every_name_of_the_reference_is_there() -> None:
    pages = [text for page, text in PAGES.items() if page.parent.name == "reference"]
    names = [name for text in pages for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    assert {f"multiverse_hf.{name}" for name in multiverse_hf.__all__} - set(names) == {"multiverse_hf.__version__"}
    for name in names:
        pkgutil.resolve_name(name)  # raises where there is none


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


def test_the_functions_that_how_it_works_names_are_there():
    """A rename must not leave the page behind."""
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    table = page.split("## Where this is in the code")[1].split("\n## ")[0]
    modules = {
        name: importlib.import_module(f"multiverse_hf.modeling.{name}") for name in re.findall(r"`(\w+)\.py`", table)
    }
    names = [name for name in re.findall(r"`([\w.]+)`", table) if not name.endswith(".py") and name != "Branch.sees"]
    assert len(modules) > 8 < len(names)
    for name in names:
        owner, *parts = name.split(".")
        found = [getattr(module, owner) for module in modules.values() if hasattr(module, owner)]
        assert found, name
        assert all(hasattr(found[0], part) for part in parts), name
