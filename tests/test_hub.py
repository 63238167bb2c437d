"""A model on the Hub: uploaded, and loaded by its repository's name, over real HTTP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import TOKEN, read_log
from test_remote_code import CHAT, ask, saved  # noqa: F401 - a fixture

from multiverse_hf import MultiverseForCausalLM

ROOT = Path(__file__).parents[1]
PUSH = """
import sys
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from multiverse_hf import MultiverseForCausalLM
folder, repo = sys.argv[1:]
MultiverseForCausalLM.from_pretrained(folder).push_to_hub(repo)
AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
made = ModelCard.load(repo)
assert made.data.library_name == "transformers" and made.data.tags == ["multiverse"], made.data
assert f'from_pretrained("{repo}", trust_remote_code=True)' in made.text, made.text
card = ModelCard.load(f"{folder}/README.md")
card.validate()
card.push_to_hub(repo)
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM
from multiverse_hf import MultiverseForCausalLM
repo, chat = sys.argv[1], eval(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(repo)
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answers = []
for load, trust in (
    (MultiverseForCausalLM.from_pretrained, False),
    (AutoModelForCausalLM.from_pretrained, True),
    (Qwen3ForCausalLM.from_pretrained, True),
):
    model = load(repo, **({"trust_remote_code": True} if trust else {}))
    ids = model.generate(**inputs, max_new_tokens=600, do_sample=False)
    answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
plain = AutoModelForCausalLM.from_pretrained(repo)
assert type(plain) is Qwen3ForCausalLM
assert answers[0] == answers[1] == answers[2]
print(answers[0])
"""


def run(program: str, *arguments: str, hub: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | hub | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_pushed_model_branches_when_it_is_loaded_by_its_repositorys_name(saved, hub, tmp_path):  # noqa: F811
    pushed = run(PUSH, str(saved), "me/tiny", hub=hub, cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    commits = read_log(hub)["commits"]
    added = {name for commit in commits for name in commit["added"]}
    wanted = {"model.safetensors", "modeling_multiverse.py", "custom_generate/generate.py", "tokenizer.json"}
    assert wanted | {"config.json", "generation_config.json", "README.md"} <= added

    fresh = hub | {"HF_HOME": str(tmp_path / "another-machine"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    del fresh["HF_TOKEN"]  # the repository is public: reading needs none
    loaded = run(LOAD, "me/tiny", repr(CHAT), hub=fresh, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.strip() == ask(MultiverseForCausalLM.from_pretrained(saved)).strip()

    for said in (pushed.stdout, pushed.stderr, loaded.stdout, loaded.stderr):
        assert TOKEN not in said
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), f"the token is in {file}"


@pytest.mark.slow
def test_a_push_with_a_token_that_may_not_write_leaves_nothing_on_the_hub(saved, hub, tmp_path):  # noqa: F811
    pushed = run(PUSH, str(saved), "me/tiny", hub=hub | {"HF_TOKEN": "hf_of-another"}, cwd=tmp_path)
    assert pushed.returncode != 0
    assert "401" in pushed.stderr
    assert read_log(hub)["commits"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["me/none", "me/tiny/x"])
def test_a_repository_that_is_not_there_is_named(name, hub, tmp_path):
    program = f"from multiverse_hf import MultiverseForCausalLM; MultiverseForCausalLM.from_pretrained({name!r})"
    done = run(program, hub=hub, cwd=tmp_path)
    assert done.returncode != 0
    assert f"OSError: no checkpoint {name!r}" in done.stderr
