"""Prepares a base model for training on documents: tags in its tokenizer, and rows for them in its embeddings."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from multiverse_hf.checkpoints import gguf_reason
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.modeling.attention_chunked import CHUNKED
from multiverse_hf.modeling.configuration_multiverse import MultiverseConfig
from multiverse_hf.modeling.families import Family, find_family, read_family
from multiverse_hf.modeling.gguf_files import reading, split_path
from multiverse_hf.modeling.loading import base_class
from multiverse_hf.modeling.modeling_multiverse import multiverse_class
from multiverse_hf.modeling.tags import TagSet

logger = logging.getLogger(__name__)

# For a base model without a chat template: roles in plain words, and an end token after each answer. It is saved with
# the model, so that later prompts match training.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if not (loop.last and continue_final_message | default(false)) %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_MULTIPLE = 64  # of embedding rows, for fast matrix products and tensor parallelism


@dataclass(frozen=True, slots=True)
class Base:
    """A model to train, its tokenizer and its tags."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tags: TagSet
    new_ids: list[int]  # ids of tags that the tokenizer lacked


@dataclass(frozen=True, slots=True)
class Tokens:
    """Config, tokenizer and tags of a model to train, without weights."""

    config: PretrainedConfig  # the model's config
    tokenizer: PreTrainedTokenizerBase
    tags: TagSet
    new: list[str]  # tags that the tokenizer lacked


def load_tokens(
    path: str,
    revision: str = "main",
    names: Family | str | None = None,
    tokenizer_path: str | None = None,
    chat_template: str | None = None,
    eos_token: str | None = None,
) -> Tokens:
    """Load the tokenizer of a causal LM that can branch, and add the tags that it lacks. No weights are read.

    Args:
        path: folder or repository of the model, or ``folder/FILE.gguf``.
        revision: revision of a repository.
        names: the family of the tags, or its name; None for the tokenizer's tags, else the paper's.
        tokenizer_path: folder or repository of the tokenizer, if it is not the model's own.
        chat_template: Jinja text in place of the tokenizer's.
        eos_token: end token of an answer, in place of the tokenizer's.

    Raises:
        ValueError: if the architecture cannot branch, or the tokenizer cannot be used for training.
        OSError: if there is no model at ``path``.
    """
    place, gguf_file = split_path(path)
    own = {"revision": revision} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    with reading(place, gguf_file):
        config = copy.deepcopy(MultiverseConfig.from_pretrained(place, **own))
    base_class(config)
    with reading(place, gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or place, **(own if tokenizer_path is None else {}))
    names = find_family(tokenizer.get_vocab()) if names is None else read_family(names)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token {eos_token!r} is no token of {path}; choose one of its vocabulary")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path} has no end token, so answers would never end; name one with eos_token")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    elif not tokenizer.chat_template:
        logger.warning(f"{path} has no chat template; using a plain one (Multiverse's own, saved with the model)")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    words = "the user's own words"
    if words not in tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False):
        raise ValueError(f"the chat template of {path} omits the user's message; give another one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    vocab = tokenizer.get_vocab()
    new = [tag for tag in names.tokens if tag not in vocab]
    return Tokens(config, tokenizer, TagSet.add_to(tokenizer, names), new)


def load_base(path: str, revision: str = "main", tokens: Tokens | None = None, **kwargs: Any) -> Base:
    """Load a causal LM that can branch, with embedding rows for the tags that its tokenizer lacked.

    Args:
        path: folder or repository of the model, or ``folder/FILE.gguf``, whose weights are dequantized.
        revision: revision of a repository.
        tokens: result of :func:`load_tokens`; by default with its default options.
        **kwargs: as for ``AutoModelForCausalLM.from_pretrained``: ``dtype``, ``attn_implementation``,
            ``quantization_config``, ...

    Raises:
        ValueError: as :func:`load_tokens`, or if weights are missing.
        OSError: if there is no model at ``path``.
    """
    tokens = tokens or load_tokens(path, revision)
    config, tokenizer, tags, names = tokens.config, tokens.tokenizer, tokens.tags, tokens.tags.names
    config.multiverse = tags.to_dict()
    model, info = multiverse_class(base_class(config)).from_pretrained(
        path, revision=revision, config=config, output_loading_info=True, **kwargs
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}, which would be random; download it again"
        )
    new_ids = [tags.ids[tag] for tag in tokens.new]
    phrases = tag_phrases(names)
    add_rows(model, tokenizer, {tags.ids[tag]: phrases[tag] for tag in tokens.new})
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    others = [end for end in ends if end != tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *others] if others else tokenizer.eos_token_id
    return Base(model, tokenizer, tags, new_ids)


