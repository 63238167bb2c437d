"""TRL's own trainers, as their users call them: two steps each, and what theory says of the first.

Before any step a policy and its reference are equal, so that every divergence and margin between them is 0.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt
from multiverse_hf.modeling.integrations import multiverse_model
from multiverse_hf.modeling.layout import plain_layout
from multiverse_hf.training.rollouts import multiverse_rollout

PROMPTS = [
    "A=9+7; B=8+5; total? Think step by step and in parallel before answering.",
    "A=8+5+2; B=15+3+1; C=2+3+7; total? Think step by step and in parallel before answering.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """multiverse-tiny as a user saves it, with its code."""
    path = tmp_path_factory.mktemp("trl") / "saved"
    MultiverseForCausalLM.from_pretrained(embedded_model()).save_pretrained(path)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(folder, tokenizer) -> list[dict]:
    """Prompts with the documents that the model answers."""
    model = MultiverseForCausalLM.from_pretrained(folder)
    answered = []
    for prompt in PROMPTS:
        ids = encode_prompt(tokenizer, prompt, return_tensors="pt")
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=500)[0, ids.shape[1] :], skip_special_tokens=True)
        assert "<Path>" in answer
        answered.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return answered * 2


def load(kind: str, folder: Path):
    if kind == "class":
        return MultiverseForCausalLM.from_pretrained(folder)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            MultiverseForCausalLM.from_pretrained(folder),
            LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=kind == "remote", dtype=torch.float32)


def common(tmp_path: Path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
        "learning_rate": 1e-4,
    }


def first_of(trainer) -> dict:
    """What the trainer logs of the first of two steps."""
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert math.isfinite(second["loss"])
    return first


def preferences(rows: list[dict]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": [{**row["completion"][0], "content": row["completion"][0]["content"] + " 9"}],
            }
            for row in rows
        ]
    )


def rewards(completions, **kwargs) -> list[float]:
    return [float(number) for number in range(len(completions))]


KINDS = ["class", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("remote", "lora"))]


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_dpo_begins_at_log_two(kind, folder, rows, tokenizer, tmp_path):
    """Also for a plain policy: its reference is plain as well."""
    args = DPOConfig(**common(tmp_path), max_length=1024)
    trainer = DPOTrainer(load(kind, folder), args=args, train_dataset=preferences(rows), processing_class=tokenizer)
    first = first_of(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    if kind != "lora":
        assert (multiverse_model(trainer.ref_model) is None) == (kind == "plain")


@pytest.mark.parametrize("by_name", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_plain_reference_that_is_handed_over_is_adopted_or_refused(by_name, folder, rows, tokenizer, tmp_path):
    policy, args = str(folder) if by_name else load("class", folder), DPOConfig(**common(tmp_path), max_length=1024)
    options = {"args": args, "train_dataset": preferences(rows), "processing_class": tokenizer}
    reference = load("plain", folder)
    first = first_of(DPOTrainer(policy, ref_model=reference, **options))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert multiverse_model(reference) is not None
    stranger = load("plain", folder)
    stranger.config.multiverse = None
    with pytest.raises(ValueError, match=r"ref_model is a Qwen3ForCausalLM without control tags"):
        DPOTrainer(policy, ref_model=stranger, **options)
    plain = DPOTrainer(load("plain", folder), ref_model=load("plain", folder), **options)
    assert multiverse_model(plain.ref_model) is None


@pytest.mark.slow
def test_a_reward_model_by_name_has_a_backbone_that_follows_the_layout(folder, rows, tokenizer, tmp_path):
    args = RewardConfig(**common(tmp_path), max_length=1024)
    trainer = RewardTrainer(str(folder), args=args, train_dataset=preferences(rows), processing_class=tokenizer)
    first_of(trainer)
    model, text = trainer.model.eval(), rows[0]["prompt"] + rows[0]["completion"]
    ids = tokenizer.apply_chat_template(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        score = model(ids).logits
        with plain_layout():
            assert not torch.equal(model(ids).logits, score)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precompute_ref_log_probs": True}, {"padding_free": True}, {"ld_alpha": 0.5}])
def test_options_of_dpo_leave_its_beginning_as_it_is(options, folder, rows, tokenizer, tmp_path):
    args = DPOConfig(**common(tmp_path), max_length=1024, **options)
    trainer = DPOTrainer(load("class", folder), args=args, train_dataset=preferences(rows), processing_class=tokenizer)
    assert first_of(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kto_begins_at_one_half(kind, folder, rows, tokenizer, tmp_path):
    dataset = Dataset.from_list([{**row, "label": number % 2 == 0} for number, row in enumerate(rows)])
    args = KTOConfig(**common(tmp_path), max_length=1024)
    trainer = KTOTrainer(load(kind, folder), args=args, train_dataset=dataset, processing_class=tokenizer)
    first = first_of(trainer)
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_sampling_trainers_begin_without_divergence(method, kind, folder, rows, tokenizer, tmp_path):
    config, trainer = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[method]
    args = config(**common(tmp_path), num_generations=2, max_completion_length=200, beta=0.04)
    dataset = Dataset.from_list(rows).select_columns(["prompt"])
    first = first_of(
        trainer(load(kind, folder), reward_funcs=rewards, args=args, train_dataset=dataset, processing_class=tokenizer)
    )
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["completions/clipped_ratio"] == 0


@pytest.mark.parametrize("pad", ["<|endoftext|>", pytest.param("<|im_end|>", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rollout", [None, multiverse_rollout])
def test_answers_cut_off_are_counted_so_and_no_padding_is_trained_on(
    rollout, pad, folder, rows, tmp_path, monkeypatch
):
    """The limit bounds the length of an answer: two cut answers may hold different numbers of tokens."""
    seen, given, tokenizer = [], [], AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = pad
    compute = GRPOTrainer._compute_loss

    def look(self, model, inputs):
        mask = inputs["completion_mask"].bool()
        forced = mask & ~inputs["tool_mask"].bool() if "tool_mask" in inputs else mask & False
        padding = (inputs["completion_ids"][mask] == tokenizer.pad_token_id).sum().item()
        seen.append((mask.sum(1).tolist(), padding, inputs["completion_ids"][forced].tolist()))
        return compute(self, model, inputs)

    def reward(completions, **kwargs) -> list[float]:
        given.append(kwargs.get("parallelism"))
        return rewards(completions)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", look)
    args = GRPOConfig(
        **(common(tmp_path) | {"per_device_train_batch_size": 4}), num_generations=2, max_completion_length=60
    )
    dataset = Dataset.from_list(rows).select_columns(["prompt"])
    trainer = GRPOTrainer(
        load("class", folder),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    first = first_of(trainer)
    assert first["completions/clipped_ratio"] == 1
    lengths, padding, forced = zip(*seen, strict=True)
    assert len(set(lengths[0])) == 2, "one answer is longer, so the other one was padded"
    assert padding == (0, 0)
    if rollout is not None:
        written = tokenizer.decode(forced[0])
        assert "\n<Path>\n1:" in written
        assert "<Parallel>" not in written
        assert min(given[0]) > 1


def test_a_rollout_takes_text_as_it_is_keeps_tags_of_users_as_text_and_needs_a_multiverse_model(folder, tokenizer):
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=2)
    model = load("class", folder)
    trainer = SimpleNamespace(
        model=model,
        model_wrapped=model,
        processing_class=tokenizer,
        accelerator=Accelerator(cpu=True),
        generation_config=config,
        args=SimpleNamespace(ds3_gather_for_generation=True, gradient_checkpointing_kwargs=None),
    )
    chat = [{"role": "user", "content": "say </Goal>"}]
    out = multiverse_rollout(["A=5+6;", chat], trainer)
    assert out["prompt_ids"] == [tokenizer("A=5+6;")["input_ids"], encode_prompt(tokenizer, chat)]
    assert model.tags.close("goal") not in out["prompt_ids"][1]
    assert [len(ids) for ids in out["completion_ids"]] == [len(mask) for mask in out["env_mask"]] == [3, 3]
    trainer.model = load("plain", folder)
    with pytest.raises(ValueError, match="needs a Multiverse model, got Qwen3ForCausalLM"):
        multiverse_rollout([chat], trainer)


@pytest.mark.parametrize("kind", ["class", pytest.param("remote", marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_learns_what_the_model_chose_packed_or_not(packing, kind, folder, rows, tokenizer, tmp_path):
    """The first loss is the mean over the completion, where tokens that the engine wrote have probability one."""
    model = load(kind, folder)
    batch = [encode_prompt(tokenizer, row["prompt"], return_tensors="pt") for row in rows[:2]]
    total, count = 0.0, 0
    for prompt, row in zip(batch, rows, strict=False):
        out = model.generate(prompt, max_new_tokens=500, return_dict_in_generate=True)
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_tensors="pt").input_ids
        assert text[:, : out.sequences.shape[1]].equal(out.sequences), "the same tokens as the trainer's"
        chosen = torch.ones_like(text, dtype=torch.bool)  # what the template puts after the answer is learnt as well
        chosen[:, : out.sequences.shape[1]] = out.sampled_mask
        with torch.no_grad():
            scores = model(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
        total -= scores[chosen[:, 1:]].sum().item()
        count += text.shape[1] - prompt.shape[1]
    args = SFTConfig(**(common(tmp_path) | {"per_device_train_batch_size": 1 if packing else 2}), packing=packing)
    dataset = Dataset.from_list(rows[:2])
    first = first_of(SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer))
    assert first["loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("trust", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folders_name_gives_the_multiverse_class_whose_run_loads_again(trust, folder, rows, tokenizer, tmp_path):
    losses = []
    for model in (str(folder), load("class", folder), load("remote", folder), load("plain", folder)):
        args = SFTConfig(**common(tmp_path), max_length=1024, trust_remote_code=trust)
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows[:2]), processing_class=tokenizer)
        losses.append(first_of(trainer)["loss"])
        if isinstance(model, str):
            trainer.save_model(str(tmp_path / "sft"))
    assert losses[0] == losses[1] == losses[2]
    assert abs(losses[3] - losses[0]) > 0.1 * losses[0], "the plain class is causal: it does not follow the layout"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", trust_remote_code=True)
    assert multiverse_model(again) is not None
    assert json.loads((tmp_path / "sft/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_an_architecture_that_the_caller_names_is_taken(folder, tmp_path):
    from transformers import Qwen3ForCausalLM
    from trl.trainer.utils import create_model_from_path

    assert type(create_model_from_path(str(folder), Qwen3ForCausalLM)) is Qwen3ForCausalLM
    assert multiverse_model(create_model_from_path(str(folder))) is not None


@pytest.mark.slow
def test_trainers_of_trl_that_are_experimental_load_by_name_too(folder, tokenizer, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    data = Dataset.from_list([{"prompt": "A=5+6;", "chosen": "B", "rejected": "C"}] * 2)
    args = ORPOConfig(**common(tmp_path), max_length=64)
    trainer = ORPOTrainer(str(folder), args=args, train_dataset=data, processing_class=tokenizer)
    assert multiverse_model(trainer.model) is not None


def test_vllm_which_writes_no_branches_is_refused(folder):
    trainer = SimpleNamespace(model=load("class", folder), use_vllm=True)
    for kind in (GRPOTrainer, RLOOTrainer):
        with pytest.raises(ValueError, match="use_vllm=True writes paths one after the other"):
            kind._generate_single_turn(trainer, [[1]], None, {})


BY_NAME = """
import sys
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

assert not any("multiverse" in name for name in sys.modules)
rows = Dataset.from_list([{"prompt": "A=5+6;", "chosen": "B", "rejected": "C"}] * 2)
args = DPOConfig("run", use_cpu=True, bf16=False, report_to=[], save_strategy="no", trust_remote_code=True)
trainer = DPOTrainer(sys.argv[1], args=args, train_dataset=rows)
assert "multiverse_hf" not in sys.modules
for model in (trainer.model, trainer.ref_model):
    print(type(model).__mro__[1].__module__.split(".")[-1], model.config.architectures)
trainer.save_model("saved")
"""


@pytest.mark.slow
def test_where_nothing_of_ours_is_imported_trust_remote_code_gives_the_multiverse_class(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME, str(folder)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["modeling_multiverse ['Qwen3ForCausalLM']"] * 2
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert (tmp_path / "saved/modeling_multiverse.py").is_file()
