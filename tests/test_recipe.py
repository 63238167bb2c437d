"""The recipes and benchmarks as a user runs them: real processes, a real trainer, a real checkpoint."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the recipe needs the train extra: pip install -e '.[train]'")

from multiverse_hf.data.curriculum import PAPER_SHARES
from multiverse_hf.data.records import read_record
from multiverse_hf.documents import parse_document
from multiverse_hf.errors import CommandError
from multiverse_hf.outputs import output_folder, write_output

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OWN = ROOT / "recipes/own-documents/sft.yaml"
SMALL = ["--hidden-size", "32", "--intermediate-size", "64", "--layers", "2", "--heads", "2", "--head-dim", "16"]


def run(*command: str, cwd: Path, timeout: float = 300) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
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


@pytest.mark.slow
def test_a_small_model_trains_with_the_number_of_threads_that_is_measured_to_be_best(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from multiverse_hf.modeling import threads
    from multiverse_hf.training.trainer import MultiverseSFTTrainer

    monkeypatch.chdir(base)
    for name in threads._FIXED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_DEFAULT", 2)
    monkeypatch.setattr(threads, "_measure", lambda model, width, own: 1)  # tests/test_threads.py has the measurement
    step, seen = MultiverseSFTTrainer.training_step, []

    def watched(self: MultiverseSFTTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MultiverseSFTTrainer, "training_step", watched)
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        options = ["--use_cpu", "--bf16", "false", "--dataset_name", "chains", "--num_rows", "16", "--max_steps", "2"]
        options += ["--model_name_or_path", "base", "--report_to", "none"]
        assert call(monkeypatch, SFT, *options, "--output_dir", "threads") == 0
        assert (seen, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(own)


# A user's own documents


def documents(count: int) -> list[dict]:
    """Rows as a user has them: two blocks, one of them nested, of their own making."""
    rows = []
    for number in range(count):
        inner = block([f"{number}.{part} is odd" if (number + part) % 2 else "it is even" for part in range(2)], "1.")
        work = block([f"See about {number}.\n{inner}\nSo much for that.", "Nothing else."])
        rows.append({"id": f"d{number}", "prompt": f"What of {number}?", "document": work, "answer": str(number)})
    return rows


def block(paths: list[str], label: str = "") -> str:
    outlines = "\n".join(f"<Outline>{label}{at}: part {at}</Outline>" for at in range(1, len(paths) + 1))
    written = "\n".join(f"<Path>\n{label}{at}: {path}\n</Path>" for at, path in enumerate(paths, start=1))
    return f"<Parallel>\n<Goal>\n{outlines}\n</Goal>\n{written}\n<Conclusion>\ndone\n</Conclusion>\n</Parallel>"


def commands_of(page: str, words: str) -> str:
    """Return the block of commands of a page that holds these words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (block,) = (text for text in blocks if words in text)
    return block


