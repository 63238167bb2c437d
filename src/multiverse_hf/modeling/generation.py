"""``model.generate``: transformers' arguments in, documents out."""

import contextlib
import dataclasses
import difflib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.utils import ModelOutput

from .attention import FOLDED_SDPA
from .engine import Engine, document_entries
from .sampling import Sampler
from .state import GenerationStats, StructureOptions

# The attention implementation is a setting of the model: threads take turns, so that none changes it under another.
_ONE_AT_A_TIME = threading.RLock()

OPTIONS = tuple(f.name for f in dataclasses.fields(StructureOptions))
DEFAULT_NEW_TOKENS = 20  # as transformers: max_length=20 where nothing is said


@dataclass
class MultiverseGenerateOutput(ModelOutput):
    """What ``generate(..., return_dict_in_generate=True)`` gives.

    Attributes:
        sequences: (B, L) int64, prompt and document, paths one after the other; padded on the right.
        sampled_mask: (B, L) bool, True where the model chose the token; False for prompt, forced tokens and padding.
        stats: one :class:`GenerationStats` a row.
        logits: with ``output_logits``, for every generated column of ``sequences`` the (B, V) logits its token was
            chosen from; NaN where no token was chosen.
    """

    sequences: torch.LongTensor | None = None
    sampled_mask: torch.BoolTensor | None = None
    stats: list[GenerationStats] | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None


class DocumentStreamer:
    """Feeds a transformers streamer in document order, as early as the document is settled."""

    def __init__(self, streamer: Any, prompt: torch.Tensor, num_real: int) -> None:
        self.streamer, self.num_sent = streamer, num_real
        streamer.put(prompt.cpu())

    def __call__(self, engine: Engine) -> None:
        (sequence,) = engine.sequences
        entries = document_entries(sequence.root)
        if sequence.live:  # settled: up to the end of the first branch, in document order, that is still written
            last = sequence.live[0].segment.entries
            entries = entries[: entries.index(last[-1]) + 1] if last else []
        for entry in entries[self.num_sent :]:
            self.streamer.put(torch.tensor([sequence.ids[entry]]))
        self.num_sent = max(self.num_sent, len(entries))

    def end(self, engine: Engine) -> None:
        """Send what is left."""
        self(engine)
        self.streamer.end()


def _reject(condition: bool, what: str, instead: str) -> None:
    if condition:
        raise ValueError(f"{what} cannot branch; {instead}")


