"""Replies of a model: what is kept of one, and how a typed result is read from it."""

import functools
import json
import re
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from multiverse_hf.curator.drafts import Refusal

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


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
    """Read a result: the whole text as JSON, or the last fenced block in it, or from the first brace to the last.

    Raises:
        Refusal: if the reply was cut off, holds no JSON, or JSON of another form.
    """
    if reply.finish_reason == "length":
        raise Refusal("form", f"the reply was cut off after {reply.completion_tokens} tokens; be brief")
    text = _THOUGHT.sub("", reply.text)
    fenced = _FENCE.findall(text)
    body = fenced[-1] if fenced else text[text.find("{") : text.rfind("}") + 1]
    if not body.strip():
        raise Refusal("form", "the reply holds no JSON object")
    try:
        return form.model_validate(json.loads(body, strict=False))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the object"
        raise Refusal("form", f"{place}: {first['msg']}") from err
    except (ValueError, RecursionError) as err:
        raise Refusal("form", f"the reply is no JSON: {err}") from err


@functools.cache
def schema_of(form: type[BaseModel]) -> dict:
    """Give the JSON schema of a result in the strict form that endpoints take: no further fields, all required."""
    schema = form.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["additionalProperties"] = False
        part["required"] = list(part.get("properties", {}))
    return schema
