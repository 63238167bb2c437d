"""What ``generate`` takes: arguments read, and refused where the engine cannot do what they ask.

Every option of transformers' ``GenerationConfig`` is in one of the four tables below, with the reason; a test holds
them against the installed version. An option of a later version that is in none of them is refused once it is set.
"""

import dataclasses
import difflib
import math
import operator
import warnings
from typing import Any

import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.utils import logging

from .state import StructureOptions

logger = logging.get_logger(__name__)

OPTIONS = tuple(f.name for f in dataclasses.fields(StructureOptions))
DEFAULT_NEW_TOKENS = 20  # as transformers: max_length=20 where nothing is said

# Done as transformers does them, for each branch with its own visible ids.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "watermarking_config", "num_return_sequences", "output_logits", "return_dict_in_generate",
    "pad_token_id", "eos_token_id",
})  # fmt: skip

# Without effect here, as in transformers' own greedy decoding and sampling.
_ASSISTED = "read in assisted decoding alone, which is refused"
HARMLESS = {
    "bos_token_id": "begins an answer without a prompt, which needs structure='off'",
    "decoder_start_token_id": "of encoder-decoders",
    "early_stopping": "of beam search; transformers warns",
    "length_penalty": "of beam search; transformers warns",
    "disable_compile": "nothing is compiled",
    "use_cache": "the engine keeps a cache of its own: the answer is the same, and comes sooner",
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "speculation_type": _ASSISTED,
    "transformers_version": "says what wrote the file",
    "_from_model_config": "says where the values come from",
}

# Change the answer in a way branches cannot: name -> (values besides None that ask for nothing, the way out).
_SAMPLING = "use greedy decoding or do_sample=True"
_ASSISTANT = "leave it out: assisted decoding writes one branch"
_LOGITS = "ask for output_logits"
REFUSED = {
    "num_beams": ((1,), f"beam search cannot fork: {_SAMPLING}"),
    "num_beam_groups": ((1,), _SAMPLING),
    "diversity_penalty": ((0,), _SAMPLING),
    "constraints": ((), _SAMPLING),
    "force_words_ids": ((), _SAMPLING),
    "penalty_alpha": ((0,), _SAMPLING),
    "dola_layers": ((), _SAMPLING),
    "low_memory": ((False,), _SAMPLING),
    "use_mtp": ((False,), _ASSISTANT),
    "prompt_lookup_num_tokens": ((), _ASSISTANT),
    "assistant_early_exit": ((), _ASSISTANT),
    "is_assistant": ((False,), _ASSISTANT),
    "guidance_scale": ((1,), "it needs a second prompt for every branch; leave it out"),
    "encoder_repetition_penalty": ((1,), "use repetition_penalty or a logits processor"),
    "encoder_no_repeat_ngram_size": ((0,), "use no_repeat_ngram_size or a logits processor"),
    "forced_eos_token_id": ((), "the engine closes and ends an answer at max_new_tokens itself; leave it out"),
    "token_healing": ((False,), "give a prompt that ends at a word's end"),
    "output_scores": ((False,), _LOGITS),
    "output_attentions": ((False,), _LOGITS),
    "output_hidden_states": ((False,), _LOGITS),
}

# Change what an answer costs, not what it says. A checkpoint may hold them and is answered with the engine's own cache
# all the same; a call that asks for them is told.
_CACHE = "leave it out: the engine keeps a cache of its own"
REFUSED_IN_A_CALL = {
    "cache_implementation": (("dynamic",), _CACHE),
    "cache_config": ((), _CACHE),
    "max_cache_len": ((), _CACHE),
    "prefill_chunk_size": ((), "leave it out: a prompt is read in one pass"),
    "compile_config": ((), "leave it out: the engine is not compiled"),
    "continuous_batching_config": ((), "leave it out: the engine batches the branches itself"),
}

