"""Training by real processes: two of them, under DDP and under FSDP2, compute what one does.

Everything runs on a CPU, over gloo. accelerate takes FSDP for GPUs only and would quietly use DDP here, so the worker
below lets it take these processes for such; that the weights were spread is asserted.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the recipe needs the train extra: pip install -e '.[train]'")

import psutil
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_packing import PACKS, assert_equal, packed, starcoder
from test_recipe import BIN, ROOT, SFT, call, documents, losses
from test_training import save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, encode_prompt

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
FSDP2 = str(ROOT / "recipes/accelerate/fsdp2.yaml")
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file", FSDP2, "--num_processes", "2"]
ACCELERATE += ["--mixed_precision", "no", "--main_process_port", "0"]

# Runs of the recipe, one after another: to start processes and import libraries takes longer than all of them.
WORKER = """
import contextlib, io, json, os, runpy, sys, time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from multiverse_hf.training import report
from multiverse_hf.training.trainer import MultiverseSFTTrainer

script, runs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
begin, train = PartialState.__init__, MultiverseSFTTrainer.train


def begin_as_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["WAIT_AFTER"]):
            Path("waiting-" + os.environ["RANK"]).touch()
            time.sleep(300)  # for kill -9; not for ever, should nobody be left to do it
            os._exit(1)


def watched(self, *args, **kwargs):
    begun = []
    prepare = self._prepare_for_training

    def prepared(*args, **kwargs):
        result = prepare(*args, **kwargs)
        weights = dict(self.model.named_parameters())
        begun.append({
            "type": str(self.accelerator.distributed_type),
            "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "weights": len(weights),
            "sharded": sum(isinstance(weight, DTensor) for weight in weights.values()),
            "layers": sum(isinstance(module, FSDPModule) for name, module in self.model.named_modules()
                          if name.rpartition(".")[0].endswith(".layers")),
            "checkpointed": any("_checkpoint_wrapped_module" in name for name in weights),
            "here": sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights.values()),
            "all": sum(w.numel() for w in weights.values()),
        })
        return result

    self._prepare_for_training = prepared
    if "WAIT_AFTER" in os.environ:
        self.add_callback(Wait())
    result = train(self, *args, **kwargs)
    if self.is_world_process_zero():
        said = begun[0] | {"history": self.state.log_history}
        Path(self.args.output_dir, "said.json").write_text(json.dumps(said))
    return result


PartialState.__init__, MultiverseSFTTrainer.train = begin_as_gpus, watched
report.draw_run = lambda path, *_: path.touch()  # takes longer than a run
for run in runs:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(run["environment"])
    sys.argv = [script, *run["options"]]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_path(run.get("script", script), run_name="__main__")
    except SystemExit as end:
        if os.environ.get("RANK", "0") == "0":
            said = {"code": end.code, "errors": errors.getvalue()}
            Path(run["options"][-1] + ".json").write_text(json.dumps(said))
    except BaseException:
        print(errors.getvalue(), file=sys.stderr)
        raise
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


# Gradients in float64, without a trainer. Run first by the same processes.
HALVES = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from test_distributed_training import ATTENTION, WAYS, model_of
from test_packing import PACKS, packed


torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
mesh = init_device_mesh("cpu", (size,))
for attn, lora, way in ((attn, lora, way) for attn in ATTENTION for lora in (False, True) for way in WAYS):
    model = model_of(attn, lora)
    inner = model.get_base_model() if lora else model
    sharded = 0
    if "activation" in way:
        inner.activation_checkpointing_enable()
    if way == "ddp":
        model = DistributedDataParallel(model)
    if way.startswith("fully_shard"):
        for layer in inner.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sharded = sum(isinstance(weight, DTensor) for weight in model.parameters())
        assert sharded == len(list(model.parameters()))
    loss, gradients = packed(model, PACKS[rank::size])
    torch.distributed.all_reduce(loss)
    whole = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        if way == "all_reduce":
            torch.distributed.all_reduce(gradient)
        else:
            gradient = gradient * size  # they give the mean over processes
        whole[name.removeprefix("module.")] = gradient
    if rank == 0:
        said = {"loss": loss, "gradients": whole, "processes": size, "sharded": sharded}
        torch.save(said, f"{attn}, {'lora' if lora else 'full'}, {way}.pt")
