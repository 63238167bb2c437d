"""LightEval: our tasks judge as ``multiverse eval`` does, and its own commands run in an environment of their own.

The commands are slow: the environment is made with pip, from the network's package index, as the docs say.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_answers import GPQA_ROW, NEEDS_EVAL
from test_evaluation_run import read_samples, run, save_plain_model

from multiverse_hf import embedded_model
from multiverse_hf.evaluation.lighteval.measures import find_tags, measure, strip
from multiverse_hf.evaluation.tasks import TASKS, Mode, gym_task, load_problems

pytestmark = [pytest.mark.usefixtures("unquiet"), NEEDS_EVAL]
NEEDS_LIGHTEVAL = pytest.mark.skipif(
    importlib.util.find_spec("lighteval") is None, reason="needs multiverse_hf[lighteval]; a slow test runs it there"
)

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT.parent / "shared/data/benchmarks"
ADAPTER = "src/multiverse_hf/evaluation/lighteval/model.py"
BUDGET = "60"
GENERATED = {"rg:leg_counting,size=3,max_animals=3": "rg:leg_counting", "rg:gcd": "rg:gcd"}  # and their names there
METRICS = {"pass@1": "pass@1", "# parallel": "parallelism", "length": "length", "tokens": "tokens"}
METRICS |= {"parallel rate": "parallel_rate", "well-formed": "well_formed"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory):
    """The module of tasks, with one made-up row for each that is not made here."""
    pytest.importorskip("lighteval", reason="needs multiverse_hf[lighteval]; a slow test runs it there")
    folder = tmp_path_factory.mktemp("rows")
    for name in ("aime24", "aime25", "math_500"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"problem": f"{name}: 1+1?", "answer": "2"}))
    (folder / "gpqa_diamond.jsonl").write_text(json.dumps(GPQA_ROW))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTIVERSE_DATA_DIR", str(folder))
        patch.setenv("MULTIVERSE_TASKS", " ".join(GENERATED))
        patch.setattr("huggingface_hub.constants.HF_HOME", str(folder / "home"))
        from multiverse_hf.evaluation.lighteval import tasks

        yield tasks


def test_the_tasks_leave_gradients_on_which_lighteval_turns_off(tasks) -> None:
    import torch

    assert torch.is_grad_enabled()


def test_every_task_is_there_in_every_mode(tasks) -> None:
    names = {config.name for config in tasks.TASKS_TABLE}
    assert names == {name + end for name in (*TASKS, *GENERATED.values()) for end in ("", ":zero", ":autoregressive")}


@pytest.mark.parametrize("name", TASKS)
def test_gold_is_1_and_wrong_is_0_by_every_score(name: str, tasks) -> None:
    from lighteval.models.model_output import ModelResponse

    config = next(each for each in tasks.TASKS_TABLE if each.name == f"{name}:zero")
    row = {
        "mv:chains": {"problem": "A=5+6; B=7+8; total?"},
        "mv:gpqa_diamond": GPQA_ROW,
    }.get(name, {"problem": "1+1?", "answer": "2", "level": "2"})
    doc = config.prompt_function(row, name)
    assert doc.query == TASKS[name].read(row).prompt(Mode.ZERO)
    doc.specific["measures"] = [{"parallelism": 2.0, "length": 5, "num_tokens": 10, "num_forks": 1}]
    for answer, score in ((doc.choices[0], 1.0), ("nothing", 0.0)):
        response = ModelResponse(text=[f"Answer: {answer}"])
        values = {metric.metric_name: metric.sample_level_fn.compute(doc, response) for metric in config.metrics}
        assert (values["pass@1"], values["avg@n"], values["# parallel"], values["length"]) == (score, score, 2.0, 5)
        assert (values["parallel rate"], values["well-formed"]) == (1, 1)
    both = ModelResponse(text=[f"Answer: {doc.choices[0]}", "Answer: nothing"])
    scores = [m.sample_level_fn.compute(doc, both) for m in config.metrics if m.metric_name in ("pass@1", "avg@n")]
    assert scores == [0.5, 0.5]


def test_a_generator_asks_and_scores_as_the_evaluation_does(tasks) -> None:
    import pyarrow.parquet
    from lighteval.models.model_output import ModelResponse

    (config,) = (each for each in tasks.TASKS_TABLE if each.name == "rg:gcd:zero")
    rows = pyarrow.parquet.read_table(Path(config.hf_repo, "test.parquet")).to_pylist()
    problems = load_problems(gym_task("rg:gcd")).problems
    docs = [config.prompt_function(row, "rg:gcd:zero") for row in rows]
    assert [doc.query for doc in docs] == [problem.prompt(Mode.ZERO) for problem in problems]
    gold = docs[1].choices[0]
    scores = {metric.metric_name: metric.sample_level_fn for metric in config.metrics}
    for said, right, score in ((gold, 1, 1), (f"{gold} or", 0, len(gold) / len(f"{gold} or")), ("?", 0, 0)):
        response = ModelResponse(text=[f"Answer: {said}"])
        assert scores["score"].compute(docs[1], response) == score
        assert scores["pass@1"].compute(docs[1], response) == right
    other = next(each for each in tasks.TASKS_TABLE if each.name == "mv:chains")
    assert "score" not in {metric.metric_name for metric in other.metrics}


def test_a_metric_that_the_backend_did_not_measure_is_left_out(tasks) -> None:
    from lighteval.models.model_output import ModelResponse

    (config,) = (each for each in tasks.TASKS_TABLE if each.name == "mv:aime25")
    doc = config.prompt_function({"problem": "1+1?", "answer": "2"}, "mv:aime25")
    response = ModelResponse(text=["Answer: 2"])
    found = [metric.compute_sample(doc=doc, model_response=response) for metric in config.metrics]
    assert {name for each in found for name in each} == {"pass@1", "avg@n"}  # a NaN would make the results no JSON


def test_ids_without_their_padding_measure_what_the_engine_counted(tmp_path: Path) -> None:
    import types

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    text = tokenizer.encode("<Think>\nA 1\n</Think>", add_special_tokens=False)
    end, pad, tags = tokenizer.eos_token_id, tokenizer.pad_token_id, find_tags(tokenizer)
    assert strip([*text, end, pad, pad], tokenizer, tags, 100) == [*text, end]
    assert strip([*text, pad, pad], tokenizer, tags, 100) == text
    same = types.SimpleNamespace(eos_token_id=end, pad_token_id=end)  # padded with the end token
    assert strip([*text, end, end, end], same, tags, 100) == [*text, end]
    assert strip([*text, end, end, end], same, tags, len(text)) == text  # the budget cut it: it has no end
    assert measure(text, None) == {"num_tokens": len(text), "length": len(text), "parallelism": 1.0, "num_forks": 0}


@NEEDS_LIGHTEVAL
def test_options_follow_the_models_name() -> None:
    from multiverse_hf.evaluation.lighteval.model import read_name

    assert read_name("multiverse") == (None, {})
    assert read_name("a/b,temperature=0,seed=3") == ("a/b", {"temperature": 0.0, "seed": 3})
    with pytest.raises(ValueError, match="did you mean temperature"):
        read_name("a/b,temprature=0")
    with pytest.raises(ValueError, match="seed takes int, got 'x'"):
        read_name("a/b,seed=x")


@NEEDS_LIGHTEVAL
def test_the_repair_reaches_a_process_that_never_heard_of_it(tmp_path: Path) -> None:
    from multiverse_hf.evaluation.lighteval.repair import BROKEN, LINE

    # a folder of its own, read as Python reads site-packages at its start
    (tmp_path / "hook.pth").write_text(LINE)
    code = f"""
