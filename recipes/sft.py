"""Fine-tune a causal language model on Multiverse documents with TRL's SFTTrainer.

    accelerate launch recipes/sft.py --config recipes/multiverse-tiny/sft.yaml
    accelerate launch recipes/sft.py --config recipes/llama3.1-8b/sft_lora.yaml --dataset_name my-documents.jsonl
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/sft.py \\
      --config recipes/qwen2.5-7b/sft.yaml --model_name_or_path Qwen/Qwen2.5-7B --dataset_name my-documents.jsonl

Every key of the YAML file can be overridden on the command line, e.g. ``--learning_rate 5e-6``. A killed run goes on
with ``--resume_from_checkpoint true``. ``--check_rows`` reads and checks the rows, says what would be dropped, and
stops; with ``--use_cpu`` on a machine without a GPU too.

Unless told otherwise it makes the paper's eight passes (parallel_share), attends without a mask of L x L
(attn_implementation: flex_attention on a GPU, multiverse_sdpa elsewhere), and logs to TensorBoard (report_to).
"""

import argparse
import errno
import json
import math
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers import set_seed
from transformers.integrations import is_tensorboard_available
from transformers.utils import is_liger_kernel_available

try:
    from datasets import Dataset
    from tqdm.auto import tqdm
    from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config
except ModuleNotFoundError as err:
    raise SystemExit(f"sft.py: {err.name} is missing; pip install -c constraints.txt -e '.[train]'") from None

from multiverse_hf import __version__
from multiverse_hf.data.building import TrainingRows, build_rows
from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.curriculum import PAPER_SHARES, CurriculumSampler, paper_shares
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.data.records import Form, load_rows
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.errors import FAILURE, INTERRUPTED, USAGE, CommandError, one_line
from multiverse_hf.outputs import check_output, write_output
from multiverse_hf.training.generations import GenerationCallback
from multiverse_hf.training.models import Base, Tokens, default_attention, load_base, load_tokens, trainable_tokens
from multiverse_hf.training.report import draw_run, write_page
from multiverse_hf.training.runs import check_same_run, claim, find_checkpoint
from multiverse_hf.training.trainer import MultiverseSFTTrainer


@dataclass
class DataArguments:
    """What to train on, and in which form."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "a .jsonl, .json, .parquet or .csv file, a folder, a dataset on the Hub, or 'chains'"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "of a dataset that has several"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str | None = field(default=None, metadata={"help": "split to evaluate on"})
    eval_rows: int = field(
        default=0, metadata={"help": "the last so many rows are held out, unless there is dataset_test_split"}
    )
    eval_generations: int = field(default=8, metadata={"help": "rows whose prompts are answered at an evaluation"})
    eval_max_new_tokens: int = field(default=2048, metadata={"help": "length of such an answer, at most"})
    parallel_share: list[float] | None = field(
        default=None,
        metadata={
            "help": "share of rows in parallel form, one for each epoch or one for all; the rest is sequential. "
            "0 is the autoregressive baseline. Not given: the paper's '0 0 0.1 0.5 0.5 0.9 1 1' over eight epochs, "
            "the same way from 0 to 1 over another number of them, 1 with a single one or with max_steps"
        },
    )
    overlong: str = field(
        default="drop", metadata={"help": "rows above max_length: drop, or cut where no block is open"}
    )
    suffix: bool = field(default=True, metadata={"help": "end prompts with the sentence of record of their form"})
    system_prompt: str | None = field(default=None, metadata={"help": "said before chats without a system message"})
    tags: str | None = field(default=None, metadata={"help": "tag family for a base without tags: multiverse or npr"})
    pack_rows: bool = field(default=False, metadata={"help": "pack documents into rows of up to max_length tokens"})
    bucket_batches: int = field(
        default=32, metadata={"help": "without packing: batches within which rows are grouped by length; 0 for none"}
    )
    check_rows: bool = field(
        default=False, metadata={"help": "only read and check the rows, without the model's weights"}
    )
    num_rows: int = field(default=50_000, metadata={"help": "chains: rows"})
    rows_seed: int = field(default=1, metadata={"help": "chains: seed of the rows"})
    sequential: bool = field(default=False, metadata={"help": "chains: sequential rows only, the autoregressive twin"})
    sequential_share: float = field(default=0.15, metadata={"help": "chains: share of sequential rows otherwise"})
    plain_share: float = field(default=0.15, metadata={"help": "chains: share of parallel rows read as plain text"})
    ramp: float = field(
        default=0.6, metadata={"help": "chains: share of the rows over which they grow to full length"}
    )
    max_chains: int = field(default=8, metadata={"help": "chains: the most chains of a problem, 3 to 8"})
    max_ops: int = field(default=8, metadata={"help": "chains: the most operations of a chain, 2 to 8"})


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults of options, and the description as it is written."""