def paste(commands: str, folder: Path) -> str:
    """Run commands in a folder, where ``multiverse`` is this one and the recipes are at hand."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "multiverse").write_text(f'#!/bin/sh\nexec {sys.executable} -m multiverse_hf.cli "$@"\n')
    (folder / "multiverse").chmod(0o755)
    path = os.pathsep.join(map(str, (folder, BIN, os.environ["PATH"])))
    return run("env", f"PATH={path}", "bash", "-ec", commands, cwd=folder, timeout=1800)


def test_the_rows_that_are_shown_and_shipped_are_rows_without_doubt() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    shipped = (ROOT / "recipes/own-documents/documents.jsonl").read_text()
    rows = [json.loads(line) for line in (shown + shipped).splitlines()]
    assert len(rows) == 13
    for row in rows:
        record = read_record(row)
        assert record.document.num_paths >= 2
        assert record.doubt is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["docs/training.md", pytest.param("recipes/own-documents/README.md", marks=pytest.mark.long)]
)
def test_the_documents_that_are_shipped_make_a_tiny_model_fork_as_they_do(page: str, tmp_path: Path) -> None:
    block = commands_of(page, "own-documents/sft.yaml --check_rows")
    lines = block.splitlines()
    install = [line for line in lines if line.startswith("pip install")]
    assert len(install) in (0, 2)
    said = paste("\n".join(lines[len(install) :]), tmp_path)
    assert said.count("train: 12 rows read, 12 kept, 0 dropped\n") == 2
    assert "sees 0-1\n" in said
    first = json.loads((ROOT / "recipes/own-documents/documents.jsonl").read_text().splitlines()[0])
    document = parse_document(
        said[said.index("<Parallel>\n<Goal>\n<Outline>1: train</Outline>") :].split("\nnote:")[0]
    )
    assert document.num_paths == parse_document(first["document"]).num_paths == 2


@pytest.mark.slow
def test_fifty_documents_of_ones_own_become_a_checkpoint_by_the_commands_of_the_page(tmp_path: Path) -> None:
    commands = commands_of("docs/training.md", "sft_lora.yaml")
    rows = [json.dumps(row) for row in documents(50)]
    rows[3:3] = ["{half of a row", json.dumps({"prompt": "x", "document": "<Think>"})]
    (tmp_path / "my-documents.jsonl").write_text("\n".join(rows))
    said = paste(commands, tmp_path)
    chosen = "chosen by default: parallel_share 0 0.5 1, by epoch; attn_implementation multiverse_sdpa"
    assert said.count(chosen) == 1
    assert "train: 52 rows read, 50 kept, 2 dropped\n  line 4: unreadable: no JSON: " in said
    assert "\n  line 5: malformed document: at its line 1, column 8: " in said

    out = tmp_path / "runs/tiny-lora"
    record = json.loads((out / "run.json").read_text())
    assert record["data"]["rows"]["kept"] == 50
    assert record["last_evaluation"]["eval_generated_well_formed"] == 1.0
    dropped = [json.loads(line) for line in (out / "dropped_rows.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in dropped] == [4, 5]
    history = json.loads(next(out.glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert {entry["parallel_share"] for entry in steps} == {0.0, 0.5, 1.0}
    assert "loss_path" not in steps[0]
    assert {"loss_path", "loss_tag", "loss_conclusion", "loss_answer", "accuracy_goal"} <= steps[-1].keys()
    answers = [json.loads(line) for line in next((out / "generations").iterdir()).read_text().splitlines()]
    assert [answer["expected"] for answer in answers] == ["48", "49"]
    assert "![Loss" in (out / "report.md").read_text()
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert next(out.rglob("events.out.tfevents*"))
    assert "An adapter (LORA, rank 8) of `tiny-llama`" in (out / "README.md").read_text()

    config = json.loads((tmp_path / "tiny-multiverse/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_rows_are_checked_for_the_recipe_of_a_gpu_without_the_models_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "mine.jsonl").write_text("\n".join([*(json.dumps(row) for row in documents(30)), "{half of a row"]))
    monkeypatch.chdir(tmp_path)
    options = ["--config", str(ROOT / "recipes/qwen2.5-7b/sft.yaml"), "--model_name_or_path", "bare"]
    options += ["--dataset_name", "mine.jsonl", "--use_cpu"]
    assert call(monkeypatch, SFT, *options, "--check_rows") == 0
    said = capfd.readouterr().out
    assert "train: 31 rows read, 30 kept, 1 dropped\n  line 31: unreadable: no JSON: " in said
    assert call(monkeypatch, SFT, *options, "--attn_implementation", "multiverse_sdpa") != 0
    assert "error: cannot load bare: " in capfd.readouterr().err


@pytest.mark.slow
def test_without_options_a_run_makes_the_papers_passes_and_says_which_rows_it_is_not_judged_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps(row) for row in documents(6)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text("\n".join(rows))
    (tmp_path / "mine/test.jsonl").write_text(
        "\n".join([*rows[:2], json.dumps({"prompt": "x", "document": "<Think>"})])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ["--model_name_or_path", str(base / "base"), "--dataset_name", "mine", "--dataset_test_split", "test"]
    options += ["--use_cpu", "--output_dir", "out", "--eval_strategy", "epoch", "--eval_generations", "0"]
    assert call(monkeypatch, SFT, *options, "--check_rows") == 0
    checked = capfd.readouterr().out
    assert "train: 6 rows read, 6 kept, 0 dropped\n" in checked
    assert "test: 3 rows read, 2 kept, 1 dropped\n  row 3: malformed document: " in checked
    assert "out/dropped_test_rows.jsonl" in checked
    assert call(monkeypatch, SFT, *options, "--logging_steps", "1") == 0
    said = capfd.readouterr().out
    chosen = "parallel_share 0 0 0.1 0.5 0.5 0.9 1 1, by epoch; attn_implementation multiverse_sdpa"
    assert said.count(f"chosen by default: {chosen}\n") == 1

    record = json.loads((tmp_path / "out/run.json").read_text())
    assert tuple(record["data"]["parallel_share"]) == PAPER_SHARES
    assert record["model"]["attn_implementation"] == "multiverse_sdpa"
    assert record["data"]["test_rows"] == {"rows": 3, "kept": 2, "dropped": {"malformed document": 1}}
    (dropped,) = map(json.loads, (tmp_path / "out/dropped_test_rows.jsonl").read_text().splitlines())
    assert dropped["row"] == 3
    assert "Evaluated on `test`: 3 read, 2 kept" in (tmp_path / "out/report.md").read_text()
    assert [entry[-1] for entry in losses(tmp_path / "out")] == [round(6 * share) / 6 for share in PAPER_SHARES]
    assert next((tmp_path / "out").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_a_base_in_four_bits_gets_an_adapter_that_merges_into_the_whole_one(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs multiverse_hf[qlora]")
    run(sys.executable, str(ROOT / "recipes/tiny-random/make_base.py"), "--output", "llama", cwd=tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in documents(6)))
    config = ["--config", str(ROOT / "recipes/tiny-random/sft_lora.yaml"), "--model_name_or_path", "llama"]
    bits = ["--load_in_4bit", "true", "--dtype", "bfloat16", "--parallel_share", "1", "--max_steps", "2"]
    command = [sys.executable, str(ROOT / "recipes/sft.py"), *config, "--dataset_name", "mine.jsonl"]
    run(*command, *bits, "--output_dir", "out", "--eval_strategy", "no", cwd=tmp_path)
    from multiverse_hf.training.merging import merge_adapter

    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "llama"
    merged, tokenizer = merge_adapter(tmp_path / "out", str(tmp_path / "llama"))
    assert str(merged.dtype) == "torch.float32"
    assert len(tokenizer) <= merged.get_input_embeddings().weight.shape[0]


def losses(folder: Path) -> list[tuple[float, ...]]:
    """Step, loss and norm of the gradient of every step, as the last checkpoint has them."""
    last = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parts[-2][11:]))
    names = ("step", "loss", "grad_norm", "loss_path", "parallel_share")
    history = json.loads(last.read_text())["log_history"]
    return [tuple(entry.get(name) for name in names) for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "packed"])
def test_a_killed_run_goes_on_in_the_middle_of_an_epoch_with_the_losses_of_an_uninterrupted_one(
    base: Path, tmp_path: Path, packed: bool
) -> None:
    shares = ["--parallel_share", "0", "0.5", "1", "--num_train_epochs", "3", "--seed", "5"]
    rows = ["--num_rows", "96", "--sequential_share", "0.1", "--train_sampling_strategy", "random"]
    options = [*shares, *rows, "--model_name_or_path", str(base / "base"), "--save_steps", "4"]
    options += ["--pack_rows", "true", "--max_length", "700"] if packed else []
    options += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"] if packed else []
    train(tmp_path, *options, "--output_dir", "whole")

    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(tmp_path / "hf")}
    process = subprocess.Popen(
        train_command(*options, "--output_dir", "killed"), cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 1800
    while not (tmp_path / "killed/checkpoint-8/trainer_state.json").exists():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed/begun.json").exists()
    assert not (tmp_path / "killed/run.json").exists()

    resume = ["--output_dir", "killed", "--resume_from_checkpoint", "true"]
    if not packed:
        for changed in (["--num_rows", "95"], ["--lr_scheduler_type", "linear"], ["--dtype", "bfloat16"]):
            refused = subprocess.run(
                train_command(*options, *resume, *changed), cwd=tmp_path, env=environment, capture_output=True,
                text=True, timeout=1800, check=False,
            )  # fmt: skip
            assert refused.returncode != 0
            assert f"was begun with {changed[0].strip('-')}" in refused.stderr, refused.stderr[-2000:]
    # a newer checkpoint that a full disk has cut short is passed over
    shutil.copytree(tmp_path / "killed/checkpoint-8", tmp_path / "killed/checkpoint-99")
    damaged = tmp_path / "killed/checkpoint-99" / ("optimizer.pt" if packed else "model.safetensors")
    os.truncate(damaged, damaged.stat().st_size // 2)
    assert f"{damaged.relative_to(tmp_path)} is damaged" in train(tmp_path, *options, *resume)
    shutil.rmtree(tmp_path / "killed/checkpoint-99", ignore_errors=True)  # old checkpoints are deleted
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "killed") == whole
    assert {entry[-1] for entry in whole} == {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_two_runs_do_not_write_to_one_folder(base: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    hold = "import fcntl, sys, time; file = open('out/.running', 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print('held')"
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-uc", f"{hold}; sys.stdin.read()"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.chdir(tmp_path)
        options = ["--use_cpu", "--model_name_or_path", str(base / "base"), "--dataset_name", "chains"]
        assert call(monkeypatch, SFT, *options, "--output_dir", "out") == 2
        assert "another run is writing to out" in capfd.readouterr().err
    finally:
        holder.kill()
        holder.wait()


SFT, BASE, EVALUATE = "recipes/sft.py", "recipes/multiverse-tiny/make_base.py", "recipes/multiverse-tiny/evaluate.py"
CURATION, QUOTING = "benchmarks/curation.py", "benchmarks/quoting.py"
EMBED, CHAINS, PARSE = (
    "recipes/multiverse-tiny/embed.py",
    "benchmarks/chains_wallclock.py",
    "benchmarks/parse_documents.py",
)
TABLE, FORGETTING, TWIN = (
    "recipes/smollm2-135m/table.py",
    "recipes/smollm2-135m/forgetting.py",
    "benchmarks/twin_wallclock.py",
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
    (folder / "unfinished/checkpoint-1/trainer_state.json").write_text("{}")
    (folder / "silent.jinja").write_text("hello")
    (folder / "finished/run.json").write_text("{}")
    (folder / "a-file").touch()
    (folder / "rows.jsonl").write_text('{"text": "x"}')
    doubtful = [{"prompt": prompt, "document": document} for prompt, document in ("xy", "xy", "z<")]
    lines = [json.dumps(row).replace("<", "<Think>") for row in doubtful]
    (folder / "doubtful.jsonl").write_text("\n".join(lines))
    (folder / "close.yaml").write_text("learning_rat: 3")
    (folder / "broken.yaml").write_text("[1, {")
    (folder / "unknown.yaml").write_text("learning_speed: 1")
    return folder


def train_command(*options: str) -> list[str]:
    launch = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--cpu", "--mixed_precision", "no"]
    config = str(ROOT / "recipes/multiverse-tiny/sft.yaml")
    command = [*launch, str(ROOT / "recipes/sft.py"), "--config", config, "--model_name_or_path", "base"]
    few = ["--num_rows", "32", "--logging_steps", "1", "--report_to", "none"]
    return [*command, "--output_dir", "out", *few, *options]


def train(folder: Path, *options: str) -> str:
    return run(*train_command(*options), cwd=folder)


@pytest.fixture(scope="module")
def log(base: Path) -> str:
    """What a run prints, whose checkpoint is in ``base / "out"``."""
    return train(base, "--num_rows", "96", "--warmup_steps", "0", "--learning_rate", "1e-2")


@pytest.mark.slow
def test_recipe_trains_and_leaves_a_checkpoint_that_loads_as_its_base_and_branches(base: Path, log: str) -> None:
    # torchao, where it is installed, has torch warn of torchao's own code
    assert "deprecated" not in "\n".join(line for line in log.splitlines() if "_pytree.py" not in line)
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


@pytest.mark.slow
def test_a_run_is_measured_on_problems_it_has_not_seen_and_embedded(
    base: Path, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    few = ["--problems", "2", "--kinds", "single", "--max-new-tokens", "8"]
    assert call(monkeypatch, EVALUATE, "--model", "out", *few, "--output", "out/evaluation.json") == 0
    report = json.loads((base / "out/evaluation.json").read_text())
    assert 1 < report["training_problems_left_out"] <= 96
    assert report["results"]["single"]["problems"] == 2
    assert call(monkeypatch, EMBED, "--run", "out", "--name", "multiverse-tiny", ASSETS=tmp_path) == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "run.json", "README.md"}
    assert {file.name for file in (tmp_path / "multiverse-tiny").iterdir()} > names
    assert "| chains, single | 2 |" in (tmp_path / "multiverse-tiny/README.md").read_text()
    assert (tmp_path / "multiverse-tiny/train.csv").read_text().splitlines()[0].startswith("step,epoch,num_tokens,")


def test_the_table_that_is_shown_is_that_of_the_record() -> None:
    folder = ROOT / "recipes/multiverse-tiny"
    spec = importlib.util.spec_from_file_location("paper", folder / "paper.py")
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    record = json.loads((folder / "table.json").read_text())
    assert len(record["seeds"]) == 3
    assert paper.markdown(record["rows"]) in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("form", [[], ["--lora"]], ids=["all-weights", "lora"])
def test_the_table_of_a_real_model_is_made_by_one_command_that_repeats_nothing(tmp_path: Path, form) -> None:
    pytest.importorskip("reasoning_gym")
    tiny = [sys.executable, str(ROOT / "recipes/tiny-random/make_base.py"), "--architecture", "llama"]
    run(*tiny, "--output", "tiny", cwd=tmp_path)
    command = [sys.executable, str(ROOT / TABLE), "--model", "./tiny", "--rows", "24", "--problems", "1", *form]
    said = run(*command, "--max-steps", "1", "--output", "out", cwd=tmp_path, timeout=1800)
    assert [said.count(step) for step in ("making the", "training", "asking")] == [2, 2, 1]
    table = json.loads((tmp_path / "out/table.json").read_text())["table"]
    assert set(table["families without"]) == {"base", "autoregressive", "zero", "parallel"}
    assert len(table) == 14  # twelve families and two means
    (tmp_path / "out/table.json").unlink()
    again = run(*command, "--max-steps", "1", "--output", "out", cwd=tmp_path, timeout=1800)
    assert [again.count(step) for step in ("making the", "training", "asking")] == [0, 0, 1]
    assert json.loads((tmp_path / "out/table.json").read_text())["table"] == table


@pytest.mark.long
def test_the_papers_table_in_miniature_is_made_by_one_command_that_repeats_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes/multiverse-tiny/paper.py"), "--output", "table", "--seeds", "3"]
    said = run(*command, "--num-rows", "64", "--problems", "1", cwd=tmp_path, timeout=1800)
    assert (said.count("training the"), said.count("asking ")) == (2, 4)
    table = json.loads((tmp_path / "table/table.json").read_text())
    assert (table["settings"]["num_rows"], len(table["rows"])) == (64, 4)
    seed = tmp_path / "table/seed-3"
    for name, settings in (("parallel", {"sequential": False}), ("autoregressive", {"sequential": True})):
        record = json.loads((seed / name / "run.json").read_text())
        steps = json.loads(next((seed / name).glob("checkpoint-*/trainer_state.json")).read_text())["global_step"]
        assert (record["training"]["seed"], record["data"]["rows_seed"], steps) == (3, 4, 8)
        assert settings.items() <= record["data"].items()
    files = (
        "base-parallel",
        "autoregressive-sequential",
        "parallel-sequential",
        "parallel-parallel",
    )  # in the rows' order
    for file, row in zip(files, table["rows"].values(), strict=True):
        results = json.loads((seed / f"evaluation-{file}.json").read_text())["results"]
        assert results["flat"]["problems"] == 1
        assert row["accuracy"]["values"] == [pytest.approx(sum(kind["accuracy"] for kind in results.values()) / 0.03)]
        assert row["length"]["mean"] == (results["flat"]["length"] + results["nested"]["length"]) / 2
    lines = (tmp_path / "table/table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(table["rows"])
    assert (tmp_path / "table/table.png").read_bytes().startswith(b"\x89PNG")

    before = {file: file.stat().st_mtime_ns for file in seed.rglob("*") if file.is_file()}
    again = run(*command, "--num-rows", "64", "--problems", "1", cwd=tmp_path)
    assert again.splitlines() == lines
    assert before == {file: file.stat().st_mtime_ns for file in seed.rglob("*") if file.is_file()}
    refused = subprocess.run([*command, "--num-rows", "65"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "was begun with" in refused.stderr


RECIPES = sorted(ROOT.glob("recipes/*/sft*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_says_what_the_script_and_trl_understand(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("script", ROOT / SFT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script", script)
    spec.loader.exec_module(script)
    parser = script.Parser((script.DataArguments, script.SFTConfig, script.ModelConfig))
    options = ["--use_cpu", "--dataset_name", "mine.jsonl", "--output_dir", str(tmp_path)]
    data, training, model = parser.parse_args_and_config(["--config", str(recipe), *options])
    script.check_arguments(data, training, model)
    assert isinstance(training.learning_rate, float)
    assert training.learning_rate > 0
    if "autoregressive" in recipe.name:
        assert data.parallel_share == [0] or data.sequential
    assert training.report_to == ["tensorboard"]
    if recipe.parent.name == "qwen2.5-32b" and recipe.name == "sft.yaml":  # the paper's
        assert tuple(data.parallel_share) == PAPER_SHARES
        assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (1e-5, "cosine", 0.05)
        assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 1e-4)


@pytest.mark.parametrize("config", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_one(config: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.mixed_precision == "bf16"
    assert str(loaded.distributed_type.value) == {
        "single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED",
    }[config.stem]  # fmt: skip


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
        ([SFT, "--learning_rat", "3"], ["no option --learning_rat", "did you mean --learning_rate?"]),
        ([SFT, "--config", "close.yaml"], ["close.yaml", "no option --learning_rat", "did you mean --learning_rate?"]),
        ([SFT, "--config"], ["--config names no file"]),
        ([SFT, "--model_name_or_path", "runs/mine/base"], ["no model folder runs/mine/base", "give an existing one"]),
        ([SFT, "--model_name_or_path", "gone/base.gguf"], ["no model folder gone/base.gguf", "give an existing one"]),
        (
            [
                SFT,
                "--model_name_or_path",
                "runs/own-documents/base",
                "--config",
                str(ROOT / "recipes/own-documents/sft.yaml"),
            ],
            ["make it: python recipes/tiny-random/make_base.py --output runs/own-documents/base"],
        ),
        (
            [SFT, "--dataset_name", "doubtful.jsonl", "--strict"],
            ["strict: 2 rows", "line 2 of train (repeats", "correct"],
        ),
        ([SFT, "--dataset_name", "doubtful.jsonl", "--strict", "--check_rows"], ["strict: 2 rows", "line 2 of train"]),
        ([SFT, "--per_device_train_batch_size", "0"], ["per_device_train_batch_size", "at least 1"]),
        ([SFT, "--learning_rate", "-1"], ["learning_rate", "-1"]),
        ([SFT, "--num_rows", "2", "--report_to", "nothing"], ["nothing", "tensorboard"]),
        ([SFT, "--attn_implementation", "nope"], ["cannot load base", "nope", "sdpa"]),
        ([SFT, "--bucket_batches", "-1"], ["bucket_batches", "at least 0"]),
        ([SFT, "--dataset_name", ""], ["dataset_name is missing"]),
        ([SFT, "--dataset_name", "no-such.jsonl"], ["no file no-such.jsonl"]),
        ([SFT, "--dataset_name", "rows.jsonl"], ["none of 1 rows", "found text"]),
        ([SFT, "--parallel_share", "0", "2"], ["parallel_share", "[0.0, 2.0]"]),
        ([SFT, "--parallel_share", "0", "1"], ["2 epochs", "num_train_epochs is 8"]),
        ([SFT, "--pack_rows", "true", "--max_length", "0"], ["max_length", "at least 1"]),
        ([SFT, "--packing", "true"], ["packing", "pack_rows"]),
        ([SFT, "--overlong", "keep"], ["overlong", "drop or cut", "keep"]),
        ([SFT, "--load_in_4bit", "true"], ["use_peft"]),
        ([SFT, "--eval_rows", "8"], ["eval_rows", "8 of 8"]),
        ([SFT, "--eval_strategy", "epoch"], ["dataset_test_split", "eval_rows"]),
        ([SFT, "--max_length", "20"], ["none of 8 rows", "max_length is 20"]),
        ([SFT, "--attn_implementation", "flex_attention"], ["flex_attention", "GPU", "sdpa"]),
        ([SFT, "--eos_token", "<stop>"], ["<stop>"]),
        ([SFT, "--tags", "nope"], ["nope", "choose one of multiverse, npr"]),
        ([SFT, "--chat_template_path", "none.jinja"], ["none.jinja"]),
        ([SFT, "--max_chains", "9"], ["max_chains", "3 to 8"]),
        ([SFT, "--num_train_epochs", "0"], ["num_train_epochs", "max_steps"]),
        ([SFT, "--model_name_or_path", ""], ["name is empty"]),
        ([SFT, "--model_name_or_path", "./no-such-base"], ["./no-such-base"]),
        ([SFT, "--model_name_or_path", "damaged"], ["cannot load damaged"]),
        ([SFT, "--output_dir", "a-file/out"], ["a-file/out", "cannot write"]),
        ([SFT, "--output_dir", "finished"], ["finished run", "output_dir"]),
        ([SFT, "--output_dir", "unfinished"], ["--resume_from_checkpoint true"]),
        ([SFT, "--output_dir", "finished", "--resume_from_checkpoint", "true"], ["finished run", "output_dir"]),
        ([SFT, "--output_dir", "empty", "--resume_from_checkpoint", "empty"], ["empty holds no checkpoint"]),
        ([SFT, "--output_dir", "base"], ["base holds a model", "config.json"]),
        ([SFT, "--per_device_eval_batch_size", "0"], ["per_device_eval_batch_size", "at least 1"]),
        ([SFT, "--learning_rate", "nan"], ["learning_rate", "nan"]),
        ([SFT, "--num_train_epochs", "inf"], ["num_train_epochs", "inf"]),
        ([SFT, "--label_smoothing_factor", "0.1"], ["label_smoothing_factor", "leave it out"]),
        ([SFT, "--dataset_name", "rows.jsonl", "--dataset_test_split", "test"], ["is a file", "eval_rows"]),
        ([SFT, "--dataset_test_split", "test"], ["chains are made", "eval_rows"]),
        ([SFT, "--use_liger_kernel", "true"], ["liger-kernel", "multiverse_hf[liger]"]),
        ([SFT, "--max_steps", "1", "--parallel_share", "0", "0.5", "1"], ["max_steps 1", "epoch 1 of the 3"]),
        ([SFT, "--chat_template_path", "silent.jinja"], ["omits the user's message"]),
        ([SFT, "--use_peft", "true", "--lora_target_modules", "lm_head"], ["lm_head"]),
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
        ([TABLE, "--rows", "0"], ["--rows", "at least 1"]),
        ([FORGETTING, "--base", "empty", "--model", "empty", "--output", "new"], ["empty", "folder of a checkpoint"]),
        ([TWIN, "--model", "out", "--twin", "out", "--questions", "none.jsonl"], ["none.jsonl", "make_data.py"]),
        ([CHAINS, "--problems", "0"], ["--problems", "at least 1"]),
        ([CURATION, "--rows", "10"], ["--rows", "at least 40", "10"]),
        ([CURATION, "--delay", "-1"], ["--delay", "above 0", "-1"]),
        ([CURATION, "--in-flight", "1", "--tasks", "4"], ["--in-flight 1", "4 tasks"]),
        ([CURATION, "--queued", "9"], ["--queued", "500", "9"]),
        ([QUOTING, "--tokenizer", "./none"], ["--tokenizer ./none"]),
        ([QUOTING, "--tokenizer", "base", "--documents", "none"], ["--documents none", ".xml"]),
        (["benchmarks/speculation.py", "--model", "./no-such-model"], ["no-such-model"]),
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
        model = ["--model_name_or_path", "base", "--dataset_name", "chains", "--num_rows", "8"]
        options = ["--use_cpu", *model, "--output_dir", "new", *options]
    code = call(monkeypatch, script, *options)
    *_, line = capfd.readouterr().err.splitlines()
    assert code == 2, line
    assert "error: " in line
    assert all(word in line for word in words), line


@pytest.mark.slow
def test_under_accelerate_the_last_line_says_what_is_wrong_and_how_a_missing_base_is_made(tmp_path: Path) -> None:
    command = ["accelerate launch --quiet recipes/sft.py --config recipes/multiverse-tiny/sft.yaml"]
    commands = (ROOT / "recipes/multiverse-tiny/sft.yaml").read_text()
    assert command[0] in commands
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    launch = [str(BIN / "accelerate"), *command[0].split()[1:]]
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode != 0
    make = "python recipes/multiverse-tiny/make_base.py --output runs/multiverse-tiny/base"
    *_, last = done.stderr.splitlines()
    assert last == f"error: no model folder runs/multiverse-tiny/base; make it: {make}"
    assert "Traceback" not in done.stderr
    assert f"#   {make}\n" in commands


def test_what_torchrun_shows_of_a_process_that_ends_is_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from multiverse_hf.training.runs import errors_in_a_line

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit) as end, errors_in_a_line():
        raise CommandError("no base; make one")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=end.value.code, error_file=str(file))
    *_, line, _ = str(ChildFailedError("sft.py", {0: failure})).splitlines()
    assert line.strip() == "traceback : error: no base; make one"


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("recipes", "benchmarks", "datasets_scripts", "model_cards")
    for path in (ROOT / folder).rglob("*.py")
    if "def main(" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_part_of_an_option_for_the_option(
    script: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for written in ("--hel", "--hel=x"):
        assert call(monkeypatch, script, written) == 2
        *_, line = capfd.readouterr().err.splitlines()
        assert line.endswith("error: no option --hel; did you mean --help?")


def test_no_command_takes_part_of_an_option_for_the_option(capfd: pytest.CaptureFixture[str], unquiet: None) -> None:
    from multiverse_hf import cli

    commands = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert "generate" in commands
    for command in commands:
        assert cli.run([command, "--hel"]) == 2
        assert "No such option: --hel. Did you mean --help?" in capfd.readouterr().err


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
    for text in ("first", "second"):
        with output_folder(tmp_path) as folder:
            (folder / "inner").mkdir()
            (folder / "inner/b.py").write_text(text)
        assert (tmp_path / "inner/b.py").read_text() == text
    device = Path(os.devnull)
    write_output(device, "x")
    assert not device.is_file()
