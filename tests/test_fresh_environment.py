"""A new environment with torch and transformers and nothing else, offline: a saved checkpoint branches there.

Slow: environments are made with pip, from the network's package index. At both ends of the supported range of
transformers; the tests of model, engine and commands too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_remote_code import ask, saved  # noqa: F401 - a fixture

from multiverse_hf import MultiverseForCausalLM

ROOT = Path(__file__).parents[1]
OLDEST, NEWEST = "5.17.0", "5.24.0"
# What needs nothing of the extra train, which takes transformers of the newer end only; and not the test of the table
# of all options that generate of the newest release takes.
MODEL_TESTS = ("replay", "layout", "generate", "engine", "loading", "remote_code", "tags", "documents", "cli")
ASK = """
import importlib.util, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

assert importlib.util.find_spec("multiverse_hf") is None
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**inputs, max_new_tokens=600, do_sample=False)
answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(json.dumps({"version": __version__, "answer": answer}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with torch alone."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    extra = os.environ.get("TORCH_PIP_ARGS", "").split()
    subprocess.run([*install, "-c", ROOT / "constraints.txt", *extra, "torch"], check=True, timeout=900)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_a_checkpoint_branches_with_nothing_but_torch_and_transformers(version, environment, saved, tmp_path):  # noqa: F811
    from test_remote_code import CHAT

    python = environment / "bin/python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, f"transformers=={version}"], check=True, timeout=900)
    # nothing of this process's environment reaches the new one but what a program needs to run
    names = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "ask.py").write_text(ASK)
    done = subprocess.run(
        [python, "-W", "error::FutureWarning", "ask.py", saved, json.dumps(CHAT)],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"] == version
    assert said["answer"] == ask(MultiverseForCausalLM.from_pretrained(saved))


@pytest.mark.slow
def test_an_older_transformers_is_told_what_is_needed(environment, saved, tmp_path):  # noqa: F811
    python = environment / "bin/python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "transformers==5.12.1"], check=True, timeout=900)
    (tmp_path / "ask.py").write_text(ASK)
    variables = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [python, "ask.py", saved, "[]"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "transformers>=5.17.0 is required" in done.stderr
    assert "pip install 'transformers>=5.17,<6'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_model_engine_and_command_line_pass_their_tests_with_other_transformers(version, environment, tmp_path):
    pins = (ROOT / "constraints.txt").read_text()
    newer = r"(?m)^(transformers|huggingface_hub|tokenizers|accelerate)==.*$"  # which that transformers does not take
    (tmp_path / "constraints.txt").write_text(re.sub(newer, "", pins))
    python = environment / "bin/python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", tmp_path / "constraints.txt"]
    needed = ["numpy", "safetensors", "typer", "rich", "pytest", "pytest-xdist", "hypothesis", "peft"]
    subprocess.run([*install, f"transformers=={version}", *needed], check=True, timeout=900)
    files = [ROOT / f"tests/test_{name}.py" for name in MODEL_TESTS]
    report = tmp_path / "report.xml"
    command = [python, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider", "-k", "not serve"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", *files]
    variables = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    said = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"], capture_output=True, text=True
    )
    assert said.stdout.strip() == version
    cases = ElementTree.parse(report).getroot().iter("testcase")
    passed = {Path(case.get("file")).stem for case in cases if case.find("skipped") is None}
    assert passed >= {file.stem for file in files}  # hypothesis names a file of its own for its state machines
