"""A LoRA adapter put into its base: an ordinary checkpoint, which any loader takes."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.training.models import load_base, load_tokens


def merge_adapter(adapter: Path, base: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a base, give it the tags as training did, and add the adapter's weights to its own.

    Args:
        adapter: folder that ``recipes/sft.py`` wrote with ``--use_peft``: adapter, tokenizer, tags.
        base: folder or repository of the base model, if it has moved since.
        dtype: of the merged weights; "auto" is the base checkpoint's own.

    Returns:
        The merged model and its tokenizer.

    Raises:
        ValueError: if the folder holds no adapter, or another base than it was trained on.
        OSError: if there is no base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json; give the folder of a LoRA run")
    settings = json.loads(file.read_bytes())
    for name in ("peft_type", "base_model_name_or_path"):
        if name not in settings:
            raise ValueError(f"{file} does not name its {name}; save the adapter again")
    stored = adapter / "adapter_model.safetensors"
    if not stored.is_file():
        raise ValueError(f"{adapter} holds no {stored.name}; save the adapter again")
    try:
        with safe_open(stored, "pt") as tensors:
            found = set(tensors.keys())
    except SafetensorError as err:
        raise ValueError(f"{stored} is damaged ({err}); save the adapter again, or copy it again") from err
    if base is not None and not base.strip():
        raise ValueError("the base's name is empty; leave it out, or give a folder or repository")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tags = TagSet.from_tokenizer(tokenizer)
    source = base or settings["base_model_name_or_path"]
    revision = settings.get("revision") or "main"
    try:
        revision = revision if base is None else "main"
        tokens = load_tokens(source, revision, tags.names, str(adapter))
        loaded = load_base(source, revision, tokens, dtype=dtype)
    except (OSError, ValueError) as err:
        raise ValueError(f"cannot read the base {source} ({err}); if it has moved, name it with --base") from err
    record = adapter / "run.json"
    trained_on = json.loads(record.read_bytes())["model"].get("model_type") if record.is_file() else None
    if trained_on not in (None, loaded.model.config.model_type):
        raise ValueError(
            f"{adapter} was trained on a {trained_on}, and {source} is a {loaded.model.config.model_type}"
        )
    # in the dtype of the base: the adapter's own may be wider, and the sum is rounded once
    model = PeftModel.from_pretrained(loaded.model, adapter, autocast_adapter_dtype=False)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing, foreign = wanted - found, {name for name in found - wanted if "lora_" in name}
    if missing or foreign:
        raise ValueError(
            f"{stored} is not the adapter that {file.name} describes: it lacks {len(missing)} weights and has "
            f"{len(foreign)} others, such as {min(missing | foreign)}; save the adapter again"
        )
    merged = model.merge_and_unload(progressbar=False, safe_merge=True)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(merged.config, name, getattr(tokenizer, name))
    return merged, tokenizer
