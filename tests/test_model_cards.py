"""A model's card says what the files beside it say, and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from multiverse_hf import embedded_model

ROOT = Path(__file__).parents[1]
MAKE = ROOT / "model_cards/make_card.py"
NAMES = ("multiverse-tiny", "multiverse-tiny-sequential")
FACTS = {path.stem: path for path in (ROOT / "model_cards").glob("*.yaml")}


def make(*arguments: str | Path, code: int = 0) -> str:
    command = [sys.executable, str(MAKE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout if code == 0 else done.stderr


def tables(text: str) -> dict[str, list[list[str]]]:
    """Give the rows of a card's tables of results, by the file they are of."""
    parts = re.split(r"\(`(evaluation[\w-]*\.json)`\):\n", text)
    cells = {}
    for file, part in zip(parts[1::2], parts[2::2], strict=True):
        rows = re.findall(r"^\| (chains.*) \|$", part, flags=re.MULTILINE)
        cells[file] = [row.split(" | ") for row in rows]
    return cells


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_an_embedded_models_card_is_in_the_files_beside_it(name):
    folder = Path(embedded_model(name))
    text = (folder / "README.md").read_text()
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("evaluation*.json")}
    shown = tables(text)
    assert set(shown) == set(files)
    for file, report in files.items():
        results = report["results"]
        assert len(shown[file]) == len(results)
        for row, (kind, said) in zip(shown[file], results.items(), strict=True):
            shares = [f"{said[key] * 100:.1f} %" for key in ("accuracy", "well_formed", "share_that_forks")]
            assert row == [
                f"chains, {kind}", str(said["problems"]), shares[0], f"{said['parallelism']:.2f}",
                f"{said['length']:.0f}", f"{said['tokens']:.0f}", *shares[1:],
            ]  # fmt: skip
        assert report["commit"][:7] in text

    index = ModelCard.load(folder / "README.md").data.eval_results
    expected = {
        (f"chains, {kind}, {report['settings']['suffix']}", metric): value
        for report in files.values()
        for kind, said in report["results"].items()
        for metric, value in (("accuracy", round(said["accuracy"] * 100, 2)), ("parallelism", said["parallelism"]))
    }
    assert {(each.dataset_config, each.metric_type): each.metric_value for each in index} == expected

    if (folder / "budget.json").exists():
        for row in json.loads((folder / "budget.json").read_text())["rows"]:
            ours, theirs = (row[name]["pass@1"]["value"] * 100 for name in ("parallel", "autoregressive"))
            assert re.search(rf"(?m)^\| {row['budget']:,} \| {ours:.1f} % .* \| {theirs:.1f} % ", text)

    run = json.loads((folder / "run.json").read_text())
    training = dict(re.findall(r"^\| ([a-z ,-]+) \| (.+) \|$", text[text.index("## Training\n") :], re.MULTILINE))
    assert training["fingerprint of the rows"] == run["data"]["fingerprint"]
    assert training["tokens of the rows"] == f"{run['data']['num_tokens']:,}"
    assert training["mean loss"] == f"{run['metrics']['train_loss']:.4f}"
    assert training["seed"] == str(run["training"]["seed"])
    facts = yaml.safe_load((folder / "card.yaml").read_text())
    for value in (facts["summary"], facts["training_data"], *facts["limits"]):
        assert value in text