def split_options(model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> StructureOptions:
    """Take the structure options out of ``kwargs``, the config given, or the checkpoint's config, in that order.

    Raises:
        ValueError: if a value is out of range.
    """
    values = {}
    for source in (model.generation_config, generation_config):
        for name in OPTIONS:
            if getattr(source, name, None) is not None:
                values[name] = getattr(source, name)
    values |= {name: kwargs.pop(name) for name in OPTIONS if kwargs.get(name) is not None}
    for name in OPTIONS:
        kwargs.pop(name, None)
    return StructureOptions(**values)


def check_modes(config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Refuse the modes of transformers that cannot branch, and options nobody knows.

    Raises:
        ValueError: with the way out.
    """
    sampling = "use greedy decoding or do_sample=True"
    _reject((config.num_beams or 1) > 1, f"beam search (num_beams={config.num_beams})", sampling)
    assistant = kwargs.pop("assistant_model", None) is not None or config.prompt_lookup_num_tokens is not None
    _reject(assistant, "assisted decoding", sampling)
    for name in ("penalty_alpha", "dola_layers"):
        _reject(getattr(config, name, None) is not None, f"{name}={getattr(config, name, None)!r}", sampling)
    guidance = getattr(config, "guidance_scale", None)
    _reject(guidance is not None and guidance != 1, f"guidance_scale={guidance}", sampling)
    for name in ("output_scores", "output_attentions", "output_hidden_states"):
        _reject(bool(getattr(config, name, None)), f"{name}=True", "ask for output_logits")
    _reject(kwargs.pop("past_key_values", None) is not None, "past_key_values", "pass the whole text as input_ids")
    _reject(kwargs.pop("inputs_embeds", None) is not None, "inputs_embeds", "pass input_ids")
    _reject(kwargs.pop("negative_prompt_ids", None) is not None, "negative_prompt_ids", sampling)
    _reject(kwargs.pop("custom_generate", None) is not None, "custom_generate", "call it on the base class")
    for name in ("synced_gpus", "use_model_defaults", "trust_remote_code", "position_ids", "token_type_ids"):
        kwargs.pop(name, None)
    if kwargs:
        unknown = next(iter(kwargs))
        known = [*OPTIONS, *(name for name in config.to_dict()), "seed", "logits_processor", "stopping_criteria"]
        close = difflib.get_close_matches(unknown, [*known, "streamer", "attention_mask", "tokenizer"], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"generate has no option {unknown!r}{hint}")


def infer_mask(config: GenerationConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Take leading pad tokens for padding, as transformers does where nothing is said, if they end no answer."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in eos:
        return torch.ones_like(input_ids)
    return (input_ids != config.pad_token_id).long().cummax(dim=-1).values


def read_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, vocab_size: int) -> list[list[int]]:
    """Take the padding off a batch of prompts.

    Raises:
        ValueError: if a prompt is empty, an id is outside the vocabulary, or the shapes do not agree.
        TypeError: if the ids are not integers.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of shape (batch, length), got {shape}; use return_tensors='pt'")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} must have one shape"
        )
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
    """Give ``max_new_tokens``, from ``max_length`` where only that was said.

    Raises:
        ValueError: if the prompt leaves no room.
    """
    limit = config.max_new_tokens
    if limit is None:
        limit = DEFAULT_NEW_TOKENS if has_default_max_length else config.max_length - longest
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"no room for new tokens: the prompt has {longest}, max_length={config.max_length}, "
            f"max_new_tokens={config.max_new_tokens}; raise max_new_tokens"
        )
    return limit


