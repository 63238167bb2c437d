"""The SFT recipe as a user runs it: real processes, a real trainer, a real checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the recipe needs the train extra: pip install -e '.[train]'")

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = ["--hidden-size", "32", "--intermediate-size", "64", "--layers", "2", "--heads", "2", "--head-dim", "16"]


def run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    run(sys.executable, str(ROOT / "recipes/multiverse-tiny/make_base.py"), "--output", "base", *SMALL, cwd=folder)
    return folder


def train(folder: Path, *options: str) -> str:
    launch = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no"]
    config = str(ROOT / "recipes/multiverse-tiny/sft.yaml")
    command = [*launch, str(ROOT / "recipes/sft.py"), "--config", config, "--model_name_or_path", "base"]
    return run(*command, "--output_dir", "out", "--num_rows", "32", "--logging_steps", "1", *options, cwd=folder)


def test_recipe_trains_and_leaves_a_checkpoint_that_loads_as_its_base_and_branches(base: Path) -> None:
    log = train(base, "--num_rows", "96", "--warmup_steps", "0", "--learning_rate", "1e-2")
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", log)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5

    record = json.loads((base / "out/run.json").read_text())
    assert record["data"]["num_rows"] == 96
    assert record["versions"]["trl"]
    config = json.loads((base / "out/config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from multiverse_hf import MultiverseForCausalLM, encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(base / "out")
    AutoModelForCausalLM.from_pretrained(base / "out")
    model = MultiverseForCausalLM.from_pretrained(base / "out")
    ids = encode_prompt(tokenizer, "A=1+2; B=3+4; total?", return_tensors="pt")
    assert model.generate(ids, max_new_tokens=8).shape[1] > ids.shape[1]


def test_an_unknown_key_is_refused(base: Path) -> None:
    with pytest.raises(AssertionError, match="learning_speed"):
        train(base, "--learning_speed", "1")
