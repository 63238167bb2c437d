"""Options of the recipe, read from a file and the command line, and checked."""

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers.integrations import is_tensorboard_available
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig, SFTConfig, TrlParser

from multiverse_hf.data.curriculum import PAPER_SHARES, paper_shares
from multiverse_hf.errors import CommandError, find_unknown, one_line
from multiverse_hf.modeling.gguf_files import split_path
from multiverse_hf.outputs import check_output
from multiverse_hf.training.models import default_attention


@dataclass
class DataArguments:
    """The rows to train on, and their forms."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "a .jsonl, .json, .parquet or .csv file, a folder, a dataset on the Hub, or 'chains'"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "config of a dataset that has several"})
    dataset_train_split: str = field(default="train", metadata={"help": "split to train on"})
    dataset_test_split: str | None = field(default=None, metadata={"help": "split to evaluate on"})
    eval_rows: int = field(
        default=0, metadata={"help": "number of last rows to hold out, unless there is dataset_test_split"}
    )
    eval_generations: int = field(default=8, metadata={"help": "number of prompts to answer at an evaluation"})
    eval_max_new_tokens: int = field(default=2048, metadata={"help": "longest such answer"})
    parallel_share: list[float] | None = field(
        default=None,
        metadata={
            "help": "share of rows in parallel form, one per epoch or one for all; the rest is sequential. 0 trains "
            "the autoregressive baseline. The default is the paper's '0 0 0.1 0.5 0.5 0.9 1 1' over eight epochs, "
            "the same curve over another number of epochs, or 1 with one epoch or with max_steps"
        },
    )
    overlong: str = field(
        default="drop", metadata={"help": "rows above max_length: drop, or cut where no block is open"}
    )
    suffix: bool = field(default=True, metadata={"help": "end prompts with the sentence of record of their form"})
    system_prompt: str | None = field(default=None, metadata={"help": "system message for chats without one"})
    tags: str | None = field(
        default=None, metadata={"help": "family for a base without tags: see multiverse families"}
    )
    pack_rows: bool = field(default=False, metadata={"help": "pack documents into rows of up to max_length tokens"})
    bucket_batches: int = field(
        default=32,
        metadata={"help": "without packing: number of batches within which rows are grouped by length; 0 for none"},
    )
    strict: bool = field(
        default=False, metadata={"help": "end the run if any row is dropped or doubtful, once all are read"}
    )
    check_rows: bool = field(
        default=False, metadata={"help": "only read and check the rows, without the model's weights"}
    )
    num_rows: int = field(default=50_000, metadata={"help": "chains: number of rows"})
    rows_seed: int = field(default=1, metadata={"help": "chains: seed of the rows"})
    sequential: bool = field(
        default=False, metadata={"help": "chains: only sequential rows, for the autoregressive twin"}
    )
    sequential_share: float = field(default=0.15, metadata={"help": "chains: share of sequential rows otherwise"})
    plain_share: float = field(default=0.15, metadata={"help": "chains: share of parallel rows read as plain text"})
    ramp: float = field(
        default=0.6, metadata={"help": "chains: share of the rows over which problems grow to full length"}
    )
    max_chains: int = field(default=8, metadata={"help": "chains: most chains of a problem, 3 to 8"})
    max_ops: int = field(default=8, metadata={"help": "chains: most operations of a chain, 2 to 8"})


# Options that only dataset_name chains uses.
OF_CHAINS = ("num_rows", "rows_seed", "sequential", "sequential_share", "plain_share", "ramp", "max_chains", "max_ops")
_EXAMPLE = "recipes/llama3.1-8b/sft_lora.yaml"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults of options, and the description with its own line breaks."""


class Parser(TrlParser):
    """TRL's parser with the recipe's defaults. It refuses abbreviated options, and its errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=Help, allow_abbrev=False, **kwargs)
        self.config = Path()  # the file that --config names
        self.set_defaults(
            num_train_epochs=float(len(PAPER_SHARES)),
            report_to="tensorboard" if is_tensorboard_available() else "none",
        )

    def parse(self) -> tuple[DataArguments, SFTConfig, ModelConfig]:
        """Return the checked options of the command line and its ``--config`` file, with defaults filled in.

        Raises:
            CommandError: if an option is invalid.
        """
        data, training, model_args = self.parse_args_and_config()
        check_arguments(data, training, model_args)
        self.check_base(model_args.model_name_or_path or "")
        fill_defaults(data, training, model_args)
        return data, training, model_args

    def parse_args_and_config(self, args: list[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Return the options as TRL does; ``--config=FILE`` works too.

        Raises:
            CommandError: if the file cannot be read, or an option is unknown or invalid.
        """
        words = [
            word
            for each in (sys.argv[1:] if args is None else args)
            for word in (each.split("=", 1) if each.startswith("--config=") else [each])
        ]
        if wrong := find_unknown(words, {*self._option_string_actions, "--config"}):
            raise CommandError(wrong)
        if "--config" in words:
            self.config = Path(next(iter(words[words.index("--config") + 1 :]), ""))
            if not self.config.is_file():
                raise CommandError(f"--config names no file: {self.config}; give a recipe's, such as {_EXAMPLE}")
        try:
            data, training, model_args = super().parse_args_and_config(words, **kwargs)
        except CommandError:
            raise
        except Exception as err:  # a config file is input: yaml, TRL and transformers raise errors of their own
            raise CommandError(one_line(err)) from err
        resume = str(training.resume_from_checkpoint).lower()  # a string from the command line
        if resume in ("true", "false"):
            training.resume_from_checkpoint = True if resume == "true" else None
        return data, training, model_args

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set defaults from a config file.

        Raises:
            CommandError: if the file has an unknown option.
        """
        if wrong := find_unknown(super().set_defaults_with_config(**kwargs), self._option_string_actions):
            raise CommandError(f"{self.config}: {wrong}")
        return []

    def check_base(self, name: str) -> None:
        """Check that a base that is a folder exists.

        Raises:
            CommandError: if it does not, with the command that makes it, if the head of the recipe has one.
        """
        if not name.strip():
            raise CommandError(
                "the model's name is empty; give model_name_or_path a folder, or a repository as owner/name"
            )
        place, gguf_file = split_path(name)
        count = place.count("/")  # a repository has one slash
        is_path = count > 1 or place.startswith((".", "/", "~")) or (gguf_file is not None and count == 0)
        if is_path and not Path(place).expanduser().exists():
            head = self.config.read_text(encoding="utf-8").splitlines() if self.config.is_file() else []
            makes = (line.lstrip("# ") for line in head if line.startswith("#") and line.endswith(f" --output {name}"))
            command = next(makes, None)
            raise CommandError(
                f"no model folder {name}; {f'make it: {command}' if command else 'give an existing one'}"
            )

    def error(self, message: str) -> NoReturn:
        """Raise an error; TRL's parser would print the usage of hundreds of options before it."""
        raise CommandError(message)


