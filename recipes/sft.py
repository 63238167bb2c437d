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

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.rows import encode_row
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet


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


def main() -> None:
    parser = TrlParser((DataArguments, SFTConfig, ModelConfig))
    data, training, model_args = parser.parse_args_and_config()
    if model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("this recipe does full fine-tuning only; leave out use_peft, load_in_4bit and load_in_8bit")
    training.remove_unused_columns = False  # the collator wants `plain`
    training.max_length = None  # rows are whole documents; truncation would cut blocks
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    if training.resume_from_checkpoint in ("true", "True"):  # the command line gives a string
        training.resume_from_checkpoint = True
    set_seed(training.seed)

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tags = TagSet.from_tokenizer(tokenizer)
    model = MultiverseForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        tags=tags,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype or "float32",
    )

    mixture = ChainsMixture(
        data.num_rows, data.rows_seed, data.sequential, data.sequential_share, data.plain_share, data.ramp
    )
    rows = [encode_row(tokenizer, tags, row.prompt, row.document, row.plain) for row in mixture]
    order = group_by_length(rows, training.per_device_train_batch_size, data.bucket_batches, data.rows_seed)
    dataset = Dataset.from_list([rows[i] for i in order])

    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        data_collator=DocumentCollator(tags, tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
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
    Path(training.output_dir, "run.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
