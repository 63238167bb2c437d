"""Requests as OpenAI's clients send them. Each field is honoured, or refused with what would be accepted.

A field that this server does not do is listed with the values that ask for nothing, so that a client may send its
defaults. pydantic checks the values; :func:`describe_fault` makes the one line that a client gets.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from multiverse_hf.data.suffixes import Suffix

MAX_TEMPERATURE, MAX_TOP_LOGPROBS, MAX_STOPS = 2.0, 20, 16


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        kind: OpenAI's ``type``.
        param: the field that is at fault.
        code: OpenAI's ``code``.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def only(*values: Any, instead: str) -> Any:
    """Return the type of a field that this server does not do: None, or one of the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or any(value == each and type(value) is type(each) for each in values):
            return value
        accepted = ", ".join(["null", *(repr(each).replace("'", '"') for each in values)])
        raise ValueError(f"is not supported; accepted: {accepted}; {instead}")

    schema = {"enum": [None, *values], "description": instead}
    return Annotated[Any, BeforeValidator(check), Field(default=None, json_schema_extra=schema)]


class Strict(BaseModel):
    """A part of a request that has no unknown fields, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: only([], instead="a message's text is read without them")  # a client may send an answer back


class Message(Strict):
    """A chat message. Tags in an assistant's are control tags, in every other one they are text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = Field(default=None, description="an assistant's reasoning, as this server gave it")
    reasoning: str | None = Field(default=None, description="another name of reasoning_content")
    name: only(instead="say who speaks in the content")
    refusal: only(instead="put it in the content")
    tool_calls: only([], instead="this server calls no tools")
    function_call: only(instead="this server calls no tools")
    audio: only(instead="this server reads text")
    annotations: only([], instead="this server reads text")

    def text(self) -> str:
        """Return the content as text."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class MultiverseFields(Strict):
    """What only this server has; a client puts it in ``extra_body``.

    ``max_new_tokens`` bounds the answer's length, that is the longest chain of tokens that wait for each other. The
    ordinary ``max_tokens`` bounds the tokens of all paths together. The other limits are those of ``generate``.
    """

    structure: Literal["guided", "lenient", "off"] | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    max_path_tokens: int | None = Field(default=None, ge=1)
    max_depth: int | None = Field(default=None, ge=0)
    max_paths: int | None = Field(default=None, ge=1)
    max_branches: int | None = Field(default=None, ge=1)
    speculate: Annotated[int, Field(ge=0, le=64)] | Literal["auto", "off"] | None = None
    suffix: Literal["parallel", "sequential", "none"] | None = Field(
        default=None, description="sentence of record at the end of the last user message"
    )
    events: bool = Field(default=False, description="stream each branch's events beside the ordinary chunks")


class StreamOptions(Strict):
    """What a stream carries."""

    include_usage: bool | None = None
    include_obfuscation: only(False, instead="leave it out")
    continuous_usage_stats: bool | None = Field(default=None, description="usage so far in every chunk, as vLLM does")

    @model_validator(mode="after")
    def _agrees(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats goes with include_usage true")
        return self


class JsonSchema(Strict):
    """A JSON schema and its name."""

    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """Form of the answer after the reasoning."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and with no other")
        return self


Stop = Annotated[
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)]
    | None,
    Field(default=None, description=f"where the answer ends, up to {MAX_STOPS} strings; they are not part of it"),
]
Seed = Annotated[int | None, Field(default=None, ge=-(2**63), lt=2**63)]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]] | None,
    Field(default=None, max_length=1024, description="by token id, what is added to its score"),
]


class Sampling(Strict):
    """Fields that all three ways of asking share."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="-1 and 0 for all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    seed: Seed
    stream: bool | None = None
    user: str | None = Field(default=None, max_length=256, description="written to the log")
    multiverse: MultiverseFields = Field(default_factory=MultiverseFields)


class Completing(Sampling):
    """Fields of chat and text completions."""

    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="another name of max_tokens")
    n: int | None = Field(default=None, ge=1)
    stop: Stop
    logit_bias: Bias
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Completing":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream true")
        if self.multiverse.events and not self.stream:
            raise ValueError("multiverse.events goes with stream true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one")
        return self

    @property
    def limit(self) -> int | None:
        """Bound on the answer's tokens."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


NO_TOOLS = "this server calls no tools"
NOT_STORED = "this server stores nothing"


class ChatRequest(Completing):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    include_reasoning: bool | None = Field(default=None, description="False leaves the reasoning out of the answer")
    ignore_eos: bool | None = Field(default=None, description="go on past end tokens, as load generators ask")
    tools: only([], instead=NO_TOOLS)
    tool_choice: only("none", "auto", instead=NO_TOOLS)
    parallel_tool_calls: only(True, False, instead=NO_TOOLS)
    functions: only([], instead=NO_TOOLS)
    function_call: only("none", "auto", instead=NO_TOOLS)
    audio: only(instead="this server writes text")
    modalities: only(["text"], instead="this server writes text")
    moderation: only(instead="this server has no moderation")
    metadata: only({}, instead=NOT_STORED)
    store: only(False, instead=NOT_STORED)
    prediction: only(instead="leave it out")
    prompt_cache_key: only(instead="this server keeps no prompts")
    prompt_cache_options: only(instead="this server keeps no prompts")
    prompt_cache_retention: only(instead="this server keeps no prompts")
    reasoning_effort: only(
        instead="bound the reasoning with max_tokens, or turn branches off with multiverse.structure"
    )
    safety_identifier: only(instead="use user")
    service_tier: only("auto", "default", instead="there is one tier")
    verbosity: only("medium", instead="ask for it in the message")
    web_search_options: only(instead="this server searches nothing")

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs true")
        return self


