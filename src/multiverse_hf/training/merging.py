"""A LoRA adapter put into its base: an ordinary checkpoint, which any loader takes."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.training.models import load_base


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
    from peft import PeftModel

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json; give the folder of a LoRA run")
    settings = json.loads(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tags = TagSet.from_tokenizer(tokenizer)
    source = base or settings["base_model_name_or_path"]
    revision = settings.get("revision") or "main"
    loaded = load_base(source, revision if base is None else "main", tags.names, str(adapter), dtype=dtype)
    # in the dtype of the base: the adapter's own may be wider, and the sum is rounded once
    model = PeftModel.from_pretrained(loaded.model, adapter, autocast_adapter_dtype=False)
    merged = model.merge_and_unload(progressbar=False, safe_merge=True)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(merged.config, name, getattr(tokenizer, name))
    return merged, tokenizer