def load_for_training(data: Any, training: Any, model_args: Any) -> Base | Tokens:
    """Load the base model of a run, with missing tags added. If rows are only checked, load no weights.

    Args:
        data, training, model_args: the run's options. What TRL's trainer would do to the model and its tokenizer
            (``chat_template_path``, ``eos_token``, ``model_init_kwargs``) is done here, before rows are encoded.

    Raises:
        CommandError: if the base is missing, or cannot be trained on documents.
    """
    from trl import get_quantization_config

    name, revision = model_args.model_name_or_path, model_args.model_revision
    template, training.chat_template_path = training.chat_template_path, None
    if template is not None and not Path(template).is_file():
        raise CommandError(f"chat_template_path must be a file of Jinja text, got {template}")
    options, training.model_init_kwargs = dict(training.model_init_kwargs or {}), None
    try:
        text = None if template is None else Path(template).read_text(encoding="utf-8")
        quantization = get_quantization_config(model_args)
        options |= {} if quantization is None else {"quantization_config": quantization}
        options |= {"dtype": model_args.dtype or "float32", "attn_implementation": model_args.attn_implementation}
        path = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
        tokens = load_tokens(path, revision, data.tags, chat_template=text, eos_token=training.eos_token)
        return tokens if data.check_rows else load_base(path, revision, tokens, **options)
    except Exception as err:  # a checkpoint is input: safetensors, pickle, json and the Hub raise errors of their own
        raise CommandError(f"cannot load {name}: {gguf_reason(err) or one_line(err)}") from err


def default_attention(device_type: str, keeps_apart: bool) -> str:
    """Return the attention implementation that trains without an L x L mask.

    Args:
        device_type: type of the training device: "cuda", "cpu", ...
        keeps_apart: whether a row may have parts that must not see each other: sibling paths, or several documents.
    """
    if device_type != "cuda":
        return CHUNKED  # it uses sdpa for rows without a mask
    return "flex_attention" if keeps_apart else "sdpa"


def tag_phrases(names: Family) -> dict[str, str]:
    """Return the words for each tag's initial embedding: its name, and "begin" or "end"."""
    phrases = {}
    for role, name in names.items():
        phrases[names.open(role)] = f" begin {name.lower()}"
        phrases[names.close(role)] = f" end {name.lower()}"
    return phrases


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, phrases: dict[int, str]) -> None:
    """Set rows of tokens in the embeddings and the output layer to the mean of the rows of a few words.

    Equal rows, such as the mean over the vocabulary, would start indistinguishable, and the model would have to learn
    from nothing which tag is which.

    Args:
        model: changed in place. It is enlarged if it has too few rows, and never shrunk.
        tokenizer: encodes the words.
        phrases: the words by token id.
    """
    inputs = model.get_input_embeddings().weight
    with _whole(inputs):  # a shard does not show the number of rows
        num_rows = inputs.shape[0]
    if len(tokenizer) > num_rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_MULTIPLE, mean_resizing=False)
    pieces = {token: tokenizer.encode(text, add_special_tokens=False) for token, text in phrases.items()}
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [layers[0].weight] if layers[1].weight is layers[0].weight else [layer.weight for layer in layers]
    for weight in weights if pieces else []:
        with _whole(weight), torch.no_grad():
            if weight.device.type == "meta":  # FSDP loads weights in one process and sends them to the others
                continue
            for token, words in pieces.items():
                weight[token] = weight[words].float().mean(0).to(weight.dtype)


def _whole(weight: torch.Tensor) -> Any:
    """Return a context in which a weight is whole, even if DeepSpeed ZeRO-3 shards it over processes."""
    if not is_deepspeed_zero3_enabled():
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


def trainable_tokens(model: PreTrainedModel, ids: list[int]) -> list[int] | dict[str, list[int]] | None:
    """Return LoRA's ``trainable_token_indices`` that train tokens in the embeddings and in the output layer.

    An untied output layer is a separate weight and must be named; a tied one follows the embeddings.
    """
    if not ids:
        return None
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    if layers[1].weight is layers[0].weight:
        return {names[layers[0]]: ids}
    return {names[layer]: ids for layer in layers}
