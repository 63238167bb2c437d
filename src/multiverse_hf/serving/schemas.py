"""JSON schemas that a grammar of xgrammar enforces, and a clear refusal of all others.

xgrammar ignores some keywords, and some that stand beside others, with a warning in its log or without one. An answer
could then break its schema. So each schema is read here first, and every keyword in it has to be one that xgrammar
0.2.8 enforces where it stands. Annotations such as ``title`` are left out. Three things are read in their own way:

- ``oneOf`` is read as ``anyOf``
- a pattern matches a whole string, and no quote or backslash in it
- properties come in the order of the schema, and others only where ``additionalProperties`` allows them
"""

import json
import math
import re
from collections.abc import Collection
from typing import Any

from multiverse_hf.errors import one_line

MAX_SCHEMA_CHARS = 100_000
MAX_SCHEMA_DEPTH = 32  # of nested values; xgrammar reads a schema by recursion
MAX_COUNT = 10_000  # most characters, items or properties that a keyword may count
MAX_PATTERN_CHARS = 2_000  # more than about 30,000 nested groups crash xgrammar
# Most repeats of repeats. (a{1,100}){1,100} takes milliseconds a token, and one level more takes tenths of a second.
MAX_REPEATS = 1_000
MAX_REPEAT = 128  # beyond it, xgrammar's classes take quotes and control characters that the pattern does not name
FIELD = "response_format.json_schema.schema"

