"""Fine-tune a causal language model on Multiverse documents with TRL's SFTTrainer.

    python recipes/sft.py --config recipes/own-documents/sft.yaml                     # one device
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/sft.py \\
      --config recipes/qwen2.5-7b/sft.yaml --dataset_name my-documents.jsonl          # many

Every key of the YAML file can be overridden on the command line, e.g. ``--learning_rate 5e-6``. A killed run goes on
with ``--resume_from_checkpoint true``. ``--check_rows`` reads and checks the rows, says what would be dropped, and
stops; with ``--use_cpu`` on a machine without a GPU too. ``--strict`` ends at any row that is dropped or doubtful.

Unless told otherwise it makes the paper's eight passes (parallel_share), attends without a mask of L x L
(attn_implementation: flex_attention on a GPU, multiverse_sdpa elsewhere), and logs to TensorBoard (report_to).
"""

import json
import math
from pathlib import Path

import torch
from transformers import set_seed

from multiverse_hf.errors import CommandError, install_line, one_line

try:
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, get_peft_config

    from multiverse_hf.training.arguments import DataArguments, Parser, check_arguments  # noqa: F401
    from multiverse_hf.training.splits import read_splits
    from multiverse_hf.training.trainer import MultiverseSFTTrainer
except ModuleNotFoundError as err:
    raise SystemExit(f"sft.py: {err.name} is missing; {install_line('train')}") from None

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.curriculum import CurriculumSampler
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.modeling.threads import WIDTHS, best_threads
from multiverse_hf.outputs import write_output
from multiverse_hf.training.generations import GenerationCallback
from multiverse_hf.training.models import load_for_training, trainable_tokens
from multiverse_hf.training.report import finish_run
from multiverse_hf.training.runs import check_same_run, claim, describe_run, errors_in_a_line, find_checkpoint


def train(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    # Model
    output = Path(training.output_dir)
    if not data.check_rows:
        training.resume_from_checkpoint = find_checkpoint(output, training.resume_from_checkpoint)
    set_seed(training.seed)
    base = load_for_training(data, training, model_args)

    # Data
    encoder = RowEncoder(base.tokenizer, base.tags, training.max_length, data.overlong == "cut", data.suffix)
    splits = read_splits(data, encoder, training, model_args.attn_implementation)
    if data.check_rows:
        if data.dataset_name != "chains" and training.process_index == 0:
            print(f"see one: multiverse inspect {data.dataset_name} --line 1 --model {model_args.model_name_or_path}")
        return
    train_dataset = Dataset.from_dict(splits.train.columns())
    eval_dataset = Dataset.from_dict(splits.eval_columns()) if splits.test else None
    sampler = CurriculumSampler(
        splits.train.choices,
        data.parallel_share,
        training.seed if training.data_seed is None else training.data_seed,
        shuffle=training.train_sampling_strategy != "sequential",
        max_length=training.max_length if data.pack_rows else None,
        group=data.bucket_batches,
        batch_size=training.per_device_train_batch_size,
        num_epochs=max(len(data.parallel_share), int(training.num_train_epochs)),
        step=training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
    )
    check_steps(data, training, len(sampler))
    attention = base.model.config._attn_implementation
    collator = DocumentCollator(
        base.tags,
        base.tokenizer.pad_token_id,
        multiple=128 if attention == "flex_attention" else 1,
        flatten="flash" in attention,
    )

    # Trainer
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.trainable_token_indices = trainable_tokens(base.model, base.new_ids)
        peft_config.revision = model_args.model_revision
    try:
        trainer = MultiverseSFTTrainer(
            model=base.model,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=base.tokenizer,
            peft_config=peft_config,
            sampler=sampler,
        )
    except (ValueError, ImportError, RuntimeError, TypeError) as err:  # a report_to not installed, a LoRA target
        raise CommandError(one_line(err)) from err
    if trainer.is_fsdp_enabled and peft_config is not None and base.new_ids:
        raise CommandError(
            f"LoRA under FSDP cannot train the tags that {model_args.model_name_or_path} lacks (PEFT's trainable "
            "tokens cannot be spread over processes); use recipes/accelerate/ddp.yaml, with load_in_4bit if a GPU "
            "cannot hold the model"
        )
    if splits.test is not None and data.eval_generations:
        records = splits.test.records[: data.eval_generations]
        trainer.add_callback(GenerationCallback(trainer, encoder, records, splits.eval_form, data.eval_max_new_tokens))

    # Train
    record = describe_run(data, training, model_args, splits, train_dataset, encoder, base.model)
    check_same_run(training.resume_from_checkpoint, record)
    if trainer.is_world_process_zero() and not (output / "begun.json").exists():
        write_output(output / "begun.json", json.dumps(record, indent=1, default=str) + "\n")
    own = torch.get_num_threads()
    torch.set_num_threads(best_threads(base.model, WIDTHS[-1]) or own)  # a tiny model trains best on one
    try:
        result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finally:
        torch.set_num_threads(own)
    base.model.config.use_cache = True  # the trainer turned it off

    # Save
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        finish_run(record, trainer, result.metrics)
        if peft_config is not None:
            print(f"to an ordinary checkpoint: multiverse merge --adapter {output} --output {output}-merged")
        if training.push_to_hub:
            trainer.push_to_hub()


def check_steps(data: DataArguments, training: SFTConfig, num_rows: int) -> None:
    """Check that a run of so many steps reaches every epoch that the curriculum names.

    Raises:
        CommandError: if it does not.
    """
    rows = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    epochs = rows * training.world_size / num_rows
    if training.max_steps > 0 and epochs <= len(data.parallel_share) - 1:
        raise CommandError(
            f"max_steps {training.max_steps} end in epoch {math.ceil(epochs)} of the {len(data.parallel_share)} that "
            "parallel_share names; raise max_steps, or name fewer"
        )


def main() -> None:
    usage = "accelerate launch recipes/sft.py --config FILE [--option value ...]"
    parser = Parser((DataArguments, SFTConfig, ModelConfig), usage=usage, description=__doc__)
    with errors_in_a_line():
        data, training, model_args = parser.parse()
        with claim(Path(training.output_dir), training.process_index == 0 and not data.check_rows):
            train(data, training, model_args)


if __name__ == "__main__":
    main()
