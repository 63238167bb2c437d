"""``multiverse merge`` and ``multiverse export``: checkpoints in, ordinary checkpoints out."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.checkpoints import Dtype, load_weights, open_checkpoint, quiet
from multiverse_hf.cli.options import DtypeOption, TracebackOption
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.outputs import check_new_folder, new_folder


def merge(
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Folder that a LoRA run wrote.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write the merged checkpoint to.")],
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="The base model, if it is no longer where the run found it.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Add a LoRA adapter to its base: an ordinary checkpoint, which any loader takes.

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
            raise CommandError(f"{err.name} is missing; {install_line('train')}", FAILURE) from err
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
            raise CommandError(f"cannot merge {adapter}: {one_line(err)}") from err
        save_checkpoint(model, tokenizer, output, adapter / "run.json")


def export(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="PATH", help="Checkpoint whose tokenizer has the tags.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    dtype: DtypeOption = Dtype.AUTO,
    traceback: TracebackOption = False,
) -> None:
    """Write a checkpoint that branches wherever transformers is: its weights, and the code beside them.

    For a checkpoint that has the tags and was saved without the code, as the published Multiverse-32B. What is written
    is an ordinary checkpoint of its architecture to every loader that is not given trust_remote_code=True.

    \b
    Examples:
      multiverse export --model ./my-tagged-qwen --output my-multiverse
      multiverse export --model multiverse-tiny --output tiny
    """
    check_new_folder(output)
    with waiting("reading the model"):
        quiet()
        checkpoint = open_checkpoint(model)
        loaded = load_weights(checkpoint, dtype.value, None)
    with waiting("writing"):
        save_checkpoint(loaded, checkpoint.tokenizer, output)


def save_checkpoint(model: Any, tokenizer: Any, output: Path, record: Path | None = None) -> None:
    """Write a checkpoint whole or not at all, with the record of its training if there is one, and say what it is."""
    from safetensors import SafetensorError

    with new_folder(output) as folder:
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if record is not None and record.is_file():
                shutil.copyfile(record, folder / record.name)
        except (OSError, SafetensorError) as err:
            raise CommandError(f"cannot write {output}: {one_line(err, 120)}", FAILURE) from err
        except ValueError as err:  # what its own generation config says cannot be
            raise CommandError(f"{model.name_or_path} cannot be saved: {one_line(err, 200)}") from err
    print(f"{output}: {model.num_parameters() / 1e6:.1f} M parameters, {model.dtype}")