import site, sys
site.addsitedir({str(tmp_path)!r})
assert "lighteval" not in sys.modules and "torch" not in sys.modules
import importlib
for name in {BROKEN!r}:
    assert not hasattr(importlib.import_module(name), "TASKS_TABLE")
import lighteval.logging.info_loggers as loggers
print(loggers.xxhash.xxh64("text").hexdigest())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    import xxhash

    assert done.stdout.split()[-1] == xxhash.xxh64(b"text").hexdigest()


# Its commands, as a user runs them


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment made as the docs say."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    extra = os.environ.get("TORCH_PIP_ARGS", "").split()
    constraints = ["-c", ROOT / "constraints.txt"]
    subprocess.run([*install, *constraints, *extra, "torch"], check=True, timeout=1200)
    subprocess.run([*install, *constraints, "-e", f"{ROOT}[lighteval,tasks]"], check=True, timeout=1800)
    repair = [folder / "bin/python", "-m", "multiverse_hf.evaluation.lighteval.repair", "install"]
    subprocess.run(repair, check=True)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few local rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, source in (("aime25", "aime25.jsonl"), ("math_500", "math500_first100.jsonl")):
        lines = (BENCHMARKS / source).read_text().splitlines()[:5]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_the_tasks_judge_as_the_evaluation_does_beside_lighteval(environment: Path, tmp_path: Path) -> None:
    install = [environment / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    tools = ("pytest", "pytest-xdist", "hypothesis")
    subprocess.run([*install, "-c", ROOT / "constraints.txt", *tools], check=True, timeout=1800)
    files = [ROOT / "tests" / name for name in ("test_lighteval.py", "test_evaluation_answers.py")]
    command = [environment / "bin/python", "-m", "pytest", "-n", "0", "-q", "-rs", "-m", "not slow", *files]
    variables = clean_variables(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "needs multiverse_hf" not in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_the_commands_of_the_docs_run_as_pasted(environment: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/evaluation.md").read_text()
    (block,) = (text for text in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "lighteval custom" in text)
    (tmp_path / "src").symlink_to(ROOT / "src")
    variables = clean_variables(tmp_path) | {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", block], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = [
        {name: table(tmp_path / "runs/lighteval/results" / model)["mv:chains"][name] for name in METRICS}
        for model in ("multiverse-tiny", "tiny-exported")
    ]
    assert numbers[0] == pytest.approx(numbers[1])
    assert numbers[0]["# parallel"] > 1


def clean_variables(folder: Path) -> dict[str, str]:
    """Give what a program needs to run, and nothing else of this process's environment."""
    names = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    return variables | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}


def make_model(name: str, folder: Path) -> tuple[Path, Mode]:
    """Give a checkpoint that branches with nothing but transformers, or a plain random one."""
    if name == "random qwen2":
        return save_plain_model(folder / "random-qwen2"), Mode.AUTOREGRESSIVE
    assert run(["export", "--model", name, "--output", str(folder / name)]) == 0
    return folder / name, Mode.PARALLEL


def table(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the newest results LightEval has saved."""
    path = max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return {name.split("|")[0]: values for name, values in json.loads(path.read_text())["results"].items()}


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="../shared/data/benchmarks is not here")
@pytest.mark.parametrize("name", ["multiverse-tiny", "random qwen2"])
def test_both_commands_finish_and_their_numbers_are_those_of_multiverse_eval(
    name: str, environment: Path, rows: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet

    model, mode = make_model(name, tmp_path)
    end = "" if mode is Mode.PARALLEL else f":{mode.value}"
    tasks = ["mv:aime25", "mv:math_500"] + (["mv:chains"] if mode is Mode.PARALLEL else [])
    variables = clean_variables(tmp_path)
    variables |= {"MULTIVERSE_DATA_DIR": str(rows), "MULTIVERSE_MAX_NEW_TOKENS": BUDGET}
    asked = ",".join(f"{task}{end}|0" for task in tasks)
    common = "--custom-tasks multiverse_hf.evaluation.lighteval.tasks --save-details"
    common += " --max-samples 5" if "mv:chains" in tasks else ""
    arguments = f"model_name={model.name},trust_remote_code=True,batch_size=4,dtype=float32,cache_dir={tmp_path}/cache"
    commands = {
        "accelerate": f'lighteval accelerate "{arguments}" "{asked}" {common} --output-dir accelerate',
        "custom": f'lighteval custom "./{model.name},temperature=0,dtype=float32" {ROOT / ADAPTER} "{asked}" {common} '
        "--output-dir custom",
    }
    found = {}
    for kind, command in commands.items():
        words = shlex.split(command)
        done = subprocess.run(
            [environment / "bin" / words[0], *words[1:]], cwd=tmp_path, env=variables, capture_output=True, text=True,
            timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "pass@1" in done.stdout
        assert "# parallel" in done.stdout
        found[kind] = table(tmp_path / kind)
        for task in tasks:
            (details,) = (tmp_path / kind / "details").rglob(f"details_{task}{end}*.parquet")
            assert pyarrow.parquet.read_table(details).num_rows == 5

    options = ["--temperature", "0", "--max-new-tokens", BUDGET, "--mode", mode.value, "--dtype", "float32"]
    for task in ("mv:aime25", "mv:math_500"):
        ours = tmp_path / "ours" / task.removeprefix("mv:")
        options_of_task = ["--task", task, "--data-dir", str(rows), "--output", str(ours)]
        assert run(["eval", "--model", str(model), *options_of_task, *options]) == 0
        metrics = json.loads((ours / "results.json").read_text())["tasks"][task]["metrics"]
        assert len(read_samples(ours / "samples")) == 5
        for theirs, name_of_ours in METRICS.items():
            for kind in commands:
                value = found[kind][f"{task}{end}"][theirs]
                assert value == pytest.approx(metrics[name_of_ours]["value"], abs=1e-5), (kind, task, theirs)
    # of the 300 chains LightEval draws five of its own: its commands are compared with each other
    if "mv:chains" in tasks:
        numbers = [{name: found[kind]["mv:chains"][name] for name in METRICS} for kind in commands]
        assert numbers[0] == pytest.approx(numbers[1])
        assert numbers[0]["# parallel"] > 1