class Parser(TrlParser):
    """TRL's parser with this recipe's defaults; it would print the usage of hundreds of options before an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults(
            num_train_epochs=float(len(PAPER_SHARES)),
            report_to="tensorboard" if is_tensorboard_available() else "none",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message}\n")


def check_arguments(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Check what would fail late, or harm a run that is there.

    Raises:
        CommandError: with the way out.
    """
    if not data.dataset_name:
        raise CommandError("dataset_name is missing; name a file, a folder, a dataset on the Hub, or chains")
    counts = {"eval_max_new_tokens": data.eval_max_new_tokens}
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    counts |= {name: getattr(training, name) for name in sizes}
    counts |= {"max_length": training.max_length} if training.max_length is not None else {}
    for name, count in counts.items():
        if count < 1:
            raise CommandError(f"{name} must be at least 1, got {count}")
    for name in ("eval_rows", "eval_generations", "bucket_batches"):
        if getattr(data, name) < 0:
            raise CommandError(f"{name} must be at least 0, got {getattr(data, name)}")
    if data.overlong not in ("drop", "cut"):
        raise CommandError(f"overlong is drop or cut, got {data.overlong!r}")
    shares = data.parallel_share or []
    if not all(0 <= share <= 1 for share in shares):
        raise CommandError(f"parallel_share is a share from 0 to 1 for each epoch, got {shares}")
    named = len(shares)
    if named > 1 and training.max_steps < 1 and named != training.num_train_epochs:
        raise CommandError(
            f"parallel_share names {named} epochs and num_train_epochs is {training.num_train_epochs:g}; make the two "
            "agree"
        )
    if data.pack_rows and training.max_length is None:
        raise CommandError("pack_rows needs max_length: the most tokens a packed row may have")
    if training.packing or training.padding_free:
        raise CommandError("packing and padding_free of TRL know nothing of paths; use pack_rows")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise CommandError("quantized weights cannot be trained themselves; add use_peft, or leave out load_in_4bit")
    for name in ("learning_rate", "num_train_epochs"):
        if not math.isfinite(getattr(training, name)):
            raise CommandError(f"{name} must be a number, got {getattr(training, name)}")
    if training.learning_rate < 0:
        raise CommandError(f"learning_rate must be at least 0, got {training.learning_rate}")
    if training.use_liger_kernel and not is_liger_kernel_available():  # transformers would say so after all the rows
        raise CommandError("use_liger_kernel needs liger-kernel: pip install 'multiverse_hf[liger]'; or leave it out")
    if training.label_smoothing_factor:
        raise CommandError("label_smoothing_factor builds all logits, which this recipe never does; leave it out")
    if training.max_steps < 1 and training.num_train_epochs <= 0:
        raise CommandError(f"num_train_epochs must be above 0, got {training.num_train_epochs}; or give max_steps")
    is_file = Path(data.dataset_name).suffix in (".jsonl", ".json", ".parquet", ".csv")
    is_one = is_file or data.dataset_name == "chains"
    if is_one and (data.dataset_test_split or data.dataset_config or data.dataset_train_split != "train"):
        kind = "is a file and has" if is_file else "are made and have"
        raise CommandError(f"{data.dataset_name} {kind} no splits; hold rows out with eval_rows")
    if training.eval_strategy != "no" and not (data.dataset_test_split or data.eval_rows):
        raise CommandError("an evaluation needs rows; give dataset_test_split or eval_rows")

    check_output(Path(training.output_dir), is_folder=True)


