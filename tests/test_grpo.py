"""GRPO: the trainer and the engine agree on every chosen token, and rewards are what they are said to be."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import EOS, TAGS, FollowPlan, Forced, exact_softmax, left_pad, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from multiverse_hf import MultiverseForCausalLM, embedded_model
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.documents import parse_document
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.chains import chains_rows, training_problems
from multiverse_hf.evaluation.rewards import acceleration, find_reward, right
from multiverse_hf.modeling.layout import build_layout, plain_layout
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.training.grpo import MultiverseGRPOTrainer, find_collapse, read_openings, trivial_share

ROOT = Path(__file__).parents[1]
PLANS = {
    "nested": (3, Forced(paths=((4, Forced(paths=((3,), (5,))), 2), (6,))), 4, "eos"),
    "chained": (2, Forced(paths=((3,), (5,))), 3, Forced(paths=((2,), (4,), (3,))), 2, "eos"),
}
CONFIG = GenerationConfig(max_new_tokens=400, do_sample=True, eos_token_id=EOS, pad_token_id=0)


def worst_difference(dtype: torch.dtype, max_new_tokens: int = 400) -> tuple[float, float]:
    """The largest difference of log-probabilities from the engine's: of the forward, and of the trainer.

    TRL's fused head, which the trainer takes, gives float32 whatever the model's dtype.
    """
    model = tiny_model("qwen3", dtype=dtype)
    prompts = [[40, 41, 42, 43, 44], [45, 46]]
    with MultiverseEngine(model) as engine:
        handles = [
            engine.submit(
                prompt,
                CONFIG,
                seed=1,
                logprobs=0,
                max_new_tokens=max_new_tokens,
                logits_processor=[FollowPlan(plan, len(prompt))],
            )
            for prompt, plan in zip(prompts, PLANS.values(), strict=True)
        ]
        results = [handle.result() for handle in handles]
    assert all(result.stats.num_forks for result in results)
    keep = max(len(result.ids) for result in results)
    ids, mask = left_pad(prompts)
    more = torch.tensor([result.ids + [0] * (keep - len(result.ids)) for result in results])
    real = torch.tensor([[1] * len(result.ids) + [0] * (keep - len(result.ids)) for result in results])
    rows, real = torch.cat([ids, more], 1), torch.cat([mask, real], 1)
    with torch.no_grad():
        logits = model(input_ids=rows, attention_mask=real).logits[:, -keep - 1 : -1]
        own = logits.log_softmax(-1).gather(-1, more[..., None])[..., 0]
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
        theirs, *_ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, rows, real, keep)
    chosen = [
        (row, column, score.logprob)
        for row, result in enumerate(results)
        for column, score in enumerate(result.scores)
        if score is not None
    ]
    assert len(chosen) == sum(sum(result.sampled) for result in results) > 10
    return tuple(
        max(abs(logps[row, column].item() - logprob) for row, column, logprob in chosen) for logps in (own, theirs)
    )


@pytest.mark.parametrize("max_new_tokens", [400, 30], ids=["whole", "truncated"])
def test_trainer_and_engine_agree_on_nested_chained_and_padded_documents(max_new_tokens):
    with exact_softmax():
        forward, trainer = worst_difference(torch.float64, max_new_tokens)
        assert forward < 1e-9
        assert trainer < 1e-5
    assert max(worst_difference(torch.float32, max_new_tokens)) < 1e-4


def test_a_wrong_layout_breaks_the_agreement(monkeypatch):
    compute = GRPOTrainer._get_per_token_logps_and_entropies

    def wrong(*args, **kwargs):
        with plain_layout():
            return compute(*args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", wrong)
    assert worst_difference(torch.float64)[1] > 1e-2


class WatchGrammar(LogitsProcessor):
    """Notes for each context of a branch whether the engine's grammar lets a block begin there."""

    def __init__(self) -> None:
        self.opener, self.seen = TAGS.open("parallel"), {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for ids, row in zip(input_ids.tolist(), scores, strict=True):
            self.seen[tuple(ids)] = bool(row[self.opener] > -math.inf)
        return scores

    def __deepcopy__(self, memo: dict) -> "WatchGrammar":
        return self


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_probability_of_a_block_is_that_of_each_step_at_which_the_engine_lets_one_begin(plan):
    model, prompt = tiny_model("qwen3"), [40, 41, 42, 43, 44]
    watch, follow = WatchGrammar(), FollowPlan(plan, len(prompt))
    with MultiverseEngine(model) as engine:
        result = engine.submit(prompt, CONFIG, logits_processor=[watch, follow], output_logits=True).result()
    ids = prompt + result.ids
    visible = build_layout(ids, TAGS).mask()
    steps = [  # what each token was chosen from, where the branch that chose it might have opened a block
        result.logits[index].softmax(-1)
        for index, chosen in enumerate(result.sampled)
        if chosen and watch.seen[tuple(torch.tensor(ids)[visible[len(prompt) + index - 1]].tolist())]
    ]
    assert 10 < len(steps) < sum(result.sampled)
    probability = sum(step[watch.opener] for step in steps) / len(steps)
    entropy = sum(torch.special.entr(step).sum() for step in steps) / len(steps)
    with exact_softmax():
        assert read_openings(model, result) == pytest.approx((probability.item(), entropy.item()), abs=1e-9)
    assert read_openings(model, replace(result, ids=[], sampled=[])) is None


def unsure_model():
    """The embedded model with flatter distributions: its own are so sharp that the answers of a group are equal."""
    model = MultiverseForCausalLM.from_pretrained(embedded_model())
    with torch.no_grad():
        model.model.norm.weight.mul_(0.4)
    return model


def make_trainer(tmp_path, model=None, reward=None, share_prompt=False, **options) -> MultiverseGRPOTrainer:
    prompts = [Suffix.PARALLEL.end(each) for each in ("A=5+6; B=3+4; total?", "A=8-5; B=2+7; total?")]
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": prompt}], "answer": "18"} for prompt in prompts]
    )
    settings = {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2,
        "disable_tqdm": True, "learning_rate": 1e-4, "max_completion_length": 100, "scale_rewards": "none",
    }  # fmt: skip
    return MultiverseGRPOTrainer(
        model or MultiverseForCausalLM.from_pretrained(embedded_model()),
        reward_funcs=reward or (lambda completions, **columns: [float(n % 2) for n, _ in enumerate(completions)]),
        args=GRPOConfig(**(settings | options)),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(embedded_model()),
        share_prompt=share_prompt,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "share_prompt"),
    [(False, False), (True, False), (True, True)],
    ids=["full", "lora", "lora with shared prompts"],
)
def test_the_ratio_is_one_at_each_first_update_and_weights_of_the_engine_follow(lora, share_prompt, tmp_path):
    model = unsure_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if share_prompt else {}
    trainer = make_trainer(tmp_path, model, share_prompt=share_prompt, learning_rate=1e-2, **sizes)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert steps[0]["answers/forking"] > 0
    for step in steps:  # the second is of other weights
        assert step["engine/logp_difference_max"] < 1e-4
        assert step["engine/ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert step["clip_ratio/region_mean"] == 0
        assert math.isfinite(step["loss"])
        assert 0 < step["answers/opening_probability"] < 1
        assert step["answers/opening_entropy"] > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_by_the_same_command_with_the_curve_of_an_uninterrupted_one(tmp_path):
    unsure_model().save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(tmp_path / "start")
    command = [sys.executable, ROOT / "recipes/grpo.py", "--config", ROOT / "recipes/multiverse-tiny/grpo.yaml"]
    command += ["--model_name_or_path", "start", "--rewards", "longest_path", "--reward_weights", "1"]
    command += ["--per_device_train_batch_size", "4", "--num_generations", "2", "--max_completion_length", "60"]
    command += ["--num_rows", "8", "--max_steps", "5", "--save_steps", "1", "--logging_steps", "1"]
    command += ["--learning_rate", "1e-3", "--report_to", "none", "--resume_from_checkpoint", "true"]

    def start(folder: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{folder}.txt").open("a") as log:
            options = {"cwd": tmp_path, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen([*command, "--output_dir", folder], **options)

    def finish(folder: str, process: subprocess.Popen) -> list[dict]:
        assert process.wait(timeout=1800) == 0, (tmp_path / f"{folder}.txt").read_text()[-3000:]
        names = ("step", "loss", "grad_norm", "reward", "answers/parallelism", "answers/opening_probability")
        steps = json.loads((tmp_path / folder / "run.json").read_text())["log"][:-1]  # the last has the totals
        return [{name: step[name] for name in names} for step in steps]

    killed = start("killed")
    while not (tmp_path / "killed/checkpoint-2/trainer_state.json").exists():
        assert killed.poll() is None, (tmp_path / "killed.txt").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/run.json").exists()
    first = tmp_path / "killed/documents/step-1.jsonl"
    written = first.stat().st_mtime_ns
    resumed, whole = start("killed"), start("whole")
    curve, expected = finish("killed", resumed), finish("whole", whole)
    assert first.stat().st_mtime_ns == written, "the run began anew"
    assert [step["step"] for step in expected] == [1, 2, 3, 4, 5]
    assert len({step["reward"] for step in expected}) == len({step["answers/parallelism"] for step in expected}) == 5
    assert all(step["loss"] and step["grad_norm"] for step in expected[2:])
    assert [pytest.approx(step, abs=1e-6) for step in expected] == curve


def test_sampling_from_another_distribution_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"temperature is 0.7, but log-probabilities are of the model's own"):
        make_trainer(tmp_path, temperature=0.7)


def test_shared_prompts_are_refused_where_experts_are_balanced_by_the_tokens_of_each_row(tmp_path):
    model = tiny_model("qwen3_moe", dtype=torch.float32, router_aux_loss_coef=0.01)
    with pytest.raises(ValueError, match="share_prompt counts a shared token once, but the load-balancing loss"):
        make_trainer(tmp_path, model, share_prompt=True)


CHAINS = {"answer": ["18", "18"], "task": ["chains", "chains"], "document": ["...\nAnswer: 18", "...\nAnswer: 17"]}


def test_acceleration_is_paid_for_right_answers_only_and_up_to_a_fifth():
    measures = {"length": [90, 50], "num_tokens": [100, 100]}
    assert right(["", ""], **CHAINS) == [1, 0]
    assert acceleration(["", ""], **CHAINS, **measures) == pytest.approx([0.05, 0])
    measures["length"] = [10, 10]
    assert acceleration(["", ""], **CHAINS, **measures) == pytest.approx([0.1, 0])


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise KeyError('units')", r"raised KeyError: 'units'"),
        ("return [float('nan')]", r"returned nan, which is no finite number"),
        ("return 1", r"returned 1, but a list with one number"),
        ("time.sleep(30)", r"took longer than 0.2 s"),
    ],
)
def test_a_reward_that_fails_ends_in_a_line_with_its_prompt(body, problem, tmp_path):
    file = tmp_path / "mine.py"
    head = "import time\n\ndef score(completions, answer, **columns):\n    if answer == ['1']:\n        return [0.5]\n"
    file.write_text(f"{head}    {body}\n")
    reward, prompts = find_reward(f"{file}:score", timeout_s=0.2), [[{"content": "How many?"}], [{"content": "Why?"}]]
    assert reward(prompts, ["", ""], answer=["1", "1"]) == [0.5, 0.5]
    with pytest.raises(CommandError, match=rf"^the reward score {problem}.*, for the prompt 'Why\?'; mend it"):
        reward(prompts, ["", ""], answer=["1", "2"])


