"""docs/compatibility.md against the tests it is made from, and the versions they run with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs/compatibility.md").read_text().split("\n")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")][1:]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_names_tests_that_are_there_and_the_version_they_run_with(row):
    tool, version, works, _, tests = row
    assert version == PINS[tool.partition(",")[0]]
    assert works
    assert NAMED.sub("", tests).strip() == ""
    assert NAMED.findall(tests)
    for file, name in NAMED.findall(tests):
        functions = ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        assert name in {each.name for each in functions if isinstance(each, ast.FunctionDef)}, f"{file}::{name}"


def test_every_file_of_tests_of_tools_has_a_row():
    named = {file for row in ROWS for file, _ in NAMED.findall(row[-1])}
    files = {f"ecosystem/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert files - named == {f"ecosystem/{Path(__file__).name}"}