@contextlib.contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Decode with :func:`~.attention.folded_sdpa` where the model's own attention would do the same.

    sdpa as transformers calls it copies the keys once per head. Flash and flex kernels take no mask of single tokens:
    models loaded with them decode with sdpa, or, where sdpa cannot do what they do, with eager attention.
    """
    own = model.config._attn_implementation
    if own in ("eager", FOLDED_SDPA) or not getattr(model, "_supports_attention_backend", False):
        yield
        return
    only_eager = not model._supports_sdpa or getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if own != "sdpa" and only_eager else FOLDED_SDPA)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def generate(
    model: Any,
    inputs: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    streamer: Any | None,
    seed: int | None,
    kwargs: dict[str, Any],
) -> torch.LongTensor | MultiverseGenerateOutput:
    """Do what :meth:`MultiverseMixin.generate` says."""
    options = split_options(model, generation_config, kwargs)
    tokenizer = kwargs.pop("tokenizer", None)
    prefix_allowed = kwargs.pop("prefix_allowed_tokens_fn", None)
    if prefix_allowed is not None:
        allowed_in_batch = prefix_allowed
        prefix_allowed = lambda _, ids: allowed_in_batch(0, ids)  # noqa: E731 - rows are branches, of one prompt
    input_ids = kwargs.pop("input_ids", None)
    input_ids = inputs if input_ids is None else input_ids
    if input_ids is None:
        raise ValueError("generate needs input_ids")
    attention_mask = kwargs.pop("attention_mask", None)
    _reject(kwargs.pop("use_cache", None) is False, "use_cache=False", "leave it on; the engine keeps its own cache")
    said = (kwargs, vars(generation_config or GenerationConfig()), vars(model.generation_config))
    has_default_max_length = all(source.get("max_length") is None for source in said)
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    check_modes(config, rest)
    if attention_mask is None and isinstance(input_ids, torch.Tensor):
        attention_mask = infer_mask(config, input_ids)
    prompts = read_prompts(input_ids, attention_mask, model.get_input_embeddings().num_embeddings)
    max_new_tokens = bound_length(config, input_ids.shape[1], has_default_max_length)

    device = model.device
    model._prepare_special_tokens(config, attention_mask is not None, device=device, batch_size=len(prompts))
    processors = {
        length: model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=length,
            prefix_allowed_tokens_fn=prefix_allowed,
            logits_processor=LogitsProcessorList(logits_processor or []),
            device=device,
            model_kwargs={},
        )
        for length in {len(prompt) for prompt in prompts}
    }
    criteria = model._get_stopping_criteria(config, StoppingCriteriaList(stopping_criteria or []), tokenizer)
    ours = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)  # the engine holds these itself
    criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, ours))

    if prefix_allowed is not None and len(prompts) > 1:
        raise ValueError(f"prefix_allowed_tokens_fn takes one prompt, got {len(prompts)}; answer them one at a time")
    copies = 1 if config.num_return_sequences is None else config.num_return_sequences
    if not isinstance(copies, int) or copies < 1:
        raise ValueError(f"num_return_sequences must be an integer of at least 1, got {copies!r}")
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"a streamer takes one answer, got {len(prompts)}; stream them one at a time")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if config.do_sample else 0
    shows_branches = hasattr(streamer, "on_event")
    text_streamer = None
    if streamer is not None and not shows_branches:
        text_streamer = DocumentStreamer(streamer, input_ids, len(prompts[0]))
    engine = Engine(
        model,
        model.tags,
        options,
        Sampler(processors, bool(config.do_sample), seed),
        max_new_tokens,
        context=getattr(model.config, "max_position_embeddings", None),
        eos_token_ids=[] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist(),
        stopping_criteria=criteria,
        max_time=config.max_time,
        keep_logits=bool(config.output_logits and config.return_dict_in_generate),
        on_event=streamer.on_event if shows_branches else None,
        on_step=text_streamer,
    )
    with _ONE_AT_A_TIME, decoding_attention(model):
        engine.generate(prompts)
    if text_streamer is not None:
        text_streamer.end(engine)
    return _output(engine, input_ids, copies, config)


def _output(
    engine: Engine, input_ids: torch.Tensor, copies: int, config: GenerationConfig
) -> torch.LongTensor | MultiverseGenerateOutput:
    """Put answers beside their prompts, padded on the right."""
    width = input_ids.shape[1]
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    orders = [document_entries(s.root)[len(s.prompt) :] for s in engine.sequences]
    length = max(map(len, orders))
    answers = torch.full((len(orders), length), pad)
    sampled = torch.zeros(len(orders), width + length, dtype=torch.bool)
    for row, (sequence, order) in enumerate(zip(engine.sequences, orders, strict=True)):
        answers[row, : len(order)] = torch.tensor([sequence.ids[entry] for entry in order], dtype=torch.long)
        sampled[row, width : width + len(order)] = torch.tensor([sequence.sampled[e] for e in order], dtype=torch.bool)
    prompts = input_ids.repeat_interleave(copies, dim=0).long()
    sequences = torch.cat([prompts, answers.to(input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    logits = None
    if engine.keep_logits:
        dtype = torch.float64 if engine.model.dtype == torch.float64 else torch.float32
        width = engine.model.get_output_embeddings().weight.shape[0]
        blank = torch.full((width,), torch.nan, dtype=dtype, device=engine.model.device)
        logits = tuple(
            torch.stack([
                s.logits.get(order[column], blank) if column < len(order) else blank
                for s, order in zip(engine.sequences, orders, strict=True)
            ])
            for column in range(length)
        )  # fmt: skip
    return MultiverseGenerateOutput(
        sequences, sampled.to(input_ids.device), [s.stats for s in engine.sequences], logits
    )