class CompletionRequest(Completing):
    """Body of ``/v1/completions``: text that the answer continues, without a chat template. Tags in it are text.

    Token ids are read as they are, so tags among them are control tags.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    ignore_eos: bool | None = None
    best_of: only(1, instead="use n")
    echo: only(False, instead="put the prompt before the answer yourself")
    suffix: only("", instead="this server inserts nothing")


class ResponsesInput(Strict):
    """A message of ``/v1/responses``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: only(instead="leave it out")


class ResponsesReasoning(BaseModel):
    """Reasoning of an earlier answer, which a client sends back; it is not read again."""

    model_config = ConfigDict(extra="allow")
    type: Literal["reasoning"]


class TextFormat(Strict):
    """Form of the answer, as ``/v1/responses`` writes it."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema goes with type json_schema, and with no other")
        return self


class TextConfig(Strict):
    """``text`` of ``/v1/responses``."""

    format: TextFormat | None = None
    verbosity: only("medium", instead="ask for it in the input")


class ReasoningConfig(Strict):
    """``reasoning`` of ``/v1/responses``."""

    effort: only(instead="bound the reasoning with max_output_tokens")
    summary: only(instead="the reasoning itself is in the answer")
    generate_summary: only(instead="the reasoning itself is in the answer")


class ResponsesRequest(Sampling):
    """Body of ``/v1/responses``."""

    input: str | list[ResponsesInput | ResponsesReasoning]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: only([], instead="the reasoning is always in the answer")
    top_logprobs: only(0, instead="use /v1/chat/completions")
    stream_options: only({}, {"include_obfuscation": False}, instead="leave it out")
    metadata: only({}, instead=NOT_STORED)
    store: only(False, instead=NOT_STORED)
    previous_response_id: only(instead=f"{NOT_STORED}; send the earlier messages in input")
    conversation: only(instead=f"{NOT_STORED}; send the earlier messages in input")
    background: only(False, instead=NOT_STORED)
    background_options: only(instead=NOT_STORED)
    truncation: only("disabled", instead="shorten the input")
    tools: only([], instead=NO_TOOLS)
    tool_choice: only("none", "auto", instead=NO_TOOLS)
    parallel_tool_calls: only(True, False, instead=NO_TOOLS)
    max_tool_calls: only(instead=NO_TOOLS)
    prompt: only(instead="put its text in input")
    prompt_cache_key: only(instead="this server keeps no prompts")
    prompt_cache_options: only(instead="this server keeps no prompts")
    prompt_cache_retention: only(instead="this server keeps no prompts")
    service_tier: only("auto", "default", instead="there is one tier")
    safety_identifier: only(instead="use user")
    moderation: only(instead="this server has no moderation")
    access_programs: only(instead="leave it out")
    context_management: only(instead="shorten the input")
    image: only(instead="this server writes text")

    @model_validator(mode="after")
    def _events(self) -> "ResponsesRequest":
        if self.multiverse.events:
            raise ValueError("multiverse.events goes with /v1/chat/completions")
        return self


class TokenizeRequest(Strict):
    """Body of ``/tokenize``: a text as ``/v1/completions`` reads it, or messages as a chat does."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, and not both")
        return self


def describe_fault(faults: Sequence[Mapping[str, Any]], body: type[BaseModel] | None) -> ApiError:
    """Return the error for a body that pydantic does not take.

    Args:
        faults: pydantic's errors.
        body: the model of the body, to find the name that was meant.
    """
    # where a field may have several forms there is an error for each: the deepest is of the form that was meant
    same = [fault for fault in faults if fault["loc"][:2] == faults[0]["loc"][:2]]
    fault = max(same, key=lambda each: len(each["loc"]))
    where: Sequence[Any] = [part for part in fault["loc"] if part != "body"]
    # pydantic adds the names of those forms, which no client knows
    known = [] if body is None else list(body.model_fields)
    inner = [part for part in where[1:] if isinstance(part, int) or (str(part).islower() and str(part).isidentifier())]
    param = ".".join(str(part) for part in [*where[:1], *(part for part in inner if part not in ("str", "list"))])
    reason = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {fault.get('ctx', {}).get('error', reason)}")
    if isinstance(fault.get("input"), bytes):  # FastAPI parses a body by its type
        return ApiError(400, "the body is not read without its type; send the header 'Content-Type: application/json'")
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(where[-1]), known if len(where) == 1 else [], 1)
        reason = f"is not a field of this request{f'; did you mean {close[0]}?' if close else '; leave it out'}"
    elif reason[:1].isupper():
        reason = reason[0].lower() + reason[1:]
    if fault["type"] != "extra_forbidden" and not isinstance(fault.get("input"), dict | list | None):
        reason += f"; got {fault['input']!r:.80}"
    return ApiError(400, f"{param}: {reason}" if param else reason, param=param or None)


def suffix_of(fields: MultiverseFields, default: Suffix) -> Suffix:
    """Return the sentence of record that a request asks for."""
    return default if fields.suffix is None else Suffix(fields.suffix)
