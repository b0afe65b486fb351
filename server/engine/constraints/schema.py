"""Handles JSON schema keywords that llguidance accepts but does not enforce: rewrites or refuses them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

#: Keywords that llguidance enforces or refuses itself, and annotations, which have no effect.
_KNOWN = frozenset(
    [
        "$anchor",
        "$comment",
        "$defs",
        "$dynamicAnchor",
        "$dynamicRef",
        "$id",
        "$ref",
        "$schema",
        "$vocabulary",
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "contains",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "default",
        "definitions",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "deprecated",
        "description",
        "discriminator",
        "else",
        "enum",
        "example",
        "examples",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "id",
        "if",
        "items",
        "maxContains",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minContains",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "not",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "propertyNames",
        "readOnly",
        "required",
        "then",
        "title",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
        "writeOnly",
        "x-guidance",
    ]
)
_FORMATS = frozenset(
    ["date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri", "uuid"]
)
_COUNTS = frozenset(f"{end}{of}" for end in ("min", "max") for of in ("Items", "Length", "Properties", "Contains"))
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_TYPES = frozenset(["array", "boolean", "integer", "null", "number", "object", "string"])
#: Options of llguidance under which keywords would be ignored, or kept in part.
_LOOSE = ("lenient", "coerce_one_of")

#: What a schema in a grammar stands behind, and where else its mark may stand: strings, comments, expressions.
_LARK = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json\s*)')

#: Characters of a wrong value that a message quotes.
_QUOTED = 60

#: Whole numbers up to this are exact in float64, which llguidance uses.
_EXACT = 2**53


class SchemaError(ValueError):
    """The schema asks for something that would not be enforced. The message names it."""


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _all(value: Any, kind: type[Any], of: Callable[[Any], bool]) -> bool:
    return isinstance(value, kind) and all(of(one) for one in (value.values() if isinstance(value, dict) else value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and value in _TYPES


#: What the standard has a keyword's value be (JSON Schema 2020-12, and `items` and `dependencies` as in draft 7).
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_COUNTS, (lambda v: _is_number(v) and v >= 0 and v % 1 == 0, "a whole number, 0 or more")),
    **dict.fromkeys(_BOUNDS, (_is_number, "a number")),
    "multipleOf": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    **dict.fromkeys(("pattern", "format", "$ref", "$dynamicRef", "$id", "$schema", "$anchor"), (_is_text, "a string")),
    "required": (lambda v: _all(v, list, _is_text), "a list of strings"),
    "enum": (lambda v: isinstance(v, list) and v != [], "a list that is not empty"),
    "type": (
        lambda v: _is_type(v) or (v != [] and _all(v, list, _is_type)), f"one or some of {', '.join(sorted(_TYPES))}"
    ),
    **dict.fromkeys(
        ("anyOf", "oneOf", "allOf", "prefixItems"),
        (lambda v: v != [] and _all(v, list, _is_schema), "a list of schemas that is not empty"),
    ),
    "items": (lambda v: _is_schema(v) or _all(v, list, _is_schema), "a schema"),
    **dict.fromkeys(
        ("additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
         "unevaluatedItems", "unevaluatedProperties"),
        (_is_schema, "a schema"),
    ),
    **dict.fromkeys(_MAPS, (lambda v: _all(v, dict, _is_schema), "an object of schemas")),
    "x-guidance": (lambda v: isinstance(v, dict), "an object"),
}  # fmt: skip


def checked(schema: Any, accepts: Callable[[dict[str, Any], str], bool]) -> Any:
    """An equivalent schema that llguidance enforces. `accepts(schema, text)` compiles a schema and tries a text on it.

    Raises SchemaError for a keyword or value that would not be enforced.
    """
    schema = _kept(schema, "#")
    # With allOf, or with keywords next to a reference, bounds from different objects can apply to one number.
    parts = list(_objects(schema))
    together = any("allOf" in part or ("$ref" in part and len(part) > 1) for part in parts)
    groups = [parts] if together else [[part] for part in parts]
    for group in groups:
        for exclusive, opposite in (("exclusiveMinimum", "aximum"), ("exclusiveMaximum", "inimum")):
            ends = {part[exclusive] for part in group if _is_number(part.get(exclusive))}
            others = {(key, part[key]) for part in group for key in part if opposite in key and _is_number(part[key])}
            for end in ends:
                for key, other in others:
                    pair = {"type": "number", exclusive: end, key: other}
                    if any(
                        accepts(pair, text) for text in (f"{end:g}", f"{end:.1f}", f"-{end:g}" if end == 0 else "x")
                    ):
                        raise SchemaError(f"{exclusive} {end} beside {key} {other} cannot be kept; use type integer or "
                                          "an inclusive bound")  # fmt: skip
    return schema


def checked_within(grammar: str, accepts: Callable[[dict[str, Any], str], bool]) -> str:
    """The same grammar in Lark's notation, with each schema in it (`%json {...}`) as `checked` has it.

    Raises SchemaError. What is no JSON is left for llguidance to refuse.
    """
    parts, at = list[str](), 0
    while found := _LARK.search(grammar, at):
        parts.append(grammar[at : found.end()])
        at = found.end()
        if found["json"]:
            with suppress(json.JSONDecodeError):
                schema, at = json.JSONDecoder().raw_decode(grammar, at)
                parts.append(json.dumps(checked(schema, accepts), ensure_ascii=False))
    return "".join((*parts, grammar[at:]))


def _kept(schema: Any, path: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        where = f"{path}/{key}"
        if key not in _KNOWN and not key.startswith("x-"):
            raise SchemaError(f"{where}: unknown keyword {key!r}")
        if key in _VALUES and not _VALUES[key][0](value):
            raise SchemaError(f"{where} must be {_VALUES[key][1]}, not {json.dumps(value)[:_QUOTED]}")
        if key in _MAPS and isinstance(value, dict):
            value = {name: _kept(part, f"{where}/{name}") for name, part in value.items()}
        elif key in ("const", "enum", *_BOUNDS):
            _check_numbers(value, where)
        elif key in _COUNTS and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif key == "uniqueItems":
            if value is not False:
                raise SchemaError(f"{where}: that items differ cannot be kept; ask for a list and make it a set")
            continue
        elif key == "x-guidance" and (loose := [option for option in _LOOSE if value.get(option)]):
            raise SchemaError(f"{where}/{loose[0]}: what a schema asks for is kept or refused; it cannot be ignored")
        elif key == "format" and value not in _FORMATS:
            # The standard allows unknown formats to be ignored.
            continue
        elif isinstance(value, list):
            value = [_kept(part, f"{where}/{at}") for at, part in enumerate(value)]
        elif key not in ("default", "example", "examples", "discriminator", "x-guidance"):
            value = _kept(value, where)
        kept[key] = value
    _check_count(kept, path)
    return kept


def _check_count(schema: dict[str, Any], path: str) -> None:
    """A name that is free may come again, and counts once where the text is read."""
    least, required = schema.get("minProperties", 0), schema.get("required")
    free = schema.get("additionalProperties") is not False or schema.get("patternProperties")
    known = len(set(map(str, required))) if isinstance(required, list) else 0
    if _is_number(least) and least > known + 1 and free:
        raise SchemaError(f"{path}/minProperties: that names differ cannot be kept; name them in properties, with "
                          "additionalProperties false, or in required")  # fmt: skip


def _check_numbers(value: Any, path: str) -> None:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part, path)
    # The whole number next to an exclusive bound must be exact, too.
    elif _is_number(value) and abs(value) > _EXACT - path.rpartition("/")[2].startswith("exclusive"):
        raise SchemaError(f"{path}: numbers beyond 2^53 cannot be kept")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a schema, whether they are schemas themselves or not."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)
