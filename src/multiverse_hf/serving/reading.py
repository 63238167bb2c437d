"""From a request's body to what the engine is given, within the server's bounds."""

from collections.abc import Sequence
from typing import Any

from multiverse_hf.checkpoints import MIN_TEMPERATURE, Checkpoint
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import one_line
from multiverse_hf.modeling.tags import encode_prompt, encode_text

from .config import ServerConfig
from .protocol import (
    ApiError,
    ChatRequest,
    Completing,
    CompletionRequest,
    Message,
    ResponsesInput,
    ResponsesRequest,
    Sampling,
    TokenizeRequest,
    suffix_of,
)
from .worker import ModelRequest

_LIMITS = ("structure", "max_path_tokens", "max_depth", "max_paths", "speculate")


def check_model(name: str | None, config: ServerConfig) -> None:
    """Check the name of the model.

    Raises:
        ApiError: 404 if it is another one.
    """
    if name not in (None, config.name):
        raise ApiError(
            404, f"there is no model {name!r:.100} here; the server has {config.name!r}", "model", "model_not_found"
        )


def read_chat(body: ChatRequest, checkpoint: Checkpoint, config: ServerConfig) -> ModelRequest:
    """Read a request of ``/v1/chat/completions``.

    Raises:
        ApiError: if it does not fit.
    """
    prompt = encode_messages(body.messages, checkpoint, suffix_of(body.multiverse, config.suffix))
    asked = _read(body, [prompt], body.limit, checkpoint, config)
    asked.num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.ignore_eos:
        asked.options["eos_token_id"] = -1
    return asked


def read_completion(body: CompletionRequest, checkpoint: Checkpoint, config: ServerConfig) -> ModelRequest:
    """Read a request of ``/v1/completions``.

    Raises:
        ApiError: if it does not fit.
    """
    given: Any = body.prompt
    several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not several:
        raise ApiError(400, "prompt: the list is empty; give at least one prompt", "prompt")
    if len(several) > config.max_choices:
        raise ApiError(400, f"prompt: {len(several)} prompts; at most {config.max_choices}", "prompt")
    prompts = [_encode(each, checkpoint) if isinstance(each, str) else list(each) for each in several]
    for token in (token for each in prompts for token in each):
        if not 0 <= token < checkpoint.config.vocab_size:
            raise ApiError(
                400,
                f"prompt: {token!r:.40} is no token id; ids are from 0 to {checkpoint.config.vocab_size - 1}",
                "prompt",
            )
    asked = _read(body, prompts, body.limit, checkpoint, config)
    asked.num_logprobs, asked.splits = body.logprobs, False
    if body.ignore_eos:
        asked.options["eos_token_id"] = -1
    return asked


def read_responses(body: ResponsesRequest, checkpoint: Checkpoint, config: ServerConfig) -> ModelRequest:
    """Read a request of ``/v1/responses``.

    Raises:
        ApiError: if it does not fit.
    """
    given = [body.input] if isinstance(body.input, str) else body.input
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    for each in given:
        if isinstance(each, str):
            messages.append(Message(role="user", content=each))
        elif isinstance(each, ResponsesInput):
            messages.append(Message(role=each.role, content=each.content))
    if not any(message.role == "user" for message in messages):
        raise ApiError(400, "input: there is no user message; give one", "input")
    prompt = encode_messages(messages, checkpoint, suffix_of(body.multiverse, config.suffix))
    asked = _read(body, [prompt], body.max_output_tokens, checkpoint, config)
    shape = body.text and body.text.format
    if shape is not None and shape.type == "json_schema":
        asked.response_format = {
            "type": "json_schema",
            "json_schema": {"name": shape.name or "answer", "schema": shape.schema_},
        }
    elif shape is not None and shape.type == "json_object":
        asked.response_format = {"type": "json_object"}
    return asked


def read_tokens(body: TokenizeRequest, checkpoint: Checkpoint, config: ServerConfig) -> list[int]:
    """Return the ids of ``/tokenize``.

    Raises:
        ApiError: if there is nothing to tokenize.
    """
    if body.messages is not None:
        return encode_messages(body.messages, checkpoint, config.suffix)
    return _encode(body.prompt, checkpoint)


def _encode(text: str, checkpoint: Checkpoint) -> list[int]:
    """Return the ids of a text without a chat template."""
    _check_text(text, "prompt")
    return encode_text(checkpoint.tokenizer, text, checkpoint.tags.names)