@pytest.mark.parametrize("name", NAMES)
def test_the_card_in_the_package_is_the_one_that_is_made(name):
    folder = Path(embedded_model(name))
    assert make(folder, "--dry-run") == (folder / "README.md").read_text()
    assert (folder / "card.yaml").read_text() == FACTS[name].read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model's records."""
    for path in Path(embedded_model()).glob("*.json"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_other_figures_in_the_files_are_other_figures_in_the_card(folder):
    path = folder / "evaluation.json"
    report = json.loads(path.read_text())
    report["results"]["nested"] |= {"accuracy": 0.123, "parallelism": 9.87, "length": None}
    path.write_text(json.dumps(report))
    make(folder, "--facts", FACTS["multiverse-tiny"])
    text = (folder / "README.md").read_text()
    assert "| chains, nested | 500 | 12.3 % | 9.87 | not measured | 973 |" in text
    index = ModelCard.load(folder / "README.md").data.eval_results
    assert [each.metric_value for each in index if "nested, parallel" in each.dataset_config] == [12.3, 9.87]
    (folder / "run.json").unlink()
    make(folder)  # again, from card.yaml
    assert "Not recorded: there is no `run.json`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["multiverse-7b", "multiverse-32b"])
def test_a_card_without_results_says_that_they_are_not_measured(name, tmp_path):
    text = make(tmp_path, "--facts", FACTS[name], "--dry-run")
    assert "Not measured: AIME 2024, AIME 2025, MATH-500, GPQA Diamond, accuracy against the length budget." in text
    assert "Licence: not known." in text
    assert "still has 'OWNER/' from the template" in make(tmp_path, "--facts", FACTS[name], code=2)
    assert "| right |" not in text
    assert ModelCard(text).data.eval_results is None
    assert list(tmp_path.iterdir()) == []


def test_the_program_in_the_card_runs(capsys):
    text = (Path(embedded_model()) / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(program, {})
    said = capsys.readouterr().out
    assert said.count("<Path>") == 2
    assert "Answer:" in said


def test_a_card_that_somebody_wrote_is_kept_and_the_one_of_save_pretrained_is_replaced(folder):
    facts = ("--facts", FACTS["multiverse-tiny"])
    (folder / "README.md").write_text("Mine.\n")
    assert "was not made here; move it away" in make(folder, *facts, code=2)
    assert (folder / "README.md").read_text() == "Mine.\n"
    (folder / "README.md").write_bytes(b"\xff")
    assert "was not made here" in make(folder, *facts, code=2)
    from multiverse_hf.modeling.remote_code import write_card

    write_card(folder / "README.md", 'a "name"', "Qwen3ForCausalLM")
    assert r'from_pretrained("a \"name\"", trust' in (folder / "README.md").read_text()
    make(folder, *facts)
    assert "96.2 %" in (folder / "README.md").read_text()


def test_a_run_that_was_cut_short_is_told_by_the_epochs_it_made_and_no_path_of_the_machine_is_told(folder):
    run = json.loads((folder / "run.json").read_text())
    run["metrics"]["epoch"] = 0.8
    run["model"]["model_name_or_path"] = "/home/somebody/runs/base"
    (folder / "run.json").write_text(json.dumps(run))
    make(folder, "--facts", FACTS["multiverse-tiny"])
    text = (folder / "README.md").read_text()
    assert "| epochs | 0.8 |" in text
    assert "| base | the folder `base` |" in text
    assert "/home" not in text


HUB, OTHER, CACHE = "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B", "/c/models--Qwen--Qwen2.5-7B/snapshots/1a"
BASES = {  # what the run's record says, what the facts say: the card's base, or what is wrong
    "the record alone": ({"model_name_or_path": HUB, "base_is_folder": False}, {}, HUB),
    "both": ({"model_name_or_path": HUB, "base_is_folder": False}, {"base_model": HUB}, HUB),
    "another": ({"model_name_or_path": HUB, "base_is_folder": False}, {"base_model": OTHER}, "began with Qwen"),
    "another, an older record": ({"model_name_or_path": HUB}, {"base_model": OTHER}, "began with Qwen/Qwen2.5-7B"),
    "the Hub's cache": ({"model_name_or_path": CACHE}, {}, HUB),
    "the Hub's cache, another": (
        {"model_name_or_path": CACHE}, {"base_model": OTHER}, "the facts name meta",
    ),
    "a folder": ({"model_name_or_path": "runs/base", "base_is_folder": True}, {}, None),
    "a folder of an older record": ({"model_name_or_path": "runs/base"}, {}, None),
    "a folder of its name": ({"model_name_or_path": "Qwen2.5-7B", "base_is_folder": True}, {"base_model": HUB}, HUB),
    "a folder of another name": (
        {"model_name_or_path": "/x/q7", "base_is_folder": True}, {"base_model": HUB}, "say that the folder holds it",
    ),
    "a folder that the facts name": (
        {"model_name_or_path": "/x/q7", "base_is_folder": True}, {"base_model": HUB, "base_folder": "q7"}, HUB,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BASES)
def test_the_base_is_the_one_of_the_runs_record_and_facts_that_contradict_it_are_refused(case, folder):
    said, facts, expected = BASES[case]
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"model": run["model"] | said}))
    given = yaml.safe_load(FACTS["multiverse-tiny"].read_text()) | facts
    (folder / "facts.yaml").write_text(yaml.safe_dump(given))
    wrong = expected is not None and "/" not in expected.partition(" ")[0]
    text = make(folder, "--facts", folder / "facts.yaml", "--dry-run", code=2 if wrong else 0)
    if wrong:
        assert expected in text
        assert text.count("\n") == 1
    else:
        assert ModelCard(text).data.base_model == expected
        shown = expected or f"the folder `{Path(said['model_name_or_path']).name}`"
        assert f"| base | {shown} |" in text


