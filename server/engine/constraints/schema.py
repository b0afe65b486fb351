"""Handles JSON schema keywords that llguidance accepts but does not enforce: rewrites or refuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_COUNTS = frozenset(["maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"])
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

#: Whole numbers up to this are exact in float64, which llguidance uses.
_EXACT = 2**53


class SchemaError(ValueError):
    """The schema asks for something that would not be enforced. The message names it."""


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


def _kept(schema: Any, path: str) -> Any:
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        where = f"{path}/{key}"
        if key not in _KNOWN and not key.startswith("x-"):
            raise SchemaError(f"{where}: unknown keyword {key!r}")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a schema, whether they are schemas themselves or not."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)