def check_arguments(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Check options that would fail late, or overwrite a run.

    Raises:
        CommandError: with the next step.
    """
    if not data.dataset_name:
        raise CommandError("dataset_name is missing; name a file, a folder, a dataset on the Hub, or chains")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")
    counts = {name: (getattr(training, name), 1) for name in sizes}
    counts |= {name: (getattr(data, name), 0) for name in ("eval_rows", "eval_generations", "bucket_batches")}
    counts |= {"eval_max_new_tokens": (data.eval_max_new_tokens, 1), "learning_rate": (training.learning_rate, 0)}
    for name, (count, least) in counts.items():
        if count is not None and not (math.isfinite(count) and count >= least):
            raise CommandError(f"{name} must be at least {least}, got {count}")
    epochs, shares, has_steps = training.num_train_epochs, data.parallel_share or [], training.max_steps > 0
    is_file = Path(data.dataset_name).suffix in (".jsonl", ".json", ".parquet", ".csv")
    has_no_splits = is_file or data.dataset_name == "chains"
    names_splits = data.dataset_test_split or data.dataset_config or data.dataset_train_split != "train"
    is_quantized = model_args.load_in_4bit or model_args.load_in_8bit
    wrong = {
        f"overlong is drop or cut, got {data.overlong!r}": data.overlong not in ("drop", "cut"),
        f"parallel_share is a share from 0 to 1 for each epoch, got {shares}": not all(0 <= s <= 1 for s in shares),
        f"num_train_epochs must be a number, got {epochs}": not math.isfinite(epochs),
        f"num_train_epochs must be above 0, got {epochs}; or give max_steps": not has_steps and epochs <= 0,
        f"parallel_share names {len(shares)} epochs and num_train_epochs is {epochs:g}; make the two agree": (
            len(shares) > 1 and not has_steps and len(shares) != epochs
        ),
        "pack_rows needs max_length: the most tokens a packed row may have": (
            data.pack_rows and training.max_length is None
        ),
        "packing and padding_free of TRL know nothing of paths; use pack_rows": (
            training.packing or training.padding_free
        ),
        "quantized weights cannot be trained themselves; add use_peft, or leave out load_in_4bit": (
            is_quantized and not model_args.use_peft
        ),
        # transformers would report it only after all rows are read
        "use_liger_kernel needs liger-kernel: pip install 'multiverse_hf[liger]'; or leave it out": (
            training.use_liger_kernel and not is_liger_kernel_available()
        ),
        "label_smoothing_factor builds all logits, which this recipe never does; leave it out": (
            training.label_smoothing_factor
        ),
        f"{data.dataset_name} {'is a file and has' if is_file else 'are made and have'} no splits; hold rows out with "
        "eval_rows": has_no_splits and names_splits,
        "an evaluation needs rows; give dataset_test_split or eval_rows, or eval_strategy no": (
            training.eval_strategy != "no" and not (data.dataset_test_split or data.eval_rows)
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise CommandError(message)
    check_output(Path(training.output_dir), is_folder=True)


def fill_defaults(data: DataArguments, training: SFTConfig, model_args: ModelConfig) -> None:
    """Set missing options, the curriculum and the attention implementation, and print them once.

    Raises:
        CommandError: if the attention implementation cannot train on this device.
    """
    said = []
    if data.parallel_share is None:
        one = training.max_steps > 0  # steps do not follow epochs
        data.parallel_share = paper_shares(1 if one else math.ceil(training.num_train_epochs))
        shares = " ".join(f"{share:g}" for share in data.parallel_share)
        said.append(f"parallel_share {shares}{', in all epochs' if one else ', by epoch'}")
    if model_args.attn_implementation is None:
        has_paths = max(data.parallel_share) > 0 and not data.sequential
        model_args.attn_implementation = default_attention(training.device.type, has_paths or data.pack_rows)
        said.append(f"attn_implementation {model_args.attn_implementation}")
    if model_args.attn_implementation == "flex_attention" and training.device.type == "cpu" and not data.check_rows:
        raise CommandError(
            "flex_attention cannot train without a GPU (torch has no backward for it); use multiverse_sdpa"
        )
    if said and training.process_index == 0:
        print(f"chosen by default: {'; '.join(said)}")
