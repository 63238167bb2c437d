"""Merges a LoRA adapter into its base: an ordinary checkpoint for any loader."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import AutoTokenizer

from multiverse_hf.modeling.remote_code import EMPTY_CARD
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.training.models import load_base, load_tokens

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NO_WEIGHTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "ADAPTION_PROMPT")


_CARD = """---
{base_line}library_name: peft
tags:
- multiverse
---

# {name}

An adapter ({kind}) of `{base}` that makes it write in parallel
([Multiverse, arXiv 2506.09991](https://arxiv.org/abs/2506.09991)). As an ordinary checkpoint, which
`model_cards/make_card.py` of multiverse_hf writes a card for:

```bash
multiverse merge --adapter FOLDER --output merged
```

`run.json` and `report.md` beside it, where they are, say how it was trained. Its accuracy is not measured.
"""


def write_adapter_card(folder: str | Path, model: Any) -> None:
    """Write the card of an adapter in place of PEFT's empty one. Other cards are kept.

    Args:
        folder: folder of the adapter.
        model: the saved PEFT model.
    """
    path, settings = Path(folder, "README.md"), model.active_peft_config
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else EMPTY_CARD
    if EMPTY_CARD not in text:
        return
    base = str(settings.base_model_name_or_path)
    is_folder = Path(base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    rank = getattr(settings, "r", None)
    kind = str(getattr(settings.peft_type, "value", settings.peft_type)) + (f", rank {rank}" if rank else "")
    shown, line = (Path(base).name, "") if is_folder else (base, f"base_model: {base}\n")
    name = Path(folder).resolve().name
    path.write_text(_CARD.format(base_line=line, name=name, kind=kind, base=shown), encoding="utf-8")


def merge_adapter(adapter: Path, base: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """Load a base, add tags to it as training did, and add the adapter's weights.

    Args:
        adapter: folder of an adapter that ``recipes/sft.py --use_peft`` or PEFT's ``save_pretrained`` wrote. If it has
            no tokenizer, the base's is used.
        base: folder or repository of the base model, if it has moved.
        dtype: dtype of the merged weights; "auto" is the base checkpoint's dtype.

    Returns:
        The merged model and its tokenizer.

    Raises:
        ValueError: if the folder holds no adapter or one that cannot be merged, if neither it nor its base has tags,
            or if it was trained on another base.
        OSError: if the base is missing.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    from safetensors import SafetensorError

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json; give the folder of a LoRA run")
    settings = json.loads(file.read_bytes())
    for name in ("peft_type", "base_model_name_or_path"):
        if name not in settings:
            raise ValueError(f"{file} does not name its {name}; save the adapter again")
    if settings["peft_type"] in _NO_WEIGHTS:
        raise ValueError(
            f"{adapter} is a {settings['peft_type']} adapter, which adds to the prompt and nothing to the weights; "
            "load it with peft.AutoPeftModelForCausalLM"
        )
    stored = next((adapter / name for name in _WEIGHTS if (adapter / name).is_file()), None)
    if stored is None:
        raise ValueError(f"{adapter} holds no {_WEIGHTS[0]}; save the adapter again")
    try:
        found = set(load_peft_weights(str(adapter), device="cpu"))
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as err:
        raise ValueError(f"{stored} is damaged ({err}); save the adapter again, or copy it again") from err
    if base is not None and not base.strip():
        raise ValueError("the base's name is empty; leave it out, or give a folder or repository")
    source = base or settings["base_model_name_or_path"]
    if not source:
        raise ValueError(f"{file} does not name its base_model_name_or_path; name the base with --base")
    revision = (settings.get("revision") or "main") if base is None else "main"
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    names = TagSet.from_tokenizer(AutoTokenizer.from_pretrained(adapter)).names if has_tokenizer else None

    def unreadable(err: Exception) -> ValueError:
        return ValueError(f"cannot read the base {source} ({err}); if it has moved, name it with --base")

    try:
        tokens = load_tokens(source, revision, names, str(adapter) if has_tokenizer else None)
    except (OSError, ValueError) as err:
        raise unreadable(err) from err
    if not has_tokenizer and tokens.new:
        raise ValueError(
            f"{adapter} holds no tokenizer, and that of its base {source} lacks {tokens.new[0]}; copy the tokenizer "
            "that it was trained with into its folder"
        )
    try:
        loaded = load_base(source, revision, tokens, dtype=dtype)
    except (OSError, ValueError) as err:
        raise unreadable(err) from err
    tokenizer = tokens.tokenizer
    record = adapter / "run.json"
    trained_on = json.loads(record.read_bytes())["model"].get("model_type") if record.is_file() else None
    if trained_on not in (None, loaded.model.config.model_type):
        raise ValueError(
            f"{adapter} was trained on a {trained_on}, and {source} is a {loaded.model.config.model_type}"
        )
    # in the base's dtype: the adapter's may be wider, and the sum is rounded once
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
