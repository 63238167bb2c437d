"""What a reader of src/ may rely on: each public name has one meaning, and a step of the engine is short."""

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src" / "multiverse_hf"
# name -> where it may be defined more than once: a convention of Python, a command, or a hook that one caller calls
CONVENTIONAL = {
    "main": "",
    "logger": "",
    "generate": "cli/generate.py modeling/generation.py",  # the command, and what it is named after
    "draw": "evaluation/experiments/",
    "summarize": "evaluation/experiments/",
}


def defined_names(text: str) -> Iterator[str]:
    """Yield the public classes, functions and constants that a module defines at its top."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        else:
            continue
        yield from (name for name in found if not name.startswith("_"))


def repeated_names(modules: dict[str, str]) -> dict[str, list[str]]:
    """Return the names that several modules define, with those modules."""
    places: dict[str, list[str]] = defaultdict(list)
    for module, text in modules.items():
        for name in sorted(set(defined_names(text))):
            places[name].append(module)
    return {name: found for name, found in places.items() if len(found) > 1}


def is_conventional(name: str, modules: list[str]) -> bool:
    if name not in CONVENTIONAL:
        return False
    allowed = CONVENTIONAL[name].split()
    return not allowed or all(module.startswith(tuple(allowed)) for module in modules)


def test_no_public_name_is_defined_in_two_modules():
    modules = {str(path.relative_to(SRC)): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}
    assert "documents.py" in modules
    repeated = repeated_names(modules)
    assert {name: found for name, found in repeated.items() if not is_conventional(name, found)} == {}


def test_a_step_of_the_engine_is_short_to_read(monkeypatch):
    monkeypatch.syspath_prepend(str(SRC.parents[1] / "benchmarks"))
    files = importlib.import_module("trace_step").trace_step()
    assert len(files) <= 8
    assert sum(map(len, files.values())) <= 35
    assert "Engine.step" in files["modeling/engine.py"]


def test_a_name_of_two_modules_is_found_whatever_defines_it():
    first = "LIMIT, _OWN = 1, 2\nclass Row: ...\ndef read(): ...\nasync def ask(): ..."
    second = "LIMIT: int = 2\n_OWN = 3\nRow = dict\ndef ask(): ...\nclass Column:\n    def read(self): ..."
    assert set(repeated_names({"a.py": first, "b.py": second})) == {"LIMIT", "Row", "ask"}
    assert not is_conventional("draw", ["evaluation/experiments/budget.py", "cli/inspect.py"])
