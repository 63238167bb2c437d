"""``model.generate``: transformers' arguments in, documents out."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .arguments import (
    OPTIONS,
    bound_length,
    check_modes,
    infer_mask,
    read_callables,
    read_prompts,
    split_options,
    take_input_ids,
    token_ids,
)
from .cache import LogCache
from .callables import BatchCalls, is_callers
from .engine import DEFAULT_CHUNK, Engine
from .labels import IMPOSSIBLE
from .layout import plain_layout
from .sampling import Sampler, sequence_key
from .state import FinishReason, GenerationStats, Request, Segment, Sequence, document_entries


@dataclass
class MultiverseGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``generate(..., return_dict_in_generate=True)`` gives: transformers' output, and what branches add.

    ``scores``, ``attentions``, ``hidden_states`` and ``past_key_values`` are None where branches may be written.

    Attributes:
        sequences: (B, L) int64, prompt and document, paths one after the other; padded on the right.
        logits: with ``output_logits``, for every generated column of ``sequences`` the (B, V) logits its token was
            chosen from. Forced tokens and padding have probability one: 0 at the token, -1000 at all others.
        sampled_mask: (B, L) bool, True where the model chose the token; False for prompt, forced tokens and padding.
        stats: one :class:`GenerationStats` a row.
    """

    sampled_mask: torch.BoolTensor | None = None
    stats: list[GenerationStats] | None = None


class DocumentStreamer:
    """Feeds a transformers streamer in document order, as early as the document is settled.

    Args:
        streamer: has ``put`` and ``end``, as in transformers.
        prompt: (1, L) ids, put first.
        sequence: what is being written.
    """

    def __init__(self, streamer: Any, prompt: torch.Tensor, sequence: Sequence) -> None:
        self.streamer, self.sequence = streamer, sequence
        self.entries = _settled(sequence.root)
        streamer.put(prompt.cpu())

    def __call__(self) -> None:
        """Send what has been settled since the last call."""
        sequence = self.sequence
        while (entry := next(self.entries, None)) is not None:
            if entry >= len(sequence.request.prompt):
                self.streamer.put(torch.tensor([sequence.ids[entry]]))


def _settled(segment: Segment) -> Iterator[int | None]:
    """Return the log entries of an answer in document order, None whenever the next one is not written yet."""
    at = 0
    while True:
        while at < len(segment.entries):
            yield segment.entries[at]
            at += 1
        if segment.block is not None:
            for path in segment.block.paths:
                yield from _settled(path)
            while segment.block.reduced is None:
                yield None
            segment, at = segment.block.reduced, 0
        elif segment.ended:
            return
        else:
            yield None


@dataclass
class Asked:
    """What one call asked for.

    Attributes:
        requests: one for each answer.
        config: the call's generation config, complete.
        input_ids: (B, L), the prompts as they came.
        copies: answers to each prompt.
    """

    requests: list[Request]
    config: GenerationConfig
    input_ids: torch.Tensor
    copies: int