_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "propertyNames",
               "minProperties", "maxProperties", "unevaluatedProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {*_BOUNDS, "multipleOf"},
    "number": _BOUNDS,
    "boolean": set(),
    "null": set(),
}  # fmt: skip
_PYTHON = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_ASSERTIONS = {"type", "const", "enum", "$ref", *_ALTERNATIVES}.union(*_OF_TYPE.values()) | {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "additionalItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_DEFINITIONS = ("$defs", "definitions")
# those of OpenAI's structured outputs; JSON Schema takes any other one for an annotation
_FORMATS = {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
# of a pattern: an escape, a class of characters, a count, or one character
_PIECE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{\d+,?\d*\}|.", re.DOTALL)
_ESCAPE = re.compile(r"\\[dDwWsS.\-/+*?()\[\]{}|^$]")


def read_schema(schema: Any) -> str:
    """Return a JSON schema as text for xgrammar, with no keyword that xgrammar would ignore.

    Raises:
        ValueError: if a keyword is not enforced where it stands, or the schema is too large or too deep.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{FIELD} must be an object, got {_show(schema)}")
    _check_depth(schema)
    try:
        text = json.dumps(_read(schema, FIELD), allow_nan=False)
    except (TypeError, ValueError) as err:
        raise ValueError(str(err) if str(err).startswith(FIELD) else f"{FIELD} is not JSON ({err})") from err
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"{FIELD} has {len(text)} characters; at most {MAX_SCHEMA_CHARS} are compiled")
    return text


def _show(value: Any) -> str:
    return one_line(json.dumps(value, default=repr), 60)


def _refuse(where: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{where} = {_show(value)}: {why}")


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [part for each in inner if isinstance(each, list) for part in each]
        if not level:
            return
    raise ValueError(f"{FIELD} is nested deeper than {MAX_SCHEMA_DEPTH} levels; use $defs and $ref")


def _read(schema: Any, where: str) -> Any:
    """Return a subschema with its assertions only."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise _refuse(where, schema, "a schema is an object or a boolean")
    given = {name: value for name, value in schema.items() if name in _ASSERTIONS}
    for name in ("uniqueItems", "unevaluatedProperties", "unevaluatedItems"):  # false asserts nothing that is missing
        if given.get(name) is False:
            del given[name]
    if "format" in given and (given["format"] not in _FORMATS or {"pattern", "minLength", "maxLength"} & given.keys()):
        del given["format"]
    allowed = _enforced(given, where)
    for name, value in given.items():
        if name not in allowed:
            beside = ", ".join(sorted(given.keys() & allowed))
            place = f"beside {beside}" if beside else "without a type"
            raise _refuse(f"{where}.{name}", value, f"it is not enforced {place}; remove it or state it otherwise")
    read = {name: _read_keyword(name, value, f"{where}.{name}") for name, value in given.items()}
    types = _types(given)
    if {"minLength", "maxLength"} & read.keys():  # xgrammar's own count takes control characters, which no JSON has
        read["pattern"] = rf'^[^"\\\x00-\x1f]{{{read.pop("minLength", 0)},{read.pop("maxLength", "")}}}$'
    if "array" in types and not {"items", "prefixItems"} & read.keys():
        read["items"] = True  # else xgrammar takes a count for one of no items
    if "object" in types:
        if not {"properties", "patternProperties", "propertyNames", "additionalProperties"} & read.keys():
            read["additionalProperties"] = True
        for name in read.get("required", ()):
            if name not in read.get("properties", {}):
                raise _refuse(f"{where}.required", name, "name it among the properties, too")
    for name in _DEFINITIONS:
        if name in schema:
            read[name] = _read_each(schema[name], f"{where}.{name}")
    return read


def _types(given: dict[str, Any]) -> list[Any]:
    types = given.get("type", [])
    return types if isinstance(types, list) else [types]


def _enforced(given: dict[str, Any], where: str) -> Collection[str]:
    """Return the keywords that are enforced together with those given."""
    for name in ("$ref", *_ALTERNATIVES):
        if name in given:
            return {name}
    for name in ("const", "enum"):
        if name in given:
            values = [given[name]] if name == "const" else given[name]
            if not isinstance(values, list):
                raise _refuse(f"{where}.{name}", values, "it must be a list")
            for value in values if "type" in given else ():
                if not any(_has_type(value, kind) for kind in _types(given)):
                    raise _refuse(f"{where}.{name}", value, f"it is not of type {_show(given['type'])}")
            return {name, "type"}
    if "type" not in given:  # these two take no other type with xgrammar
        for kind, names in (("object", ("properties", "required")), ("array", ("items", "prefixItems"))):
            if set(names) & given.keys():
                given["type"] = kind
                break
    allowed = {"type"}.union(*(_OF_TYPE.get(kind, ()) for kind in _types(given) if isinstance(kind, str)))
    if "properties" in given:
        allowed.discard("propertyNames")
    if "pattern" in given:
        allowed -= {"minLength", "maxLength"}
    if _BOUNDS & given.keys():
        allowed.discard("multipleOf")
    return allowed - {"uniqueItems", "unevaluatedProperties", "unevaluatedItems"}


def _has_type(value: Any, kind: Any) -> bool:
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or (math.isfinite(value) and value == int(value)))
    return isinstance(kind, str) and isinstance(value, _PYTHON.get(kind, ()))


def _read_keyword(name: str, value: Any, where: str) -> Any:
    """Check the value of a keyword, and return it with its subschemas read."""
    if name in ("properties", "patternProperties"):
        for pattern in value if name == "patternProperties" and isinstance(value, dict) else ():
            _check_pattern(pattern, where)
        return _read_each(value, where)
    if name == "propertyNames" and isinstance(value, dict) and not {"$ref", *_ALTERNATIVES} & value.keys():
        value = {"type": "string"} | value
    if name in ("additionalProperties", "propertyNames", "items"):
        return _read(value, where)
    if name in (*_ALTERNATIVES, "prefixItems"):
        if not isinstance(value, list) or not value:
            raise _refuse(where, value, "it must be a list with a schema in it")
        if name == "allOf" and len(value) > 1:
            raise _refuse(where, value, "only one schema in it is enforced; merge them into one")
        return [_read(each, f"{where}[{place}]") for place, each in enumerate(value)]
    if name == "pattern":
        _check_pattern(value, where)
    elif name == "$ref" and not (isinstance(value, str) and re.fullmatch(r"#(/[^~%]+)?", value)):
        raise _refuse(where, value, "a reference is # or begins with #/, and holds neither ~ nor %")
    elif name in _COUNTS and not (type(value) is int and 0 <= value <= MAX_COUNT):
        raise _refuse(where, value, f"it must be an integer from 0 to {MAX_COUNT}")
    elif name == "required" and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise _refuse(where, value, "it must be a list of names")
    elif name == "multipleOf" and not (type(value) is int and value > 0):
        raise _refuse(where, value, "only a positive integer is enforced")
    return value


def _read_each(schemas: Any, where: str) -> dict[str, Any]:
    if not isinstance(schemas, dict):
        raise _refuse(where, schemas, "it must be an object of schemas")
    return {name: _read(each, f"{where}.{name}") for name, each in schemas.items()}


def _check_pattern(pattern: Any, where: str) -> None:
    """Check that a pattern can be matched inside a JSON string, and has no part that xgrammar ignores."""
    if not isinstance(pattern, str):
        raise _refuse(where, pattern, "a pattern is a string")
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _refuse(where, pattern, f"it has {len(pattern)} characters; at most {MAX_PATTERN_CHARS} are compiled")
    pieces = _PIECE.findall(pattern)
    if (repeats := _num_repeats(pieces)) > MAX_REPEATS:
        raise _refuse(where, pattern, f"groups in groups repeat {repeats} times, at most {MAX_REPEATS} are allowed; "
                      "lower the counts, or count only once")  # fmt: skip
    for place, piece in enumerate(pieces):
        is_edge = (piece == "^" and place == 0) or (piece == "$" and place == len(pieces) - 1)
        is_group = piece == "(" and pieces[place + 1 : place + 2] == ["?"] and pieces[place + 2 : place + 3] != [":"]
        is_escape = any(not _ESCAPE.fullmatch(escape) for escape in re.findall(r"\\.", piece, re.DOTALL))
        # xgrammar leaves quotes and backslashes out of classes, but not out of ranges that end beyond ASCII
        is_range = any(first < "\x80" <= last for first, last in re.findall("(.)-(.)", piece))
        is_raw = piece == '"' or min(piece) < " "
        is_count = len(piece) > 2 and piece[0] == "{"
        if is_count and max(map(int, re.findall(r"\d+", piece))) > MAX_REPEAT:
            raise _refuse(where, pattern, f"{piece} is more than {MAX_REPEAT}; state lengths by maxLength")
        if (piece in ("^", "$") and not is_edge) or is_group or is_escape or is_range or is_raw:
            raise _refuse(where, pattern, f"{_show(piece)} at {place} is not enforced; anchors stand at the ends, and "
                          "quotes, lookarounds, flags, escapes of single characters and ranges from ASCII to other "
                          "characters are left out")  # fmt: skip


def _num_repeats(pieces: list[str]) -> int:
    """Return the greatest product of counts that stand around each other; one without a bound counts as 10."""
    most, inner, last = 1, [1], 1  # inner: of each open group the greatest so far; last: of what stands before
    for before, piece in zip(["", *pieces], pieces, strict=False):
        if piece == "(":
            inner.append(1)
            last = 1
        elif piece == ")" and len(inner) > 1:
            last = inner.pop()
        elif len(piece) > 2 and piece[0] == "{":
            count = max(int(number) for number in re.findall(r"\d+", piece))
            most = max(most, last * count if last > 1 else 1)  # a count alone is cheap
            last *= count
        elif piece in ("*", "+", "?") and before != "(":
            last = max(last, 10)
        else:
            last = 1
        inner[-1] = max(inner[-1], last)
    return most