# Arguments of generate that are no options: likewise.
REFUSED_ARGUMENTS = {
    "assistant_model": ((), _ASSISTANT),
    "assistant_tokenizer": ((), _ASSISTANT),
    "negative_prompt_ids": ((), REFUSED["guidance_scale"][1]),
    "negative_prompt_attention_mask": ((), REFUSED["guidance_scale"][1]),
    "custom_generate": ((), "call it on a model of the base class"),
    "synced_gpus": ((False,), "gather the weights, then let each process generate by itself"),
    "past_key_values": ((), "pass the whole text as input_ids"),
    "cache": ((), "pass the whole text as input_ids"),
    "inputs_embeds": ((), "pass input_ids"),
    "logits_to_keep": ((), "leave it out: the engine computes the logits it chooses from"),
    "position_ids": ((), "leave it out: positions follow from the tags and from attention_mask"),
}

ARGUMENTS = (
    *("inputs", "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria"),
    *("prefix_allowed_tokens_fn", "streamer", "tokenizer", "seed", "labels"),
)
HELD_BY_THE_ENGINE = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)
# name -> the least value it may have
COUNTS = {"max_new_tokens": 1, "max_length": 1, "min_new_tokens": 0, "min_length": 0, "num_return_sequences": 1}


ORDINARY = ". For ordinary decoding, pass structure='off'"


def reject(condition: bool, what: str, instead: str) -> None:
    """Refuse what transformers can do and branches cannot.

    Raises:
        ValueError: if ``condition`` holds.
    """
    if condition:
        raise ValueError(f"{what} does not work with branches; {instead}{ORDINARY}")


def _asks(value: Any, nothing: tuple[Any, ...]) -> bool:
    """Return whether a value asks for something: it is not None, nor one of those that ask for nothing."""
    return value is not None and not (isinstance(value, bool | int | float | str) and value in nothing)


def _reject_set(name: str, value: Any, nothing: tuple[Any, ...], instead: str) -> None:
    """Refuse a value that asks for something. Values may be tensors, which cannot be looked for in a tuple."""
    asks = _asks(value, nothing)
    shown = f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name
    reject(asks, shown, instead)


def _reject_unknown(name: str) -> None:
    known = [*OPTIONS, *vars(GenerationConfig()), *ARGUMENTS]
    close = difflib.get_close_matches(name, known, 1)
    raise ValueError(f"generate has no option {name!r}" + (f"; did you mean {close[0]}?" if close else ""))


def _check_number(name: str, value: Any, low: int, is_count: bool) -> None:
    """Check that an option is a number and not too small."""
    try:
        number = operator.index(value) if is_count else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool | str):
        raise TypeError(f"{name} must be {'an integer' if is_count else 'a number'}, got {value!r}")
    if math.isnan(number) or number < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")


def token_ids(value: Any) -> list[Any]:
    """Read one id, several, or none."""
    if value is None:
        return []
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    return list(value) if isinstance(value, list | tuple) else [value]


def check_streamer(streamer: Any | None) -> None:
    """Check that something can be streamed to.

    Raises:
        TypeError: if it has not the methods for it.
    """
    streams = hasattr(streamer, "on_event") or (hasattr(streamer, "put") and hasattr(streamer, "end"))
    if streamer is not None and not streams:
        raise TypeError(f"a streamer has the methods put and end, or on_event; got {streamer!r}")