def read_requests(
    model: Any,
    inputs: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    seed: int | None,
    kwargs: dict[str, Any],
) -> Asked:
    """Read the arguments of ``generate``.

    Raises:
        ValueError, TypeError: as :meth:`~.modeling_multiverse.MultiverseForCausalLM.generate` says.
    """
    options = split_options(model, generation_config, kwargs)
    tokenizer = kwargs.pop("tokenizer", None)
    prefix_allowed = kwargs.pop("prefix_allowed_tokens_fn", None)
    if prefix_allowed is not None:
        allowed_in_batch = prefix_allowed
        prefix_allowed = lambda _, ids: allowed_in_batch(0, ids)  # noqa: E731 - rows are branches, of one prompt
    input_ids = take_input_ids(inputs, kwargs)
    attention_mask = kwargs.pop("attention_mask", None)
    said = (kwargs, vars(generation_config or GenerationConfig()), vars(model.generation_config))
    has_default_max_length = all(source.get("max_length") is None for source in said)
    config, rest = model._prepare_generation_config(generation_config, **kwargs)
    check_modes(config, rest)
    if attention_mask is None and isinstance(input_ids, torch.Tensor):
        attention_mask = infer_mask(config, input_ids)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if (highest := max(model.tags.control_ids)) >= num_embeddings:
        raise ValueError(
            f"the tags go up to id {highest} and the embeddings to {num_embeddings - 1}; resize_token_embeddings to "
            f"{highest + 1} at least"
        )
    prompts = read_prompts(input_ids, attention_mask, num_embeddings)
    max_new_tokens = int(bound_length(config, input_ids.shape[1], has_default_max_length))

    own_processors = read_callables(logits_processor, "logits_processor")
    own_criteria = read_callables(stopping_criteria, "stopping_criteria")
    copies = 1 if config.num_return_sequences is None else config.num_return_sequences
    device = model.device
    model._prepare_special_tokens(config, attention_mask is not None, device=device, batch_size=len(prompts))
    calls = BatchCalls(
        [each for each in own_processors if is_callers(each)],
        [each for each in own_criteria if is_callers(each)],
        input_ids.repeat_interleave(copies, dim=0),
        0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
    )
    calls = calls if calls.processors or calls.criteria else None
    chain = [calls.stand_in(each) if is_callers(each) else each for each in own_processors]
    processors = {
        length: model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=length,
            prefix_allowed_tokens_fn=prefix_allowed,
            logits_processor=LogitsProcessorList(chain),
            device=device,
            model_kwargs={},
        )
        for length in {len(prompt) for prompt in prompts}
    }
    criteria = model._get_stopping_criteria(
        config, StoppingCriteriaList(each for each in own_criteria if not is_callers(each)), tokenizer
    )
    ours = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)  # the engine holds these itself
    criteria = StoppingCriteriaList(c for c in criteria if not isinstance(c, ours))

    if prefix_allowed is not None and len(prompts) > 1:
        raise ValueError(f"prefix_allowed_tokens_fn takes one prompt, got {len(prompts)}; answer them one at a time")
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    seed = getattr(config, "seed", None) if seed is None else seed
    if seed is not None and (isinstance(seed, bool) or not hasattr(seed, "__index__")):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if seed is None and config.do_sample and (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError("the processes of a tensor-parallel model have to draw alike: give seed=")
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if config.do_sample else 0
    sampler = Sampler(processors, bool(config.do_sample), operator.index(seed), calls)
    eos = [] if config._eos_token_tensor is None else config._eos_token_tensor.flatten().tolist()
    keep_logits = bool(config.output_logits and config.return_dict_in_generate)
    seen: dict[tuple[int, ...], int] = {}
    requests = []
    for index, prompt in enumerate(prompts):
        occurrence = seen[tuple(prompt)] = seen.get(tuple(prompt), -1) + 1
        requests.append(
            Request(
                prompt, sequence_key(prompt, occurrence), options, sampler, max_new_tokens, frozenset(eos), criteria,
                config.max_time, keep_logits, index=index, calls=calls,
            )
        )  # fmt: skip
    return Asked(requests, config, input_ids, copies)


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
    """Do what :meth:`~.modeling_multiverse.MultiverseForCausalLM.generate` says."""
    asked = read_requests(model, inputs, generation_config, logits_processor, stopping_criteria, seed, kwargs)
    requests = asked.requests
    if streamer is not None and len(requests) > 1:
        raise ValueError(f"a streamer takes one answer, got {len(requests)}; stream them one at a time")
    shows_branches = hasattr(streamer, "on_event")
    if shows_branches:
        requests[0].on_event = streamer.on_event
    room = sum(len(r.prompt) + min(r.max_new_tokens * (4 if r.structured else 1), 2048) for r in requests)
    cache = LogCache(model.config.num_hidden_layers, room, growable=True)
    # a caller's own processors see all rows at each step, so all prompts are read in the first
    chunk = DEFAULT_CHUNK if requests[0].calls is None else sum(len(request.prompt) for request in requests)
    engine = Engine(model, model.tags, cache, max_num_seqs=len(requests), prefill_chunk=chunk)
    sequences = [engine.add(request) for request in requests]
    stream = None
    if streamer is not None and not shows_branches:
        stream = engine.on_step = DocumentStreamer(streamer, asked.input_ids, sequences[0])
    while engine.has_work:
        for sequence in engine.step():
            if sequence.error is not None:
                raise sequence.error
    if stream is not None:
        stream()
        streamer.end()
    return _output(model, sequences, asked)


def generate_plain(
    model: Any,
    base_generate: Callable[..., Any],
    inputs: torch.Tensor | None,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    streamer: Any | None,
    seed: int | None,
    kwargs: dict[str, Any],
) -> Any:
    """Have transformers' own ``generate`` answer, with tags as text: what ``structure="off"`` asks beyond the engine.

    Args:
        model: the model.
        base_generate: ``generate`` of its base class, bound to it.
        seed: of torch's generators during the call; the noise is then the batch's, not each prompt's own.
        inputs, generation_config, logits_processor, stopping_criteria, streamer, kwargs: of the call.

    Returns:
        What transformers returns; greedy decoding and sampling give a :class:`MultiverseGenerateOutput`.

    Raises:
        ValueError: if the streamer takes branch events, which only the engine has.
    """
    if hasattr(streamer, "on_event"):
        raise ValueError(
            "branch events come from the engine, which does not do what this call asks for; pass a transformers "
            "streamer, or leave out what only ordinary decoding does"
        )
    total = kwargs.get("max_total_tokens")
    kwargs = {name: value for name, value in kwargs.items() if name not in OPTIONS}
    if total is not None:
        kwargs["max_new_tokens"] = min(total, kwargs.get("max_new_tokens") or total)
    seed = getattr(generation_config, "seed", None) if seed is None else seed
    with plain_layout(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = base_generate(
            inputs, generation_config, logits_processor, stopping_criteria, streamer=streamer, **kwargs
        )
    if not isinstance(output, GenerateDecoderOnlyOutput):
        return output
    prompts = kwargs.get("input_ids", inputs)
    width = prompts.shape[1] if prompts is not None else int("inputs_embeds" not in kwargs)
    config, _ = model._prepare_generation_config(generation_config, **kwargs)
    ends = torch.tensor(token_ids(config.eos_token_id), device=output.sequences.device)
    answers = output.sequences[:, width:]
    stats, sampled = [], torch.zeros_like(output.sequences, dtype=torch.bool)
    for row, answer in enumerate(answers):
        found = torch.isin(answer, ends).nonzero().flatten()
        count = int(found[0]) + 1 if len(found) else len(answer)
        sampled[row, width : width + count] = True
        is_cut = count >= (config.max_new_tokens or config.max_length - width)
        reason = FinishReason.STOP if len(found) else FinishReason.LENGTH if is_cut else FinishReason.CRITERIA
        stats.append(GenerationStats(count, count, answers.shape[1], finish_reason=reason))
    return MultiverseGenerateOutput(**output, sampled_mask=sampled, stats=stats)


def _output(model: Any, written: list[Sequence], asked: Asked) -> torch.LongTensor | MultiverseGenerateOutput:
    """Put answers beside their prompts, padded on the right."""
    input_ids, config = asked.input_ids, asked.config
    width = input_ids.shape[1]
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    orders = [document_entries(s.root)[len(s.request.prompt) :] for s in written]
    length = max(map(len, orders))
    answers = torch.full((len(orders), length), pad)
    sampled = torch.zeros(len(orders), width + length, dtype=torch.bool)
    for row, (sequence, order) in enumerate(zip(written, orders, strict=True)):
        answers[row, : len(order)] = torch.tensor([sequence.ids[entry] for entry in order], dtype=torch.long)
        sampled[row, width : width + len(order)] = torch.tensor([sequence.sampled[e] for e in order], dtype=torch.bool)
    prompts = input_ids.repeat_interleave(asked.copies, dim=0).long()
    sequences = torch.cat([prompts, answers.to(input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    logits = None
    if asked.requests[0].keep_logits:
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        vocab_size = model.get_output_embeddings().weight.shape[0]
        certain = torch.full((length, len(orders), vocab_size), IMPOSSIBLE, dtype=dtype, device=model.device)
        certain.scatter_(-1, answers.T[..., None].to(model.device), 0.0)
        for row, (sequence, order) in enumerate(zip(written, orders, strict=True)):
            for column, entry in enumerate(order):
                if entry in sequence.logits:
                    certain[column, row] = sequence.logits[entry]
        logits = tuple(certain)
    return MultiverseGenerateOutput(
        sequences=sequences,
        logits=logits,
        sampled_mask=sampled.to(input_ids.device),
        stats=[s.stats for s in written],
    )