"""
ATTENTION = ("sdpa", "eager")
WAYS = ("all_reduce", "ddp", "fully_shard", "fully_shard with activation checkpointing")


def model_of(attn: str, lora: bool) -> torch.nn.Module:
    """A model in float64, the same in each process."""
    model = starcoder(attn)
    if lora:
        torch.manual_seed(1)
        settings = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings).double()
    return model.train()


@contextmanager
def started(command: Sequence[str | Path], folder: Path) -> Iterator[subprocess.Popen]:
    """Start a command and what it starts, none of which outlives the test."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # torch would spread weights over GPUs where there are any
    with (folder / "output.log").open("a") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill a command and all that it started: torchrun gives its workers sessions of their own."""
    if process.poll() is None:
        own = psutil.Process(process.pid)
        for each in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def run(command: Sequence[str | Path], folder: Path) -> None:
    with started(command, folder) as process:
        assert process.wait(timeout=1800) == 0, (folder / "output.log").read_text()[-6000:]


# What each run is called with


def options(base: str, *more: str) -> list[str]:
    given = {
        "model_name_or_path": base,
        "dataset_name": "mine.jsonl",
        "attn_implementation": "sdpa",
        "num_train_epochs": "2",
        "per_device_train_batch_size": "2",
        "learning_rate": "1e-3",
        "seed": "3",
        "logging_steps": "1",
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": "3",
    }
    flags = ["--use_cpu", "--bf16", "false", "--activation_checkpointing", "false", "--parallel_share", "0", "0.5"]
    return [*(word for name, value in given.items() for word in (f"--{name}", value)), *flags, *more]


HELD_OUT = ["--eval_rows", "3", "--per_device_eval_batch_size", "1", "--eval_strategy", "epoch"]
HELD_OUT += ["--eval_generations", "2", "--eval_max_new_tokens", "24"]
PACKED = ["--pack_rows", "true", "--max_length", "700", "--eval_rows", "3"]
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear"]
DDP, SHARDED, SHARDED_PLAIN = (
    {"ACCELERATE_USE_FSDP": fsdp, "FSDP_ACTIVATION_CHECKPOINTING": checkpointing}
    for fsdp, checkpointing in (("false", "false"), ("true", "true"), ("true", "false"))
)
ONE = {
    # two batches at a time, as two processes read them: rows are grouped by length within batches
    "one": (DDP, options("tied", *HELD_OUT, "--gradient_accumulation_steps", "2")),
    "one-lora": (DDP, options("untied", *LORA, *HELD_OUT, "--gradient_accumulation_steps", "2")),
    "one-packed": (DDP, options("tied", *PACKED, "--per_device_train_batch_size", "4")),
}
TWO = {
    "ddp": (DDP, options("tied", *HELD_OUT)),
    "ddp-packed": (DDP, options("tied", *PACKED)),
    "ddp-untied": (DDP, options("untied", *HELD_OUT)),
    "ddp-lora": (DDP, options("untied", *HELD_OUT, *LORA)),
    "ddp-lora-tagged": (DDP, options("ddp-untied", *HELD_OUT, *LORA)),
    "fsdp": (SHARDED, options("tied", *HELD_OUT)),
    "fsdp-resumed": (SHARDED, options("tied", *HELD_OUT, "--resume_from_checkpoint", "fsdp/checkpoint-6")),
    "fsdp-untied": (SHARDED_PLAIN, options("untied", *HELD_OUT)),
    "fsdp-packed": (SHARDED_PLAIN, options("tied", *PACKED)),
    "fsdp-lora-tagged": (SHARDED, options("ddp-untied", *HELD_OUT, *LORA)),
    "fsdp-lora-tagged-resumed": (
        SHARDED,
        options("ddp-untied", *HELD_OUT, *LORA, "--resume_from_checkpoint", "fsdp-lora-tagged/checkpoint-6"),
    ),
    "fsdp-lora": (SHARDED, options("untied", *HELD_OUT, *LORA)),
    "killed": (DDP | {"WAIT_AFTER": "7"}, options("tied", *HELD_OUT)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with all runs; made once for all pytest workers."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, documents(19))))
            save_base(folder / "tied", "llama", tie_word_embeddings=True)
            save_base(folder / "untied", "qwen3", tie_word_embeddings=False)
            (folder / "worker.py").write_text(WORKER)
            (folder / "halves.py").write_text(HALVES)
            for name, some in (("one", ONE), ("two", TWO)):
                first = {"environment": {}, "script": "halves.py", "options": []}
                listed = [first] * (name == "two") + [
                    {"environment": environment, "options": [*words, "--output_dir", output]}
                    for output, (environment, words) in some.items()
                ]
                (folder / f"{name}.list").write_text(json.dumps(listed))
            run([sys.executable, "worker.py", ROOT / SFT, "one.list"], folder)
            with started([*ACCELERATE, "worker.py", ROOT / SFT, "two.list"], folder) as process:
                deadline = time.monotonic() + 1800
                while not all((folder / f"waiting-{rank}").exists() for rank in range(2)):
                    assert process.poll() is None, (folder / "output.log").read_text()[-6000:]
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                kill(process)
            (folder / "done").touch()
    assert (folder / "done").exists(), f"the runs have failed before: see {folder}/output.log"
    return folder


def said(runs: Path, name: str) -> dict:
    return json.loads((runs / name / "said.json").read_text())


def is_result(name: str) -> bool:
    """Whether a logged value is of the run: not a time, and no mean over batches of means over tokens of TRL's."""
    return not any(word in name for word in ("runtime", "per_second", "entropy", "mean_token_accuracy", "flos"))


