"""``multiverse merge`` and ``multiverse export``: checkpoints in, ordinary checkpoints out."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.checkpoints import Dtype, load_weights, open_checkpoint, quiet
from multiverse_hf.cli.options import DtypeOption, TracebackOption
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.modeling.gguf_files import SUFFIX
from multiverse_hf.outputs import check_new_folder, new_folder


def merge(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Folder of a LoRA run.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the merged checkpoint.")],
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="The base model, if it has moved since the run.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Merge a LoRA adapter into its base. The result is an ordinary checkpoint for any loader.

    \b
    Examples:
      multiverse merge --adapter runs/llama3.1-8b/multiverse-lora --output my-model
      multiverse merge --adapter runs/lora --base ./Llama-3.1-8B-Instruct --output my-model --dtype bfloat16
    """
    check_new_folder(output)
    with waiting("merging"):
        quiet()
        try:
            from multiverse_hf.training.merging import merge_adapter

            model, tokenizer = merge_adapter(adapter, base, dtype.value)
        except ModuleNotFoundError as err:
            extra = "gguf" if err.name == "gguf" else "train"
            raise CommandError(f"{err.name} is missing; {install_line(extra)}", FAILURE) from err
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
            raise CommandError(f"cannot merge {adapter}: {one_line(err)}") from err
        save_checkpoint(model, tokenizer, output, adapter / "run.json")


def export(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PATH", help="Checkpoint whose tokenizer has the tags.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoint.")],
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", metavar="NAME", help="GGUF file in it, which is dequantized.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint with the code that makes it branch, so that it needs only torch and transformers.

    This is for checkpoints with tags that were saved without the code, such as the published Multiverse-32B. Loaders
    without trust_remote_code=True read the result as an ordinary checkpoint of its architecture.

    \b
    Examples:
      multiverse export --model ./my-tagged-qwen --output my-multiverse
      multiverse export --model multiverse-tiny --output tiny
    """
    check_new_folder(output)
    if gguf_file is not None and not gguf_file.endswith(SUFFIX):
        raise CommandError(f"--gguf-file names a file that ends in {SUFFIX}, got {gguf_file!r}")
    with waiting("reading the model"):
        quiet()
        checkpoint = open_checkpoint(model if gguf_file is None else f"{model.rstrip('/')}/{gguf_file}")
        loaded = load_weights(checkpoint, dtype.value, None)
    with waiting("writing"):
        save_checkpoint(loaded, checkpoint.tokenizer, output)


def save_checkpoint(model: Any, tokenizer: Any, output: Path, record: Path | None = None) -> None:
    """Write a checkpoint whole or not at all, with its training record if there is one. Print its size and dtype."""
    from safetensors import SafetensorError

    with new_folder(output) as folder:
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if record is not None and record.is_file():
                shutil.copyfile(record, folder / record.name)
        except (OSError, SafetensorError) as err:
            raise CommandError(f"cannot write {output}: {one_line(err, 120)}", FAILURE) from err
        except ValueError as err:  # its generation config is invalid
            raise CommandError(f"{model.name_or_path} cannot be saved: {one_line(err, 200)}") from err
    print(f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")
