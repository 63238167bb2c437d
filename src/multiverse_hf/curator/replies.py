"""Replies of a model, and the typed results in them."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.data.records import is_encodable

_END_OF_THOUGHT = "</think>"  # some servers omit the opening tag
# JSON reads "\times" as a tab and "imes". No reply needs a tab or another control character. A newline may be meant,
# unless the rest of a command that begins with \n follows, or it is inside a formula.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_AFTER_N = re.compile(
    r"\n(?:abla|earrow|earr|eg|eq|equiv|ewline|exists|geq|leq|leftarrow|mid|ormalsize|otag|otin|parallel|prec|"
    r"rightarrow|sim|subset|subseteq|succ|supset|warrow)(?![a-z])|\n(?:e|i|ot|u)(?![a-z])"
)
_MOST_BRACES = 1000  # most braces of a text that are tried as the start of an object


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one paid call.

    Attributes:
        text: text of the message.
        finish_reason: the endpoint's reason, e.g. "stop" or "length".
        prompt_tokens, completion_tokens: the endpoint's counts, 0 if it does not count.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int


def read_result(reply: Reply, form: type[BaseModel]) -> BaseModel:
    """Return the last JSON object of the form in a reply. Other text around it, such as fences, is ignored.

    Raises:
        Refusal: if the reply was cut off, or contains no JSON object of the form.
    """
    if reply.finish_reason == "length":
        raise Refusal("form", f"the reply was cut off after {reply.completion_tokens} tokens; be brief")
    refusal = Refusal("form", "the reply holds no JSON object")
    for value in reversed(_objects(reply.text.rpartition(_END_OF_THOUGHT)[2])):
        if not is_encodable(json.dumps(value, ensure_ascii=False)):
            refusal = Refusal("form", "half a character (a lone surrogate) in the reply")
            continue
        if broken := next(filter(None, map(_broken_command, _strings(value))), None):
            refusal = Refusal(
                "form", f"{broken!r} is a LaTeX command with one backslash; in JSON a backslash is written twice"
            )
            continue
        try:
            return form.model_validate(value)
        except ValidationError as err:
            first = err.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the object"
            refusal = Refusal("form", f"{place}: {first['msg']}")
    raise refusal


def _strings(value: Any) -> Iterator[str]:
    """Yield all text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _broken_command(text: str) -> str | None:
    """Return a place where JSON read the start of a LaTeX command as a control character; None if there is none."""
    if match := _CONTROL.search(text.replace("\r\n", "\n")):
        return text.replace("\r\n", "\n")[max(match.start() - 10, 0) : match.end() + 10]
    for match in _AFTER_N.finditer(text):
        is_long = len(match[0]) > 4
        if is_long or text.count("$", 0, match.start()) % 2:
            return text[max(match.start() - 10, 0) : match.end() + 10]
    return None


def _objects(text: str) -> list[dict]:
    """Return the JSON objects in a text, without nested ones."""
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
    """Return the JSON schema of a result in the strict form of endpoints: no further fields, all required."""
    schema = form.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part["additionalProperties"] = False
        part["required"] = list(part.get("properties", {}))
    return schema
