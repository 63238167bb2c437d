"""What loading a checkpoint needs to know before its weights: architecture, config, adapter and control tags."""

import copy
import importlib
import json
import logging
import os
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available

from .configuration_multiverse import MultiverseConfig
from .families import FAMILIES, Family
from .gguf_files import reading
from .masks import layer_kinds
from .remote_code import AUTO_MAP
from .tags import TagSet

logger = logging.getLogger(__name__)

HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")  # where to read a file from
# Arguments that loading a model needs, though reading its config takes them too.
_LOADING = (*HUB, "force_download", "proxies", "trust_remote_code", "gguf_file", "dtype", "torch_dtype")


def base_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the causal-LM class of transformers that a config names.

    Raises:
        ValueError: if Multiverse cannot serve that architecture, with the reason.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; Multiverse needs a decoder-only model such as qwen3 or llama")
    base = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if base is None:
        raise ValueError(f"transformers has no causal language model for {name}; choose a decoder-only text model")
    if getattr(base, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state, which paths cannot share and merge; choose a softmax decoder"
        )
    layer_kinds(config)
    has_rotary = (
        getattr(config, "rope_parameters", None) is not None or getattr(config, "rope_theta", None) is not None
    )
    if not has_rotary or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} has no rotary positions; Multiverse lets several tokens stand at one position, which needs them"
        )
    return base


def adapter_base(path: str | os.PathLike[str], hub: dict[str, Any]) -> str | None:
    """Return the base that an adapter names; None if ``path`` holds a model of its own.

    Raises:
        ImportError: if it is an adapter and peft, which transformers loads it with, is not installed.
        TypeError: if ``path`` is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is a folder or a repository id, got {path!r}")
    try:
        file = find_adapter_config_file(str(path), **hub)
    except OSError:  # no such repository: reading its config raises
        return None
    if file is None or os.path.isfile(os.path.join(path, "config.json")):
        return None
    if not is_peft_available():
        raise ImportError(f"{path} is a LoRA adapter; pip install peft")
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)["base_model_name_or_path"]


def load_with_peft(
    model: PreTrainedModel, path: str | os.PathLike[str], hub: dict[str, Any], missing: set[str]
) -> set[str]:
    """Load an adapter's weights by peft itself: transformers leaves out some, such as DoRA's magnitudes.

    Returns:
        Names of the weights that are still missing.
    """
    peft = importlib.import_module("peft")  # named here, it would be taken for a requirement of every checkpoint
    (name,) = model.peft_config
    where = {key: value for key, value in hub.items() if value is not None}
    weights = peft.load_peft_weights(str(path), device="cpu", **where)
    weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
    peft.set_peft_model_state_dict(model, weights, name)
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    of_base = {key for key in missing if name not in key.split(".")}
    return of_base | (set(wanted) - set(weights))


def read_config(
    path: str | os.PathLike[str], hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return a checkpoint's config, with the arguments that it has a place for, and those left for the model.

    Raises:
        OSError: if there is none; where ``path`` is no folder, it may be meant as either.
    """
    apart = {"config", "dtype", "torch_dtype", "quantization_config", "trust_remote_code"}  # as AutoModel does
    overrides = {name: value for name, value in kwargs.items() if name not in apart}
    try:
        with reading(path, kwargs.get("gguf_file")):
            config, unused = MultiverseConfig.from_pretrained(path, return_unused_kwargs=True, **overrides)
    except (OSError, ValueError) as err:
        if os.path.isdir(path):
            files = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
            if files and not kwargs.get("gguf_file") and not os.path.isfile(os.path.join(path, "config.json")):
                raise OSError(f"{path} holds no config.json but a GGUF file; pass gguf_file={files[0]!r}") from err
        if os.path.isdir(path) or isinstance(err, ValueError):
            raise
        reason = " ".join(str(err).split())
        raise OSError(f"no checkpoint {str(path)!r}: there is no such folder, and on the Hub: {reason}") from err
    return config, {name: kwargs[name] for name in kwargs if name in unused or name in apart or name in _LOADING}