def test_an_unknown_reward_is_refused(tmp_path):
    with pytest.raises(CommandError, match="no reward 'speed'; name one of right, well_formed"):
        find_reward("speed")
    with pytest.raises(CommandError, match=r"no file .*gone.py for the reward"):
        find_reward(f"{tmp_path}/gone.py:score")


def load_recipe(monkeypatch):
    spec = importlib.util.spec_from_file_location("grpo_recipe", ROOT / "recipes/grpo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "grpo_recipe", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.parent.name, marks=[pytest.mark.slow] * (path.parent.name != "multiverse-tiny"))
        for path in sorted(ROOT.glob("recipes/*/grpo.yaml"))
    ],
)
def test_every_recipe_names_problems_and_rewards_that_are_there(path, tmp_path, monkeypatch):
    if path.parent.name != "multiverse-tiny":
        pytest.importorskip("reasoning_gym", reason="the recipe needs the tasks extra")
    recipe = load_recipe(monkeypatch)
    parser = recipe.Parser((recipe.TaskArguments, recipe.GRPOConfig, recipe.ModelConfig))
    options = ["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path)]
    task, training, model = parser.parse_args_and_config(options)
    assert model.model_name_or_path in ("embedded", f"runs/{path.parent.name}/multiverse")
    assert len([find_reward(name) for name in task.rewards]) == len(training.reward_weights)
    assert training.generation_batch_size % training.num_generations == 0
    task.dataset_name = [
        name.replace("size=1000", "size=3").replace("size=4000", "size=3") for name in task.dataset_name
    ]
    task.num_rows = 3
    problems = recipe.read_problems(task)
    assert len(problems) == 3 * len(task.dataset_name)
    assert all(row["prompt"][0]["content"] and row["answer"] for row in problems)


def test_names_may_be_one_or_several_and_files_are_not_joined(monkeypatch):
    recipe = load_recipe(monkeypatch)
    assert recipe.TaskArguments(dataset_name="rg:gcd", rewards="right").rewards == ["right"]
    with pytest.raises(CommandError, match=r"2 names, rg:gcd mine.jsonl; only generators"):
        recipe.read_problems(recipe.TaskArguments(dataset_name=["rg:gcd", "mine.jsonl"]))


def block(*paths: str) -> str:
    outlines = "".join(f"<Outline>{n}: x</Outline>\n" for n, _ in enumerate(paths, 1))
    written = "".join(f"<Path>\n{n}: {path}\n</Path>\n" for n, path in enumerate(paths, 1))
    return f"<Parallel>\n<Goal>\n{outlines}</Goal>\n{written}<Conclusion>\nso\n</Conclusion>\n</Parallel>"


def test_short_paths_and_copies_are_trivial():
    share = [("a longer thought", "another one altogether"), ("a longer thought", "a longer thought"), ("a", "b")]
    assert [trivial_share(parse_document(block(*paths))) for paths in share] == [0, 0.5, 1]
    assert trivial_share(parse_document("no block")) == 0


def test_a_collapse_is_named_with_numbers():
    first = {"answers/forking": 0.5, "answers/length": 100.0, "answers/trivial": 0.1}
    assert find_collapse(first, first) == []
    assert find_collapse(first, first | {"answers/forking": 0.0}) == ["0% fork, 50% at the start"]
    assert find_collapse(first, first | {"answers/forking": 1.0}) == ["all fork, 50% at the start"]
    assert find_collapse(first, first | {"answers/length": 301.0}) == ["length 301, 100 at the start"]
    assert find_collapse(first, first | {"answers/trivial": 0.6}) == ["60% of the paths are empty or copies"]


@pytest.mark.slow
def test_the_experiment_in_small_compares_the_start_with_what_was_trained_and_goes_on(tmp_path):
    shutil.copytree(embedded_model(), tmp_path / "rl/start")
    command = [sys.executable, str(ROOT / "recipes/multiverse-tiny/rl.py"), "--output", "rl", "--seeds", "0"]
    command += ["--arms", "acceleration", "--steps", "1", "--problems", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 1800}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr + "".join(log.read_text()[-2000:] for log in tmp_path.glob("rl/*.log"))
    result = json.loads((tmp_path / "rl/rl.json").read_text())
    assert list(result["rows"]) == ["start", "acceleration"]
    (log,) = result["curves"]["acceleration"]
    assert [entry["step"] for entry in log] == [1]
    assert result["rows"]["start"]["parallelism"]["mean"] > 1.5
    assert (tmp_path / "rl/rl.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, **options)
    assert (again.returncode, again.stdout) == (0, (tmp_path / "rl/rl.md").read_text())  # nothing was done again
    other = subprocess.run([*command, "--problems", "5"], **options)
    assert other.returncode == 2
    assert "was begun with" in other.stderr


@pytest.mark.slow
def test_rows_that_rarely_fork_are_made_alike_twice(tmp_path):
    for folder in ("a", "b"):
        command = [sys.executable, str(ROOT / "recipes/multiverse-tiny/make_rare.py"), "--output", folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        subprocess.run([*command, "--rows", "200", "--problems", "20"], cwd=tmp_path, env=environment, check=True)
    for name in ("rows.jsonl", "problems.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a/rows.jsonl").read_text().splitlines()]
    forks = [row for row in rows if parse_document(row["document"]).num_paths]
    assert len(rows) == 200
    assert 5 <= len(forks) <= 40
    problems = [json.loads(line)["prompt"] for line in (tmp_path / "a/problems.jsonl").read_text().splitlines()]
    assert len(problems) == 20
    assert not {row["prompt"] for row in rows} & {prompt.partition(" Think")[0] for prompt in problems}


def test_the_problems_of_a_run_are_known_from_its_record(tmp_path):
    prompts = ["A=1+2; B=3+4; total?", Suffix.PARALLEL.end("A=5-2; B=1+1; total?"), "Hello"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def problems(**data):
        (tmp_path / "run.json").write_text(json.dumps({"data": data}))
        return training_problems(str(tmp_path))

    expected = {"A=1+2; B=3+4; total?", "A=5-2; B=1+1; total?"}
    assert problems(dataset_name=str(tmp_path / "rows.jsonl")) == expected
    assert problems(dataset_name=[str(tmp_path / "rows.jsonl")]) == expected
    assert problems(dataset_name=["chains"], num_rows=6, rows_seed=3) == {row["problem"] for row in chains_rows(6, 3)}
    assert problems(dataset_name=["rg:gcd", "rg:leg_counting"]) == set()
    with pytest.raises(CommandError, match="names no training rows"):
        problems(dataset_name="no-such-file.jsonl")