def settle(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Set what was left open: the curriculum, and the attention implementation; and say so once."""
    said = []
    if data.parallel_share is None:
        one = training.max_steps > 0  # which end wherever they end
        data.parallel_share = paper_shares(1 if one else math.ceil(training.num_train_epochs))
        shares = " ".join(f"{share:g}" for share in data.parallel_share)
        said.append(f"parallel_share {shares}{', in all epochs' if one else ', by epoch'}")
    if model_args.attn_implementation is None:
        has_paths = max(data.parallel_share) > 0 and not data.sequential
        model_args.attn_implementation = default_attention(training.device.type, has_paths or data.pack_rows)
        said.append(f"attn_implementation {model_args.attn_implementation}")
    if said and training.process_index == 0:
        print(f"chosen, as not given: {'; '.join(said)}")


def load_model(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> Base | Tokens:
    """Load the base model, and give it tags where it has none. Rows are checked without its weights.

    Raises:
        CommandError: if there is none, or it cannot be trained on documents.
    """
    name = model_args.model_name_or_path or ""
    if not name.strip():
        raise CommandError(
            "the model's name is empty; give model_name_or_path a folder, or a repository as owner/name"
        )
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise CommandError(f"no model folder {name}; give an existing one")
    # rows are encoded before the trainer is made, so what it would do to tokenizer and model is done here
    template, training.chat_template_path = training.chat_template_path, None
    if template is not None and not Path(template).is_file():
        raise CommandError(f"chat_template_path is a file of Jinja text, and {template} is none")
    options, training.model_init_kwargs = dict(training.model_init_kwargs or {}), None
    try:
        if template is not None:
            template = Path(template).read_text(encoding="utf-8")
        quantization = get_quantization_config(model_args)
        if quantization is not None:
            options["quantization_config"] = quantization
        path = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        revision = model_args.model_revision
        tokens = load_tokens(path, revision, data.tags, chat_template=template, eos_token=training.eos_token)
        if data.check_rows:
            return tokens
        return load_base(
            path,
            revision,
            tokens,
            dtype=model_args.dtype or "float32",
            attn_implementation=model_args.attn_implementation,
            **options,
        )
    except Exception as err:  # a checkpoint is input: safetensors, pickle, json and the Hub raise errors of their own
        raise CommandError(f"cannot load {name}: {one_line(err)}") from err


def read_rows(data: DataArguments, encoder: RowEncoder, forms: list[Form], split: str, is_main: bool) -> TrainingRows:
    """Read, check and encode the rows of a split.

    Raises:
        CommandError: if there is no such dataset, or not one row of it can be trained on.
    """
    source: Iterable[Any]
    if data.dataset_name == "chains":
        mixture = ChainsMixture(
            num_rows=data.num_rows,
            seed=data.rows_seed,
            sequential=data.sequential,
            sequential_share=data.sequential_share,
            plain_share=data.plain_share,
            ramp=data.ramp,
            max_chains=data.max_chains,
            max_ops=data.max_ops,
        )
        source = (row.record() for row in mixture)
    else:
        source = load_rows(data.dataset_name, data.dataset_config, split)
    try:
        bar = tqdm(source, desc=f"{split} rows", unit=" rows", disable=not is_main)
        built = build_rows(bar, encoder, forms, data.system_prompt)
    except ValueError as err:
        raise CommandError(one_line(err)) from err
    if not built.records:
        raise CommandError(
            f"{data.dataset_name}: none of {built.report.num_rows} rows can be trained on"
            + "".join(f"; the first: {entry['reason']}: {entry['detail']}" for entry in built.report.dropped[:1])
        )
    return built


def say_rows(built: TrainingRows, split: str, path: Path, keep: bool) -> None:
    """Say what was read and what was dropped, and write the list of it, unless a finished run's is to be kept."""
    print(f"{split} rows: {json.dumps(built.report.summary())}\n{built.describe()}")
    for entry in built.report.dropped[:5]:
        print(f"  row {entry['row']}: {entry['reason']}: {one_line(entry['detail'], 160)}")
    if not keep:
        write_output(path, built.report.lines())
        print(f"all that was dropped: {path}")


def hold_out(built: TrainingRows, count: int) -> tuple[TrainingRows, TrainingRows]:
    """Part the last records from the others, for evaluation.

    Raises:
        CommandError: if nothing is left to train on.
    """
    if count >= len(built.records):
        raise CommandError(f"eval_rows holds out {count} of {len(built.records)} rows; leave some to train on")
    at = len(built.records) - count
    first, last = (
        TrainingRows(records, built.rows, choices, built.report)
        for records, choices in (
            (built.records[:at], built.choices[:at]),
            (built.records[at:], built.choices[at:]),
        )
    )
    return first, last


def main() -> None:
    usage = "accelerate launch recipes/sft.py --config FILE [--option value ...]"
    dataclasses = (DataArguments, SFTConfig, ModelConfig)
    parser = Parser(dataclasses, usage=usage, description=__doc__, formatter_class=Help)
    try:
        data, training, model_args = parser.parse_args_and_config()
    except Exception as err:  # a config file is input: yaml, TRL and transformers raise errors of their own
        parser.error(one_line(err))
    training.remove_unused_columns = False  # the collator wants `plain` and `kinds`
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    said = str(training.resume_from_checkpoint).lower()  # the command line gives a string
    if said in ("true", "false"):
        training.resume_from_checkpoint = True if said == "true" else None
    output, max_length = Path(training.output_dir), training.max_length
    lock = None
    try:
        check_arguments(data, training, model_args)
        settle(data, training, model_args)
        if not data.check_rows:
            training.resume_from_checkpoint = find_checkpoint(output, training.resume_from_checkpoint)
            lock = claim(output) if training.process_index == 0 else None
        set_seed(training.seed)
        base = load_model(data, training, model_args)
        tokenizer = base.tokenizer

        # Rows
        encoder = RowEncoder(tokenizer, base.tags, training.max_length, data.overlong == "cut", data.suffix)
        wanted = {Form.PARALLEL: max(data.parallel_share) > 0, Form.SEQUENTIAL: min(data.parallel_share) < 1}
        forms = [form for form, is_wanted in wanted.items() if is_wanted]
        eval_form = Form.SEQUENTIAL if data.parallel_share[-1] < 0.5 or data.sequential else Form.PARALLEL
        is_main = training.process_index == 0
        train, test = read_rows(data, encoder, forms, data.dataset_train_split, is_main), None
        if data.dataset_test_split:
            test = read_rows(data, encoder, [eval_form], data.dataset_test_split, is_main)
            if data.eval_rows and is_main:
                print(f"evaluated on the split {data.dataset_test_split}; no rows are held out (eval_rows)")
        elif data.eval_rows:
            train, test = hold_out(train, data.eval_rows)
        if is_main:
            keep = data.check_rows and (output / "run.json").exists()
            say_rows(train, data.dataset_train_split, output / "dropped_rows.jsonl", keep)
            if data.dataset_test_split:
                say_rows(test, data.dataset_test_split, output / "dropped_test_rows.jsonl", keep)
        if data.check_rows:
            return
        model = base.model
        implementation = model.config._attn_implementation
        has_blocks = any(document_has_blocks(record) for record in train.records) and Form.PARALLEL in forms
        if "flash" in implementation and has_blocks:
            raise CommandError(
                f"attn_implementation {implementation} cannot mask sibling paths; use flex_attention, or "
                "parallel_share 0 for the autoregressive baseline"
            )
        if implementation == "flex_attention" and training.device.type == "cpu":
            raise CommandError(
                "flex_attention cannot train without a GPU (torch has no backward for it); use multiverse_sdpa"
            )
    except (CommandError, ValueError) as err:
        parser.error(str(err))
    columns = ("input_ids", "labels", "kinds", "plain")
    dataset = Dataset.from_dict({name: [row[name] for row in train.rows] for name in columns})
    eval_dataset = None
    if test is not None:
        places = [c.parallel if eval_form is Form.PARALLEL else c.sequential for c in test.choices]
        eval_dataset = Dataset.from_dict({name: [test.rows[at][name] for at in places] for name in columns})

    # Trainer
    sampler = CurriculumSampler(
        train.choices,
        data.parallel_share,
        training.seed if training.data_seed is None else training.data_seed,
        shuffle=training.train_sampling_strategy != "sequential",
        max_length=training.max_length if data.pack_rows else None,
        group=data.bucket_batches,
        batch_size=training.per_device_train_batch_size,
        num_epochs=max(len(data.parallel_share), int(training.num_train_epochs)),
        step=training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
    )
    steps = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    epochs = steps * training.world_size / len(sampler)
    if training.max_steps > 0 and epochs <= len(data.parallel_share) - 1:
        parser.error(
            f"max_steps {training.max_steps} end in epoch {math.ceil(epochs)} of the {len(data.parallel_share)} that "
            "parallel_share names; raise max_steps, or name fewer"
        )
    training.max_length = None  # rows are as long as they shall be; truncation would cut blocks
    collator = DocumentCollator(
        base.tags,
        tokenizer.pad_token_id,
        multiple=128 if implementation == "flex_attention" else 1,
        flatten="flash" in implementation,
    )
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.trainable_token_indices = trainable_tokens(model, base.new_ids)
        peft_config.revision = model_args.model_revision
    try:
        trainer = MultiverseSFTTrainer(
            model=model,
            args=training,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
            peft_config=peft_config,
            sampler=sampler,
        )
    except (ValueError, ImportError, RuntimeError, TypeError) as err:  # a report_to not installed, a LoRA target
        parser.error(one_line(err))
    if trainer.is_fsdp_enabled and peft_config is not None and base.new_ids:
        parser.error(
            f"LoRA under FSDP cannot train the tags that {model_args.model_name_or_path} lacks (PEFT's trainable "
            "tokens cannot be spread over processes); use recipes/accelerate/ddp.yaml, with load_in_4bit if a GPU "
            "cannot hold the model"
        )
    if test is not None and data.eval_generations:
        records = test.records[: data.eval_generations]
        trainer.add_callback(GenerationCallback(trainer, encoder, records, eval_form, data.eval_max_new_tokens))

    # Train
    packages = ("multiverse_hf", "torch", "transformers", "trl", "accelerate", "datasets", "peft")
    ours = ("num_rows", "rows_seed", "sequential", "sequential_share", "plain_share", "ramp", "max_chains", "max_ops")
    said_of_data = {k: v for k, v in asdict(data).items() if data.dataset_name == "chains" or k not in ours}
    record = {
        "data": said_of_data
        | {
            "fingerprint": dataset._fingerprint,
            "num_tokens": sum(map(len, dataset["input_ids"])),
            "rows": train.report.summary(),
            "trained_on": len(train.records),
            "test_rows": test.report.summary() if data.dataset_test_split else None,
        },
        "training": training.to_dict() | {"max_length": max_length},
        "model": asdict(model_args)
        | {"attn_implementation": implementation, "model_type": model.config.get_text_config().model_type},
        "processes": training.world_size,
        "versions": {name: find_version(name) for name in packages} | {"python": platform.python_version()},
    }
    begun = output / "begun.json"
    if training.resume_from_checkpoint:
        try:
            check_same_run(Path(training.resume_from_checkpoint).resolve().parent, record)
        except ValueError as err:
            parser.exit(FAILURE, f"error: {err}\n")
    if trainer.is_world_process_zero() and not begun.exists():
        write_output(begun, json.dumps(record, indent=1, default=str) + "\n")
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    model.config.use_cache = True  # the trainer turned it off
    trainer.save_model(training.output_dir)

    if not trainer.is_world_process_zero():
        return
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:  # the trainer's own, after a resume, is of the last part alone
        result.metrics["train_loss"] = sum(losses) / len(losses)
    last = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    record |= {
        "metrics": result.metrics,
        "last_evaluation": {k: v for entry in last if entry["step"] == last[-1]["step"] for k, v in entry.items()},
    }
    shares = [sampler.parallel_share(epoch) for epoch in range(max(1, round(trainer.state.epoch or 1)))]
    draw_run(output / "report.png", history, shares)
    write_output(output / "report.md", write_page(json.loads(json.dumps(record, default=str)), "report.png"))
    write_output(output / "run.json", json.dumps(record, indent=1, default=str) + "\n")
    begun.unlink(missing_ok=True)
    print(f"report: {output / 'report.md'}")
    if peft_config is not None:
        print(f"to an ordinary checkpoint: multiverse merge --adapter {output} --output {output}-merged")
    if training.push_to_hub:
        trainer.push_to_hub()
    if lock is not None:
        lock.close()
        (output / ".running").unlink(missing_ok=True)


def find_version(package: str) -> str:
    """Give a package's version; of ours also where it is not installed."""
    return __version__ if package == "multiverse_hf" else version(package)


def document_has_blocks(record: Any) -> bool:
    """Say whether a record's document forks."""
    return record.document.num_paths > 0


def run() -> None:
    """Train; what a user or a full disk ends, ends in a line."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; what was saved goes on with --resume_from_checkpoint true", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, RuntimeError, SafetensorError) as err:
        is_full = isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # as torch and safetensors say it
        if not is_full and not re.search(r"No space left|File too large|PytorchStreamWriter failed", str(err)):
            raise
        print(
            f"error: cannot write: {one_line(err, 120)}; make room, then --resume_from_checkpoint true",
            file=sys.stderr,
        )
        sys.exit(FAILURE)


if __name__ == "__main__":
    run()
