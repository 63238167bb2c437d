"""The recipes and benchmarks as a user runs them: real processes, a real trainer, a real checkpoint."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the recipe needs the train extra: pip install -e '.[train]'")

from multiverse_hf.checkpoints import output_folder, write_output

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SMALL = ["--hidden-size", "32", "--intermediate-size", "64", "--layers", "2", "--heads", "2", "--head-dim", "16"]


def run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def call(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str, **names: object) -> int:
    """Run a script in this process, as importing its libraries takes seconds, and give the exit code."""
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # where a script finds its siblings
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    for name, value in names.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        module.main()
    except SystemExit as err:
        return err.code
    return 0


SFT, BASE, EVALUATE = "recipes/sft.py", "recipes/multiverse-tiny/make_base.py", "recipes/multiverse-tiny/evaluate.py"
EMBED, CHAINS, PARSE = (
    "recipes/multiverse-tiny/embed.py",
    "benchmarks/chains_wallclock.py",
    "benchmarks/parse_documents.py",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and some that are not as they should be."""
    folder = tmp_path_factory.mktemp("recipe")
    run(sys.executable, str(ROOT / "recipes/multiverse-tiny/make_base.py"), "--output", "base", *SMALL, cwd=folder)
    shutil.copytree(folder / "base", folder / "damaged")
    (folder / "damaged/model.safetensors").write_bytes(b"no weights")
    shutil.copytree(folder / "base", folder / "unpadded")
    settings = json.loads((folder / "unpadded/tokenizer_config.json").read_text())
    (folder / "unpadded/tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    for name in ("empty", "finished", "unfinished/checkpoint-1"):
        (folder / name).mkdir(parents=True)
    (folder / "finished/run.json").write_text("{}")
    (folder / "a-file").touch()
    (folder / "broken.yaml").write_text("[1, {")
    (folder / "unknown.yaml").write_text("learning_speed: 1")
    return folder


def train(folder: Path, *options: str) -> str:
    launch = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no"]
    config = str(ROOT / "recipes/multiverse-tiny/sft.yaml")
    command = [*launch, str(ROOT / "recipes/sft.py"), "--config", config, "--model_name_or_path", "base"]
    return run(*command, "--output_dir", "out", "--num_rows", "32", "--logging_steps", "1", *options, cwd=folder)


@pytest.fixture(scope="module")
def log(base: Path) -> str:
    """What a run prints, whose checkpoint is in ``base / "out"``."""
    return train(base, "--num_rows", "96", "--warmup_steps", "0", "--learning_rate", "1e-2")


def test_recipe_trains_and_leaves_a_checkpoint_that_loads_as_its_base_and_branches(base: Path, log: str) -> None:
    assert "deprecated" not in log
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


def test_a_run_is_measured_on_problems_it_has_not_seen_and_embedded(
    base: Path, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    few = ["--problems", "2", "--kinds", "single", "--max-new-tokens", "8"]
    assert call(monkeypatch, EVALUATE, "--model", "out", *few, "--output", "out/evaluation.json") == 0
    report = json.loads((base / "out/evaluation.json").read_text())
    assert 1 < report["training_problems_left_out"] <= 96
    assert report["results"]["single"]["problems"] == 2
    assert call(monkeypatch, EMBED, "--run", "out", "--name", "tiny", ASSETS=tmp_path) == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "run.json", "README.md"}
    assert {file.name for file in (tmp_path / "tiny").iterdir()} > names
    assert (tmp_path / "tiny/train.csv").read_text().splitlines()[0].startswith("step,epoch,num_tokens,")


# Bad input: one line that says what to do, before the work begins


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([SFT, "--num_rows", "0"], ["num_rows", "at least 1", "0"]),
        ([SFT, "--plain_share", "2"], ["plain_share", "2"]),
        ([SFT, "--num_rows", "many"], ["num_rows", "many"]),
        ([SFT, "--config", "no-such.yaml"], ["no-such.yaml"]),
        ([SFT, "--config", "broken.yaml"], ["broken.yaml", "expected"]),
        ([SFT, "--config", "unknown.yaml"], ["learning_speed"]),
        ([SFT, "--learning_speed", "1"], ["learning_speed"]),
        ([SFT, "--per_device_train_batch_size", "0"], ["per_device_train_batch_size", "at least 1"]),
        ([SFT, "--learning_rate", "-1"], ["learning_rate", "-1"]),
        ([SFT, "--num_rows", "2", "--report_to", "nothing"], ["nothing", "tensorboard"]),
        ([SFT, "--attn_implementation", "nope"], ["cannot load base", "nope", "sdpa"]),
        ([SFT, "--bucket_batches", "0"], ["bucket_batches", "at least 1"]),
        ([SFT, "--num_train_epochs", "0"], ["num_train_epochs", "max_steps"]),
        ([SFT, "--model_name_or_path", ""], ["name is empty"]),
        ([SFT, "--model_name_or_path", "./no-such-base"], ["./no-such-base"]),
        ([SFT, "--model_name_or_path", "damaged"], ["damaged", "weights"]),
        ([SFT, "--model_name_or_path", "unpadded"], ["unpadded", "padding token"]),
        ([SFT, "--output_dir", "a-file/out"], ["a-file/out", "cannot write"]),
        ([SFT, "--output_dir", "finished"], ["finished run", "output_dir"]),
        ([SFT, "--output_dir", "unfinished"], ["--resume_from_checkpoint true"]),
        ([SFT, "--output_dir", "empty", "--resume_from_checkpoint", "true"], ["empty", "no checkpoint"]),
        ([BASE, "--output", "new", "--layers", "0"], ["--layers", "0"]),
        ([BASE, "--output", "new", "--head-dim", "5"], ["--head-dim", "even"]),
        ([BASE, "--output", "new", "--vocab-size", "100"], ["--vocab-size", "271"]),
        ([BASE, "--output", "a-file/base"], ["a-file/base", "cannot write"]),
        ([BASE, "--output", "finished"], ["trained model"]),
        ([EVALUATE, "--model", "base", "--problems", "0"], ["--problems", "0"]),
        ([EVALUATE, "--model", "./no-such-model"], ["./no-such-model"]),
        ([EVALUATE, "--model", "damaged"], ["damaged", "weights"]),
        ([EVALUATE, "--model", "unpadded"], ["unpadded", "padding token"]),
        ([EVALUATE, "--model", "base", "--output", "a-file/x.json"], ["a-file/x.json", "cannot write"]),
        ([EVALUATE, "--model", "base", "--output", "empty"], ["empty", "folder"]),
        ([EVALUATE, "--model", "finished"], ["run.json", "move it"]),
        ([EMBED, "--run", "unfinished", "--name", "x"], ["no finished run"]),
        ([EMBED, "--run", "finished", "--name", "../x"], ["--name"]),
        ([CHAINS, "--problems", "0"], ["--problems", "at least 1"]),
        ([CHAINS, "--threads", "0"], ["--threads", "at least 1"]),
        ([CHAINS, "--max-new-tokens", "-1"], ["--max-new-tokens", "at least 1"]),
        ([CHAINS, "--chains", "9"], ["--chains", "from 2 to 8"]),
        ([CHAINS, "--model", "./no-such-model"], ["no-such-model"]),
        ([CHAINS, "--output", "a-file/x.json"], ["a-file/x.json", "cannot write"]),
        ([PARSE, "--documents", "0"], ["--documents", "at least 1"]),
        ([PARSE, "--characters", "-5"], ["--characters", "at least 1"]),
    ],
    ids=lambda value: " ".join(value) if ".py" in value[0] else None,
)
def test_bad_input_is_refused_at_once(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(base)
    script, *options = command
    if script == SFT:
        options = ["--use_cpu", "--model_name_or_path", "base", "--output_dir", "new", *options]
    code = call(monkeypatch, script, *options)
    *_, line = capfd.readouterr().err.splitlines()
    assert code == 2, line
    assert "error: " in line
    assert all(word in line for word in words), line


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with output_folder(tmp_path) as folder:
            (folder / "a.json").write_text("half of a new o")
            raise KeyboardInterrupt

    (tmp_path / "a.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]
    write_output(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]
    device = Path(os.devnull)
    write_output(device, "x")
    assert not device.is_file()