def check_call(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    """Refuse what the call itself must not say, before transformers reads it.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a value is out of range or asks for what the engine does not do.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}; "
            "make it one with GenerationConfig(...), or pass its options to generate themselves"
        )
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None and not callable(allowed):
        raise TypeError(f"prefix_allowed_tokens_fn must be a function, got {allowed!r}")
    given, of_checkpoint = vars(generation_config or GenerationConfig()), vars(model.generation_config)
    for name in given.keys() - vars(GenerationConfig()).keys() - of_checkpoint.keys() - {*OPTIONS, "seed"}:
        if given[name] is not None and not name.startswith("_"):
            _reject_unknown(name)
    for source in (kwargs, given):
        for name, low in {**COUNTS, "max_time": 0}.items():
            if source.get(name) is not None:
                _check_number(name, source[name], low, is_count=name in COUNTS)
        for name in ("eos_token_id", "pad_token_id"):
            for token in token_ids(source.get(name)):
                _check_number(name, token, -1, is_count=True)  # -1 stands for none
        for name in ("do_sample", "return_dict_in_generate", "output_logits"):
            if isinstance(source.get(name), str):  # "False" would be true
                raise TypeError(f"{name} must be True or False, got {source[name]!r}")
        for name, (nothing, instead) in REFUSED_IN_A_CALL.items():
            if source is kwargs or given.get(name) != of_checkpoint.get(name):  # else a copy of the checkpoint's
                _reject_set(name, source.get(name), nothing, instead)


def split_options(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> StructureOptions:
    """Take the structure options out of ``kwargs``, the config given, or the checkpoint's config, in that order.

    As in transformers, None in a config says nothing, and None in ``kwargs`` takes back what a config says: it stands
    for the default of the model's family.

    Raises:
        TypeError, ValueError: as :func:`check_call`, and if a value is out of range.
    """
    check_call(model, generation_config, kwargs)
    values = {}
    for source in (vars(model.generation_config), vars(generation_config or GenerationConfig()), kwargs):
        for name in OPTIONS:
            if source is kwargs and name in kwargs:
                values[name] = kwargs.pop(name)
            elif source.get(name) is not None:
                values[name] = source[name]
    asked = {name: value for name, value in values.items() if value is not None}
    return StructureOptions(**model.tags.names.limits | asked)


def asked_structure(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
    """Return the ``structure`` that a call asks for, as :func:`split_options` would find it."""
    if "structure" in kwargs:
        return kwargs["structure"]
    configs = (generation_config, model.generation_config)
    return next((c.structure for c in configs if getattr(c, "structure", None) is not None), None)


def needs_base(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> bool:
    """Return whether a call with ``structure="off"`` asks for what transformers does and the engine does not."""
    rest = {name: value for name, value in kwargs.items() if name not in (*OPTIONS, "seed", "structure")}
    given = generation_config if isinstance(generation_config, GenerationConfig) else GenerationConfig()
    tables = {**REFUSED, **REFUSED_IN_A_CALL, **REFUSED_ARGUMENTS}
    asked = {**vars(model.generation_config), **{k: v for k, v in vars(given).items() if v is not None}, **rest}
    known = vars(GenerationConfig()).keys() | set(ARGUMENTS) | {"trust_remote_code", "token_type_ids"}
    return (
        rest.get("prefix_allowed_tokens_fn") is not None
        or any(_asks(asked.get(name), nothing) for name, (nothing, _) in tables.items())
        or asked.get("use_cache") is False
        or isinstance(asked.get("watermarking_config"), SynthIDTextWatermarkingConfig)
        or any(value is not None for name, value in rest.items() if name not in {*known, *tables})
    )


def check_modes(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Refuse what branches cannot do, and options nobody knows.

    Args:
        config: what the call and the checkpoint say together.
        kwargs: what is left of the call's arguments.

    Raises:
        ValueError: with the way out.
    """
    for name, (nothing, instead) in REFUSED.items():
        _reject_set(name, getattr(config, name, None), nothing, instead)
    synthetic = isinstance(config.watermarking_config, SynthIDTextWatermarkingConfig)
    reject(synthetic, "SynthID watermarking", "it keeps a state for every row; use WatermarkingConfig")
    defaults = vars(GenerationConfig()) | GenerationConfig._get_default_generation_params()
    for name in vars(GenerationConfig()).keys() - HONOURED - {*HARMLESS, *REFUSED, *REFUSED_IN_A_CALL}:
        _reject_set(name, getattr(config, name), (defaults[name],), "this version does not know it; leave it out")

    for name, (nothing, instead) in REFUSED_ARGUMENTS.items():
        _reject_set(name, kwargs.pop(name, None), nothing, instead)
    kinds = kwargs.pop("token_type_ids", None)  # some tokenizers give them to every model: all zeros say nothing
    reject(kinds is not None and bool(torch.as_tensor(kinds).any()), "token_type_ids", "leave them out")
    kwargs.pop("labels", None)  # Seq2SeqTrainer hands on a whole batch; transformers' generate takes no notice either
    kwargs.pop("trust_remote_code", None)  # of custom_generate, which is refused
    for name, value in kwargs.items():
        if value is not None:
            _reject_unknown(name)


def take_input_ids(inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
    """Take the prompts, from ``inputs`` or ``input_ids``.

    Raises:
        ValueError: if there are none, or both.
    """
    input_ids = kwargs.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("the first argument of generate is input_ids too; pass the prompts once")
    input_ids = inputs if input_ids is None else input_ids
    if input_ids is None:
        raise ValueError(
            f"generate needs input_ids, got none; make them with encode_prompt(tokenizer, prompt){ORDINARY}"
        )
    return input_ids


def read_callables(value: Any, name: str) -> list[Any]:
    """Read a list of logits processors or of stopping criteria.

    Some criteria are given by their call: those that transformers makes of options which the engine holds itself are
    told by their class and dropped, and a caller's own of the same class must not be.

    Raises:
        TypeError: if it is no list, or one of them cannot be called.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list, got {value!r}; put it in one: [...]")
    for each in value:
        if not callable(each) or isinstance(each, type):
            raise TypeError(f"{name} must hold objects that can be called with ids and scores, got {each!r}")
    return [each.__call__ if isinstance(each, HELD_BY_THE_ENGINE) else each for each in value]


def infer_mask(config: GenerationConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Take pad tokens at either end for padding, as transformers does where nothing is said, if they end no answer."""
    if config.pad_token_id is None or config.pad_token_id in token_ids(config.eos_token_id):
        return torch.ones_like(input_ids)
    real = (input_ids != config.pad_token_id).long()
    return real.cummax(dim=-1).values & real.flip(-1).cummax(dim=-1).values.flip(-1)


def read_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> list[list[int]]:
    """Take the padding off a batch of prompts, on whichever side it stands.

    Raises:
        ValueError: if a prompt is empty, an id is outside the vocabulary, or the mask does not fit.
        TypeError: if the ids are not integers, or the mask is no tensor.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        way_out = "pass a batch as generate(**batch)" if hasattr(input_ids, "keys") else "use return_tensors='pt'"
        raise ValueError(f"input_ids must be a tensor of shape (batch, length), got {shape}; {way_out}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}; use torch.tensor(...)")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} must have one shape"
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        wrong = attention_mask[(attention_mask != 0) & (attention_mask != 1)][0].item()
        raise ValueError(f"attention_mask must be 1 at tokens and 0 at padding, got {wrong}")
    if not len(input_ids):
        raise ValueError("the batch is empty; give at least one prompt")
    prompts = [row[keep != 0].tolist() for row, keep in zip(input_ids.cpu(), attention_mask.cpu(), strict=True)]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token id {token} is outside the vocabulary of {vocab_size}; use the model's tokenizer"
                )
    return prompts


def bound_length(config: GenerationConfig, longest: int, has_default_max_length: bool) -> int:
    """Return ``max_new_tokens``, from ``max_length`` where only that was said. Warns where transformers does.

    Raises:
        ValueError: if the prompt leaves no room.
    """
    limit = config.max_new_tokens
    if limit is not None and not has_default_max_length:
        logger.warning_once(f"max_new_tokens={limit} takes precedence over max_length={config.max_length}")
    if limit is None and has_default_max_length:
        limit = DEFAULT_NEW_TOKENS
        warnings.warn(f"the answer is closed after {limit} positions; set max_new_tokens", UserWarning, stacklevel=5)
    elif limit is None:
        limit = config.max_length - longest
    if limit < 1:
        raise ValueError(
            f"no room for new tokens: the prompt has {longest}, max_length={config.max_length}; set max_new_tokens"
        )
    if config.min_new_tokens is not None:
        config.min_length = 0  # min_new_tokens takes precedence
    if (config.min_new_tokens or 0) > limit:
        warnings.warn(
            f"min_new_tokens={config.min_new_tokens} cannot be reached: the answer is closed after {limit} positions",
            UserWarning,
            stacklevel=5,
        )
    return limit
