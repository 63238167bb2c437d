"""What the README shows is run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_snippet_runs_as_pasted_and_answers_in_parallel() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippet.strip().splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<Parallel>" in done.stdout
    assert "Answer: 55" in done.stdout
    assert float(re.findall(r"[\d.]+", done.stdout)[-1]) > 1


def test_every_file_the_readme_names_is_there() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"\]\(([^)#]+)\)|`(?:python|accelerate launch) ([\w/.-]+)", README)
    paths = [one or other for one, other in named if not (one or other).startswith("http")]
    assert paths
    for path in paths:
        assert (root / path).exists(), path
