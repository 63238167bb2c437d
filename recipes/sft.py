"""Fine-tune a model on Multiverse documents with TRL's SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/multiverse-tiny/sft.yaml

Every key of the YAML file can be overridden on the command line, e.g. ``--learning_rate 5e-4``. The trainer is a stock
one: the collator lays rows out, and the model would do so itself. Full fine-tuning only, on the chains family.
"""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
from transformers import set_seed

try:
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser
except ModuleNotFoundError as err:
    raise SystemExit(f"sft.py: {err.name} is missing; pip install -c constraints.txt -e '.[train]'") from None

from multiverse_hf.checkpoints import (
    USAGE,
    CommandError,
    check_output,
    load_weights,
    one_line,
    open_checkpoint,
    write_output,
)
from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.rows import encode_row


@dataclass
class DataArguments:
    """What to train on."""

    num_rows: int = field(default=50_000, metadata={"help": "rows of the chains family"})
    rows_seed: int = field(default=1, metadata={"help": "seed of the rows"})
    sequential: bool = field(default=False, metadata={"help": "sequential rows only: the autoregressive twin"})
    sequential_share: float = field(default=0.15, metadata={"help": "share of sequential rows otherwise"})
    plain_share: float = field(default=0.15, metadata={"help": "share of parallel rows read as plain causal text"})
    ramp: float = field(default=0.6, metadata={"help": "share of the rows over which chains grow to full length"})
    bucket_batches: int = field(default=32, metadata={"help": "batches within which rows are grouped by length"})


def group_by_length(rows: list[dict[str, list[int]]], batch_size: int, bucket_batches: int, seed: int) -> list[int]:
    """Order rows so that a batch holds rows of like length, without moving any further than its bucket."""
    order: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    size = batch_size * bucket_batches
    for begin in range(0, len(rows), size):
        bucket = sorted(range(begin, min(begin + size, len(rows))), key=lambda i: len(rows[i]["input_ids"]))
        batches = [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        order += [i for b in torch.randperm(len(batches), generator=generator).tolist() for i in batches[b]]
    return order


class Parser(TrlParser):
    """TRL's parser, which would print the usage of its hundreds of options before an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\n")


def check_arguments(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Check what would fail late, or harm a run that is there.

    Raises:
        CommandError: with the way out.
    """
    if model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit:
        raise CommandError("this recipe does full fine-tuning only; leave out use_peft, load_in_4bit and load_in_8bit")
    counts = {"bucket_batches": data.bucket_batches}
    counts |= {n: getattr(training, n) for n in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    for name, count in counts.items():
        if count < 1:
            raise CommandError(f"{name} must be at least 1, got {count}")
    if training.learning_rate < 0:
        raise CommandError(f"learning_rate must be at least 0, got {training.learning_rate}")
    if training.max_steps < 1 and training.num_train_epochs <= 0:
        raise CommandError(f"num_train_epochs must be above 0, got {training.num_train_epochs}; or give max_steps")

    output, resume = Path(training.output_dir), training.resume_from_checkpoint
    check_output(output, is_folder=True)
    if resume:
        start = output if resume is True else Path(resume)
        if not any(start.glob("checkpoint-*" if resume is True else "trainer_state.json")):
            raise CommandError(f"{start} holds no checkpoint to resume from; leave out resume_from_checkpoint")
    elif (output / "run.json").exists():
        raise CommandError(f"{output} holds a finished run; choose another output_dir, or move it away")
    elif any(output.glob("checkpoint-*")):
        raise CommandError(
            f"{output} holds an unfinished run; go on with it (--resume_from_checkpoint true), choose another "
            "output_dir, or move it away"
        )


def main() -> None:
    parser = Parser((DataArguments, SFTConfig, ModelConfig))
    try:
        data, training, model_args = parser.parse_args_and_config()
    except Exception as err:  # a config file is input: yaml, TRL and transformers raise errors of their own
        parser.error(one_line(err))
    training.remove_unused_columns = False  # the collator wants `plain`
    training.max_length = None  # rows are whole documents; truncation would cut blocks
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    if training.resume_from_checkpoint in ("true", "True"):  # the command line gives a string
        training.resume_from_checkpoint = True
    try:
        mixture = ChainsMixture(
            num_rows=data.num_rows,
            seed=data.rows_seed,
            sequential=data.sequential,
            sequential_share=data.sequential_share,
            plain_share=data.plain_share,
            ramp=data.ramp,
        )
        check_arguments(data, training, model_args)
        set_seed(training.seed)
        checkpoint = open_checkpoint(model_args.model_name_or_path or "", model_args.model_revision)
        tokenizer, tags = checkpoint.tokenizer, checkpoint.tags
        if tokenizer.pad_token_id is None:
            raise CommandError(f"{checkpoint.name} has no padding token; name one in its tokenizer_config.json")
        model = load_weights(checkpoint, model_args.dtype or "float32", model_args.attn_implementation)
    except (CommandError, ValueError) as err:
        parser.error(str(err))

    rows = [encode_row(tokenizer, tags, row.prompt, row.document, row.plain) for row in mixture]
    order = group_by_length(rows, training.per_device_train_batch_size, data.bucket_batches, data.rows_seed)
    dataset = Dataset.from_list([rows[i] for i in order])

    try:
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=dataset,
            data_collator=DocumentCollator(tags, tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
    except (ValueError, ImportError, RuntimeError) as err:  # a report_to that is not installed, an evaluation
        parser.error(one_line(err))
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    model.config.use_cache = True  # the trainer turned it off
    trainer.save_model(training.output_dir)

    if not trainer.is_world_process_zero():
        return
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    record = {
        "data": asdict(data)
        | {"fingerprint": dataset._fingerprint, "num_tokens": sum(map(len, dataset["input_ids"]))},
        "training": training.to_dict(),
        "model": asdict(model_args),
        "metrics": result.metrics,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
    write_output(Path(training.output_dir, "run.json"), json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