def assert_same_history(ours: list[dict], theirs: list[dict]) -> None:
    """Compare all that two runs logged, to a hundred roundings of float32."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = ({k: v for k, v in entry.items() if is_result(k)} for entry in (mine, other))
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-7), mine["step"]


def assert_same_weights(ours: Path, theirs: Path) -> None:
    mine, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (ours, theirs))
    assert mine.keys() == other.keys() != set()
    for name, weight in mine.items():
        torch.testing.assert_close(
            weight, other[name], rtol=1e-5, atol=5e-6, msg=name
        )  # a step is 1e-3 wide; met: 1.9e-6


# One process and two


@pytest.mark.parametrize("name", ["", "-packed", "-lora"], ids=["rows", "packed", "lora"])
def test_two_processes_train_as_one_does(runs: Path, name: str) -> None:
    one, two = said(runs, f"one{name}"), said(runs, f"ddp{name}")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["sharded"] == 0
    records = [json.loads((runs / f"{each}{name}/run.json").read_text()) for each in ("one", "ddp")]
    assert [record["processes"] for record in records] == [1, 2]
    assert_same_history(one["history"], two["history"])
    assert_same_weights(runs / f"one{name}", runs / f"ddp{name}")
    assert (runs / f"one{name}/adapter_model.safetensors").exists() == (name == "-lora")
    steps = [entry for entry in two["history"] if "loss" in entry]
    assert {entry["parallel_share"] for entry in steps} == {0.0, 0.5}
    kinds = {"loss_path", "loss_tag", "loss_goal", "loss_conclusion", "loss_think", "loss_answer"}
    assert kinds <= {kind for entry in steps for kind in entry}


def test_two_killed_processes_go_on_in_the_middle_of_an_epoch_with_the_losses_of_uninterrupted_ones(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("tied", "mine.jsonl"):
        (tmp_path / name).symlink_to(runs / name)
    shutil.copytree(runs / "killed", tmp_path / "killed")
    assert not (tmp_path / "killed/run.json").exists()
    assert json.loads((tmp_path / "killed/begun.json").read_text())["processes"] == 2
    (tmp_path / "killed/checkpoint-8").mkdir()  # as if killed again, while it was written
    (tmp_path / "killed/checkpoint-8/model.safetensors").write_bytes(b"half of")

    monkeypatch.chdir(tmp_path)
    resume = ["--output_dir", "killed", "--resume_from_checkpoint", "true"]
    assert call(monkeypatch, SFT, *ONE["one"][1], *resume, "--gradient_accumulation_steps", "1") == 1
    assert "was begun with number of processes 2, now it is 1" in capfd.readouterr().err

    run([*TORCHRUN, "2", ROOT / SFT, *TWO["killed"][1], *resume], tmp_path)
    assert json.loads((tmp_path / "killed/run.json").read_text())["processes"] == 2
    assert losses(tmp_path / "killed") == losses(runs / "ddp")
    assert_same_weights(tmp_path / "killed", runs / "ddp")


# FSDP2


@pytest.mark.parametrize("name", ["", "-untied", "-packed", "-lora-tagged"], ids=["tied", "untied", "packed", "lora"])
def test_fsdp2_trains_as_ddp_does(runs: Path, name: str) -> None:
    sharded, whole = said(runs, f"fsdp{name}"), said(runs, f"ddp{name}")
    assert (sharded["type"], sharded["processes"]) == ("DistributedType.FSDP", 2)
    assert sharded["sharded"] == sharded["weights"]
    assert sharded["layers"] == 2
    assert sharded["here"] < 0.6 * sharded["all"] == 0.6 * whole["all"]
    assert whole["here"] == whole["all"]
    assert sharded["checkpointed"] == (name in ("", "-lora-tagged"))
    assert_same_history(sharded["history"], whole["history"])
    assert_same_weights(runs / f"fsdp{name}", runs / f"ddp{name}")
    names = [{file.name for file in (runs / f"{kind}{name}").iterdir()} for kind in ("fsdp", "ddp")]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_fsdp2_leaves_an_ordinary_checkpoint_with_the_tags_that_its_base_lacked(runs: Path, name: str) -> None:
    folder = runs / ("fsdp" if name == "tied" else "fsdp-untied")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if name == "tied" else "Qwen3ForCausalLM"]
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model, tokenizer = MultiverseForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    assert {weight.shape for weight in plain.parameters()} == {weight.shape for weight in model.parameters()}
    assert "<Parallel>" not in AutoTokenizer.from_pretrained(runs / name).get_vocab()
    assert tokenizer.get_vocab()["<Parallel>"] == model.tags.open("parallel")
    before = AutoModelForCausalLM.from_pretrained(runs / name)
    assert model.config.vocab_size > before.config.vocab_size
    ids = encode_prompt(tokenizer, "What of 3?", return_tensors="pt")
    assert model.generate(ids, max_new_tokens=8).shape[1] > ids.shape[1]


@pytest.mark.parametrize("name", ["fsdp", "fsdp-lora-tagged"], ids=["full", "lora"])
def test_a_run_under_fsdp2_goes_on_in_the_middle_of_an_epoch(runs: Path, name: str) -> None:
    whole, resumed = (
        [{k: v for k, v in entry.items() if k != "train_loss"} for entry in said(runs, each)["history"]]
        for each in (name, f"{name}-resumed")
    )
    assert_same_history(resumed, whole)
    assert_same_weights(runs / f"{name}-resumed", runs / name)


def test_lora_that_would_have_to_train_new_tags_is_refused_under_fsdp2(runs: Path) -> None:
    end = json.loads((runs / "fsdp-lora.json").read_text())
    assert end["code"] == 2
    *_, line = end["errors"].splitlines()
    assert line.startswith("error: LoRA under FSDP")
    assert "recipes/accelerate/ddp.yaml" in line


def test_what_several_processes_end_with_says_what_is_wrong(tmp_path: Path) -> None:
    for launch in ([*TORCHRUN, "2"], ACCELERATE):
        command = [*launch, str(ROOT / SFT), "--use_cpu", "--dataset_name", "none.jsonl", "--output_dir", "run"]
        command += ["--model_name_or_path", "./none"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
        assert done.returncode != 0
        *_, line, border = done.stderr.splitlines()
        assert line == "  traceback : error: no model folder ./none; give an existing one"
        assert set(border) == {"="}


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("ddp", "one"),
        ("fsdp", "one"),
        ("ddp-lora", "one-lora"),
        ("fsdp-untied", "ddp-untied"),
        ("fsdp-lora-tagged", "ddp-lora-tagged"),
    ],
)
def test_answers_at_an_evaluation_are_written_once_whatever_the_number_of_processes(
    runs: Path, name: str, alike: str
) -> None:
    files = sorted((runs / name / "generations").iterdir())
    assert [file.name for file in files] == ["step-4.jsonl", "step-8.jsonl"]
    for file in files:
        answers = [json.loads(line) for line in file.read_text().splitlines()]
        assert [answer["expected"] for answer in answers] == ["16", "17"]
        assert all(answer["num_tokens"] > 0 for answer in answers)
        assert file.read_text() == (runs / alike / "generations" / file.name).read_text()
    evaluations = [entry for entry in said(runs, name)["history"] if "eval_generated_length" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]


# Float64, without a trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("attn", ATTENTION)
def test_gradients_of_two_processes_are_those_of_one_over_all_packed_rows(runs: Path, attn: str, lora: bool) -> None:
    expected = packed(model_of(attn, lora), PACKS)
    assert all("lora" in name for name in expected[1]) == lora
    for way in WAYS:
        found = torch.load(runs / f"{attn}, {'lora' if lora else 'full'}, {way}.pt")
        assert found["processes"] == 2
        assert bool(found["sharded"]) == way.startswith("fully_shard")
        assert_equal((found["loss"], found["gradients"]), expected)