def _check_text(text: str, param: str) -> None:
    r"""Check that a text has a UTF-8 form. JSON can escape half a character, such as ``"\ud800"``."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        half = f"{text[err.start]!r} at character {err.start}"
        raise ApiError(400, f"{param}: half of a surrogate pair, {half}; send both or none", param) from err


def encode_messages(messages: Sequence[Message], checkpoint: Checkpoint, suffix: Suffix) -> list[int]:
    """Return the ids of a chat. The last message may be the beginning of the answer, which is continued.

    Raises:
        ApiError: if the chat template cannot take it.
    """
    think, names = checkpoint.tags.names.think, checkpoint.tags.names
    chat: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        content, reasoning = message.text(), message.reasoning_content or message.reasoning
        if reasoning is not None and message.role != "assistant":
            raise ApiError(400, f"messages.{number}.reasoning: only an assistant's message has it", "messages")
        if message.content is None and message.role != "assistant":
            raise ApiError(400, f"messages.{number}.content: a {message.role}'s message has a text", "messages")
        if reasoning and think is not None:
            content = f"{names.open('think')}\n{reasoning}\n{names.close('think')}\n\n{content}"
        _check_text(content, "messages")
        role = "system" if message.role == "developer" else message.role
        chat.append({"role": role, "content": content})
    last = next((message for message in reversed(chat) if message["role"] == "user"), None)
    if last is not None and chat[-1]["role"] != "assistant":
        last["content"] = suffix.end(last["content"])
    try:
        ids = encode_prompt(checkpoint.tokenizer, chat, names)
    except Exception as err:  # a chat template is the checkpoint's own program and may raise anything
        raise ApiError(400, f"messages: {one_line(err, 300)}", "messages") from err
    if not ids:
        raise ApiError(400, "messages: they have no token; give a text", "messages")
    return ids


def _read(
    body: Sampling, prompts: list[list[int]], limit: int | None, checkpoint: Checkpoint, config: ServerConfig
) -> ModelRequest:
    """Read the fields that all ways of asking share."""
    context = getattr(checkpoint.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ApiError(400, "prompt: it is empty; give a text", "prompt")
    room = config.max_new_tokens if context is None else min(config.max_new_tokens, context - longest)
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens and the model's context {context}; shorten the prompt",
            "messages",
            "context_length_exceeded",
        )
    fields = body.multiverse
    for name, value, most in (
        ("max_tokens", limit, config.max_total_tokens),
        ("multiverse.max_new_tokens", fields.max_new_tokens, config.max_new_tokens),
        ("multiverse.max_branches", fields.max_branches, config.max_branches),
    ):
        if value is not None and value > most:
            raise ApiError(400, f"{name}: {value}; this server allows at most {most}", name)
    options: dict[str, Any] = {name: getattr(fields, name) for name in _LIMITS}
    options = {name: value for name, value in options.items() if value is not None}
    length = min(room, *(each for each in (fields.max_new_tokens, limit) if each is not None), room)
    options |= {"max_new_tokens": length, "max_branches": fields.max_branches or config.max_branches}
    if limit is not None or options.get("structure") == "off":
        options["max_total_tokens"] = limit or length
    else:
        options["max_total_tokens"] = config.max_total_tokens
    options["max_time"] = config.max_time
    options |= checkpoint.with_record(_sampling(body))
    asked = ModelRequest(prompts, options=options, seed=body.seed)
    if isinstance(body, Completing):
        asked.copies = body.n or 1
        if asked.copies * len(prompts) > config.max_choices:
            raise ApiError(
                400, f"n: {asked.copies * len(prompts)} answers; this server allows at most {config.max_choices}", "n"
            )
        asked.stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        asked.frequency, asked.presence = body.frequency_penalty or 0.0, body.presence_penalty or 0.0
        if body.logit_bias:
            options["sequence_bias"] = [[[token], bias] for token, bias in _biases(body.logit_bias, checkpoint)]
        if body.response_format is not None and body.response_format.type != "text":
            asked.response_format = body.response_format.model_dump(by_alias=True, exclude_none=True)
    return asked


def _sampling(body: Sampling) -> dict[str, Any]:
    """Return transformers' options. Where nothing is said, the family decides, then the generation config."""
    asked: dict[str, Any] = {}
    if body.temperature is not None:
        asked["do_sample"] = body.temperature >= MIN_TEMPERATURE
        if asked["do_sample"]:
            asked["temperature"] = body.temperature
    narrowing = {"top_p": body.top_p, "top_k": body.top_k, "min_p": body.min_p}
    narrowing = {name: value for name, value in narrowing.items() if value is not None}
    if asked.get("do_sample", True) and narrowing:
        asked |= {"do_sample": True} | narrowing
        if narrowing.get("top_k", 1) < 1:
            asked["top_k"] = 0
    if body.repetition_penalty is not None:
        asked["repetition_penalty"] = body.repetition_penalty
    return asked


def _biases(given: dict[str, float], checkpoint: Checkpoint) -> list[tuple[int, float]]:
    biases = []
    for name, bias in given.items():
        if not name.isdecimal() or len(name) > 9 or int(name) >= checkpoint.config.vocab_size:
            raise ApiError(
                400,
                f"logit_bias: {name!r:.40} is no token id; ids are from 0 to {checkpoint.config.vocab_size - 1}",
                "logit_bias",
            )
        biases.append((int(name), float(bias)))
    return biases