def spelled_tags(
    path: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    hub: dict[str, Any],
    family: Family | None,
    gguf_file: str | None,
) -> TagSet:
    """Read the tags from a base's tokenizer.

    Raises:
        ValueError: if it has none.
    """
    if base is None:
        raise ValueError("the config holds no tag set; pass tags=TagSet.from_tokenizer(tokenizer)")
    try:
        gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
        with reading(base, gguf_file):
            tokenizer = AutoTokenizer.from_pretrained(base, **hub, **gguf)
        tags = TagSet.from_tokenizer(tokenizer, family)
    except ValueError as err:
        if base == path:
            raise
        raise ValueError(
            f"{path} is an adapter, and its base {base} has no tags ({err}); where training added them, put the two "
            f"together: multiverse merge --adapter {path} --output FOLDER"
        ) from err
    logger.warning(f"{base}: the config holds no control tags; they are those of the tokenizer")
    return tags


def warn_of_missing_code(path: str | os.PathLike[str] | None, config: PretrainedConfig) -> None:
    """Warn of a folder whose config names code that is not there: tools that merge or convert copy the config only."""
    if path is None or not os.path.isdir(path):
        return
    named = {str(value).split(".")[0] for value in (getattr(config, "auto_map", None) or {}).values()}
    code = {value.split(".")[0] for value in AUTO_MAP.values()} & named
    if lacking := sorted(name for name in code if not os.path.isfile(os.path.join(path, f"{name}.py"))):
        logger.warning(
            f"{path}: the config names {lacking[0]}.py, which is not there, so trust_remote_code=True fails; "
            f"save the model again, or: multiverse export --model {path} --output FOLDER"
        )


def check_tokenizer(tags: TagSet, path: str | os.PathLike[str], hub: dict[str, Any]) -> None:
    """Check that the tokenizer beside a checkpoint has the ids its config has. Reads one file, and builds nothing.

    Raises:
        ValueError: if they differ: the model would write tags that the tokenizer takes for something else.
    """
    added = _added_tokens(path, hub)
    for tag in tags.names.tokens:
        if added.get(tag, tags.ids[tag]) != tags.ids[tag]:
            raise ValueError(
                f"{path}: {tag} is token {added[tag]} of the tokenizer and {tags.ids[tag]} in config.multiverse; keep "
                "config and tokenizer of one model together, or pass tags=TagSet.from_tokenizer(tokenizer)"
            )


def _added_tokens(path: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens added to a fast tokenizer's vocabulary; none where it cannot be read."""
    file = cached_file(
        path,
        "tokenizer.json",
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:  # no fast tokenizer: loading a slow one only to look would cost too much
        return {}
    try:
        with open(file, encoding="utf-8") as stream:
            return {token["content"]: token["id"] for token in json.load(stream).get("added_tokens", [])}
    except ValueError:  # damaged: loading the tokenizer raises
        return {}


def spells_tags(config: PretrainedConfig, path: str | os.PathLike[str], hub: dict[str, Any]) -> bool:
    """Return whether the tokenizer at ``path`` has all tags of a family, and a model of this config can use them."""
    added, size = _added_tokens(path, hub), config.vocab_size
    if not any(max(added.get(tag, size) for tag in family.tokens) < size for family in FAMILIES.values()):
        return False
    try:
        base_class(config)
    except ValueError:
        return False
    return True


def with_tags(config: PretrainedConfig, tags: TagSet | None) -> PretrainedConfig:
    """Return a copy of a config that holds the tags.

    Raises:
        ValueError: if the model has no embeddings for them.
    """
    config = copy.deepcopy(config)
    if tags is not None:
        config.multiverse = tags.to_dict()
    highest = max(TagSet.from_dict(config.multiverse).control_ids)
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tags go up to id {highest} and the embeddings to {config.vocab_size - 1}; "
            "resize the embeddings and train the model on tags"
        )
    return config
