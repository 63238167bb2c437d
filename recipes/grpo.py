"""Train a Multiverse model by reinforcement learning (GRPO), with rewards that you name.

    python recipes/grpo.py --config recipes/multiverse-tiny/grpo.yaml                            # chains, on a CPU
    python recipes/grpo.py --config recipes/multiverse-tiny/grpo.yaml --rewards my_reward.py:score
    python recipes/grpo.py --config recipes/smollm2-135m/grpo.yaml --dataset_name rg:leg_counting,size=1000

``--rewards right acceleration --reward_weights 1 1`` names rewards of multiverse_hf.evaluation.rewards, or functions
of your own file. Every key of the YAML file can be overridden on the command line. A killed run goes on with
``--resume_from_checkpoint true``.

``--scale_rewards none`` centres rewards in their group (the default); ``group`` also divides by the standard deviation
of the group, ``batch`` by that of the batch. ``--beta 0.04`` adds the divergence from a reference model.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from multiverse_hf import embedded_model
from multiverse_hf.errors import CommandError, install_line, one_line

try:
    from datasets import Dataset
    from trl import GRPOConfig, ModelConfig, get_peft_config

    from multiverse_hf.training.arguments import Parser
    from multiverse_hf.training.grpo import MultiverseGRPOTrainer
except ModuleNotFoundError as err:
    raise SystemExit(f"grpo.py: {err.name} is missing; {install_line('train')}") from None

from multiverse_hf.data.records import RowError, number_rows
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.evaluation.chains import chains_rows
from multiverse_hf.evaluation.rewards import find_reward, make_prompts
from multiverse_hf.modeling.threads import WIDTHS, best_threads
from multiverse_hf.outputs import check_output, write_output
from multiverse_hf.provenance import versions
from multiverse_hf.training.models import default_attention, load_base
from multiverse_hf.training.runs import check_same_run, claim, errors_in_a_line, find_checkpoint


@dataclass
class TaskArguments:
    """The problems, and what an answer is worth."""

    dataset_name: list[str] = field(
        default_factory=lambda: ["chains"],
        metadata={"help": "chains, generators such as rg:gcd,size=1000, or a file or dataset with prompt and answer"},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "split of a dataset"})
    num_rows: int = field(default=2000, metadata={"help": "chains: number of problems"})
    rows_seed: int = field(default=1, metadata={"help": "chains: seed of the problems"})
    rewards: list[str] = field(
        default_factory=lambda: ["right", "well_formed", "acceleration"],
        metadata={"help": "right, well_formed, acceleration, longest_path, trivial_forks, or file.py:name"},
    )
    reward_timeout: float = field(default=60.0, metadata={"help": "seconds that a reward may take for one answer"})
    stop_on_collapse: bool = field(default=False, metadata={"help": "end the run where answers collapse"})
    share_prompt: bool = field(
        default=False, metadata={"help": "compute what completions of one prompt begin with once, for less work"}
    )

    def __post_init__(self) -> None:
        for name in ("dataset_name", "rewards"):
            if isinstance(value := getattr(self, name), str):  # a YAML file may name one without brackets
                setattr(self, name, [value])


def read_problems(task: TaskArguments) -> Any:
    """Return the dataset of problems, with prompts as chat messages.

    Raises:
        CommandError: if it cannot be read, or a row has no prompt.
    """
    if all(name.startswith("rg:") for name in task.dataset_name):
        return make_prompts(*task.dataset_name)
    if len(task.dataset_name) > 1:
        raise CommandError(
            f"dataset_name has {len(task.dataset_name)} names, {' '.join(task.dataset_name)}; only generators "
            "(rg:...) can be joined, so name one"
        )
    (dataset_name,) = task.dataset_name
    if dataset_name == "chains":
        rows = [
            {"prompt": Suffix.PARALLEL.end(row["problem"]), "answer": row["answer"], "task": "chains"}
            for row in chains_rows(task.num_rows, task.rows_seed)
        ]
    else:
        rows = []
        try:
            for number, row in number_rows(dataset_name, split=task.dataset_train_split):
                if isinstance(row, RowError) or not row.get("prompt"):
                    raise CommandError(f"{dataset_name}, row {number} has no prompt; each row needs one")
                rows.append(dict(row))
        except ValueError as err:
            raise CommandError(one_line(err)) from err
    if not rows:
        raise CommandError(f"{dataset_name} has no rows; give problems to train on")
    for row in rows:
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return Dataset.from_list(rows)


def train(task: TaskArguments, training: GRPOConfig, model_args: ModelConfig) -> None:
    # Model and problems
    output = Path(training.output_dir)
    training.resume_from_checkpoint = find_checkpoint(output, training.resume_from_checkpoint)
    rewards = [find_reward(name, task.reward_timeout) for name in task.rewards]
    problems = read_problems(task)
    set_seed(training.seed)
    name = model_args.model_name_or_path
    attention = model_args.attn_implementation or default_attention(training.device.type, True)
    try:
        base = load_base(
            embedded_model() if name == "embedded" else name,
            model_args.model_revision,
            dtype=model_args.dtype or "float32",
            attn_implementation=attention,
        )
    except Exception as err:  # a checkpoint is input
        raise CommandError(f"cannot load {name}: {one_line(err)}") from err
    if base.new_ids:
        raise CommandError(f"{name} has no tags, so it cannot branch yet; fine-tune it first (recipes/sft.py)")

    # Trainer
    try:
        trainer = MultiverseGRPOTrainer(
            model=base.model,
            reward_funcs=rewards,
            args=training,
            train_dataset=problems,
            processing_class=base.tokenizer,
            peft_config=get_peft_config(model_args),
            stop_on_collapse=task.stop_on_collapse,
            share_prompt=task.share_prompt,
        )
    except (ValueError, ImportError, RuntimeError, TypeError) as err:
        raise CommandError(one_line(err)) from err
    record = {
        "data": asdict(task),
        "training": training.to_dict(),
        "model": asdict(model_args),
        "processes": training.world_size,
        "versions": versions("trl", "accelerate", "peft"),
    }
    check_same_run(training.resume_from_checkpoint, record)
    if trainer.is_world_process_zero() and not (output / "begun.json").exists():
        write_output(output / "begun.json", json.dumps(record, indent=1, default=str) + "\n")

    # Train and save
    own = torch.get_num_threads()
    torch.set_num_threads(best_threads(base.model, WIDTHS[-1]) or own)
    try:
        result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finally:
        torch.set_num_threads(own)
    base.model.config.use_cache = True  # the trainer turned it off
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        record |= {"metrics": result.metrics, "log": trainer.state.log_history}
        write_output(output / "run.json", json.dumps(record, indent=1, default=str) + "\n")
        (output / "begun.json").unlink(missing_ok=True)


def main() -> None:
    usage = "accelerate launch recipes/grpo.py --config FILE [--option value ...]"
    parser = Parser((TaskArguments, GRPOConfig, ModelConfig), usage=usage, description=__doc__)
    parser.set_defaults(num_train_epochs=1.0, scale_rewards="none", model_name_or_path="embedded")
    with errors_in_a_line():
        task, training, model_args = parser.parse_args_and_config()
        parser.check_base(model_args.model_name_or_path)
        check_output(Path(training.output_dir), is_folder=True)
        with claim(Path(training.output_dir), training.process_index == 0):
            train(task, training, model_args)


if __name__ == "__main__":
    main()
