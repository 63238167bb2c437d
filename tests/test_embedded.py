"""The embedded checkpoints do what the README says of them."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt
from multiverse_hf.data.chains import Kind, is_correct, sample_problem
from multiverse_hf.documents import check, parse_document

PARALLEL = "multiverse-tiny"


@pytest.fixture(scope="module")
def tiny():
    path = embedded_model(PARALLEL)
    return MultiverseForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def solve(tiny, problems, parallel: bool = True, **options):
    """Answer problems in one left-padded batch; give the documents and their stats."""
    model, tokenizer = tiny
    rows = [encode_prompt(tokenizer, problem.prompt(parallel)) for problem in problems]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=2560, do_sample=False, return_dict_in_generate=True, **options)
    return tokenizer.batch_decode(output.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True), output


def test_flat_problems_are_solved_with_one_path_a_chain(tiny):
    rng = random.Random(7)
    problems = [sample_problem(rng, Kind.FLAT, num_chains) for num_chains in (2, 4, 6)]
    texts, output = solve(tiny, problems)
    assert sum(is_correct(p, text) for p, text in zip(problems, texts, strict=True)) >= 2
    assert [stats.num_forks for stats in output.stats] == [1] * 3
    assert [stats.max_width for stats in output.stats] == [2, 4, 6]
    for text in texts:
        check(parse_document(text))


@pytest.mark.slow
def test_nested_problems_are_solved_with_a_block_in_every_group(tiny):
    rng = random.Random(8)
    problems = [sample_problem(rng, Kind.NESTED) for _ in range(5)]
    texts, output = solve(tiny, problems)
    assert sum(is_correct(p, text) for p, text in zip(problems, texts, strict=True)) >= 4
    assert [stats.num_forks for stats in output.stats] == [1 + len(problem.groups) for problem in problems]
    assert {stats.depth for stats in output.stats} == {2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        (Kind.SINGLE, True),
        (Kind.FLAT, False),
        (Kind.NESTED, False),
    ],
)
def test_a_single_chain_and_the_sequential_suffix_fork_nothing(tiny, kind, parallel):
    rng = random.Random(9)
    num_chains = 1 if kind is Kind.SINGLE else 5  # long sequential answers are not what this model is best at
    problems = [sample_problem(rng, kind, num_chains) for _ in range(3)]
    texts, output = solve(tiny, problems, parallel)
    assert [stats.num_forks for stats in output.stats] == [0] * 3
    assert sum(is_correct(p, text) for p, text in zip(problems, texts, strict=True)) >= 2


@pytest.mark.slow
def test_the_engine_without_structure_writes_what_transformers_generate_writes(tiny):
    _, tokenizer = tiny
    model = MultiverseForCausalLM.from_pretrained(embedded_model(PARALLEL), dtype=torch.float64).eval()
    problem = sample_problem(random.Random(10), Kind.FLAT, 3)
    ids = encode_prompt(tokenizer, problem.prompt(), return_tensors="pt")
    ours = model.generate(ids, structure="off", max_new_tokens=400, do_sample=False)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(PARALLEL), dtype=torch.float64).eval()
    theirs = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=400, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_the_recorded_evaluation_meets_what_the_model_is_for():
    record = json.loads(Path(embedded_model(PARALLEL), "evaluation.json").read_text())
    results = record["results"]
    assert record["settings"]["structure"] == "guided"
    assert {kind: result["problems"] for kind, result in results.items()} == dict.fromkeys(map(str, Kind), 500)
    assert results["flat"]["accuracy"] >= 0.96
    assert results["nested"]["accuracy"] >= 0.95
    assert results["single"]["accuracy"] >= 0.97
    assert results["flat"]["parallelism_6_or_more_chains"] > 3
    assert results["single"]["share_that_forks"] == 0


def test_the_checkpoints_are_small_ordinary_and_come_with_their_records():
    folders = sorted(path.parent for path in Path(embedded_model(PARALLEL)).parent.glob("*/config.json"))
    sizes = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in folders]
    assert max(sizes) <= 10e6
    assert sum(sizes) <= 15e6
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["Qwen3ForCausalLM"]
        assert {file.name for file in folder.iterdir()} >= {"run.json", "train.csv", "evaluation.json", "README.md"}
