"""Replies of a model: what is kept of one, and how a typed result is read from it."""

import functools
import json
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.data.records import is_encodable

_END_OF_THOUGHT = "</think>"  # whose beginning some servers leave out
_MOST_BRACES = 1000  # of a text that are tried as the beginning of an object


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back of one paid call.

    Attributes:
        text: of the message.
        finish_reason: as the endpoint says it, e.g. "stop" or "length".
        prompt_tokens, completion_tokens: as the endpoint counts them, 0 where it does not.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


def read_result(reply: Reply, form: type[BaseModel]) -> BaseModel:
    """Read a result: the last JSON object of the form in the text, whatever stands around it, fences for one.

    Raises:
        Refusal: if the reply was cut off, holds no JSON object, or none of the form.
    """
    if reply.finish_reason == "length":
        raise Refusal("form", f"the reply was cut off after {reply.completion_tokens} tokens; be brief")
    refusal = Refusal("form", "the reply holds no JSON object")
    for value in reversed(_objects(reply.text.rpartition(_END_OF_THOUGHT)[2])):
        if not is_encodable(json.dumps(value, ensure_ascii=False)):
            refusal = Refusal("form", "half a character (a lone surrogate) in the reply")
            continue
        try:
            return form.model_validate(value)
        except ValidationError as err:
            first = err.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the object"
            refusal = Refusal("form", f"{place}: {first['msg']}")
    raise refusal


def _objects(text: str) -> list[dict]:
    """Give the JSON objects in a text, without those in others."""
    decoder, found, begin = json.JSONDecoder(strict=False), [], 0
    for _ in range(_MOST_BRACES):
        begin = text.find("{", begin)
        if begin < 0:
            break
        try:
            value, begin = decoder.raw_decode(text, begin)
            found.append(value)
        except (ValueError, RecursionError):
            begin += 1
    return found


@functools.cache
def schema_of(form: type[BaseModel]) -> dict:
    """Give the JSON schema of a result in the strict form that endpoints take: no further fields, all required."""
    schema = form.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["additionalProperties"] = False
        part["required"] = list(part.get("properties", {}))
    return schema