EVALUATION = json.dumps(
    {
        "settings": {"suffix": "parallel", "structure": "guided", "max_new_tokens": 9, "dtype": "float32", "seed": 0},
        "decoding": "greedy",
        "versions": {"torch": "2", "transformers": "5"},
        "commit": None,
        "results": {
            "flat": dict.fromkeys(
                ("problems", "parallelism", "length", "tokens", "well_formed", "share_that_forks"), 1
            )
            | {"accuracy": "HERE"}
        },
    }
).replace('"HERE"', "%s")
BAD = {
    "no folder": (None, None, "no folder"),
    "no facts": ("", None, "holds no facts"),
    "no name": ("name:", None, "lacks name"),
    "an unknown fact": ("licence: mit", None, "no fact 'licence'; did you mean license?"),
    "a wrong mode": ("mode: both", None, "mode is parallel or autoregressive, got 'both'"),
    "no YAML": ("a: [", None, "cannot read"),
    "a fact of another kind": ("language: [en]", None, "language is text, got ['en']"),
    "no positions": ("max_new_tokens: -1", None, "max_new_tokens must be at least 1, got -1"),
    "a damaged evaluation": (None, ("evaluation.json", "{"), "cannot read"),
    "another evaluation": (None, ("evaluation.json", "{}"), "is no evaluation that is known here"),
    "a share above one": (None, ("evaluation.json", EVALUATION % "99.0"), "accuracy of chains, flat is 99.0"),
    "no share": (None, ("evaluation.json", EVALUATION % "NaN"), "accuracy of chains, flat is nan"),
    "text for a share": (None, ("evaluation.json", EVALUATION % '"1"'), "accuracy of chains, flat is '1'"),
    "no model": (None, ("config.json", None), "holds no config.json"),
    "an adapter": (None, ("adapter_config.json", "{}"), "is a LoRA adapter; put it into its base"),
    "an open place": ("repository: OWNER/NAME", None, "still has 'OWNER/' from the template"),
    "another run": (None, ("run.json", "{}"), "is no record of recipes/sft.py"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_ends_in_one_line_and_writes_nothing(case, folder):
    facts, file, expected = BAD[case]
    path = folder / "facts.yaml"
    said = FACTS["multiverse-tiny"].read_text()
    path.write_text(said if facts is None else facts and re.sub(rf"(?m)^{facts.split(':')[0]}:.*\n", "", said) + facts)
    if file is not None and file[1] is None:
        (folder / file[0]).unlink()
    elif file is not None:
        (folder / file[0]).write_text(file[1])
    before = sorted(path.name for path in folder.iterdir())
    where = folder / "none" if case == "no folder" else folder
    error = make(where, "--facts", path, code=2)
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow
def test_results_of_multiverse_eval_are_in_the_card_and_registered_benchmarks_in_files_of_their_own(folder, tmp_path):
    from multiverse_hf.cli import run

    options = ["--temperature", "0", "--limit", "3", "--max-new-tokens", "600"]
    options += ["--output", str(tmp_path / "tiny-eval")]
    assert run(["eval", "--task", "mv:chains", *options]) == 0
    report = json.loads((tmp_path / "tiny-eval/results.json").read_text())
    make(folder, "--facts", FACTS["multiverse-tiny"], "--results", tmp_path / "tiny-eval")
    assert json.loads((folder / "results-tiny-eval.json").read_text()) == report
    text = (folder / "README.md").read_text()
    assert "greedy, structure guided, at most 600 positions" in text
    said = report["tasks"]["mv:chains"]["metrics"]
    right = said["pass@1"]
    cells = [f"{right['value']:.1%}".replace("%", " %"), f"{said['parallelism']['value']:.2f}"]
    assert f"| chains | 3 | {cells[0]} ({right['low'] * 100:.1f} to {right['high'] * 100:.1f}) | {cells[1]} |" in text
    assert not (folder / ".eval_results").exists()

    # the same figures, as if they were of a benchmark that the Hub knows
    report["tasks"]["mv:gpqa_diamond"] = report["tasks"].pop("mv:chains")
    (folder / "results-tiny-eval.json").write_text(json.dumps(report))
    make(folder)
    assert not (folder / ".eval_results").exists()  # three problems of a file are not that benchmark
    report["tasks"]["mv:gpqa_diamond"] |= {"limit": None, "source": "Idavidrein/gpqa", "dataset": "Idavidrein/gpqa"}
    (folder / "results-tiny-eval.json").write_text(json.dumps(report))
    make(folder)
    (entry,) = yaml.safe_load((folder / ".eval_results/gpqa_diamond-parallel.yaml").read_text())
    assert entry["dataset"] == {"id": "Idavidrein/gpqa", "task_id": "gpqa_diamond"}
    assert entry["value"] == round(right["value"] * 100, 2)
    assert f"# parallel {said['parallelism']['value']:.2f}" in entry["notes"]
