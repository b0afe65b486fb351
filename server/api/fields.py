"""Types of request fields, with their JSON schemas. Lists and objects are checked here and not by pydantic.

So a large list of wrong values gives one error message and not one for each element.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, SkipValidation, WithJsonSchema

from fastblt.models.vocabulary import EOS_ID, VOCAB_SIZE
from fastblt.server.api.body import MAX_CHOICES, without_nulls
from fastblt.server.request import MAX_STOP_BYTES, MAX_STOP_STRINGS

#: Keys of an object in a field. Every valid object has fewer. This bounds the error message of an invalid one.
MAX_KEYS = 32
MAX_BIAS = 100

_ID_SET = frozenset(range(VOCAB_SIZE))
_ANY_ID = {"type": "integer", "minimum": 0, "maximum": VOCAB_SIZE - 1}
_IDS = {"type": "array", "minItems": 1, "items": {**_ANY_ID, "not": {"const": EOS_ID}}}
_TEXT = {"type": "string", "minLength": 1}


def bounded_object(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise ValueError(f"is an object of {len(value)} keys, which is too large")
    return without_nulls(value) if isinstance(value, dict) else value


def _string_or_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings[: MAX_STOP_STRINGS + 1]):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed")
    return strings


def _few_ids(value: Any) -> Any:
    if not isinstance(value, list) or len(value) > VOCAB_SIZE or not all(type(i) is int for i in value):
        raise ValueError(f"must be a list of at most {VOCAB_SIZE} byte ids")
    return value


def _ids(value: Any) -> Any:
    if not isinstance(value, list) or not set(map(type, value)) <= {int} or not set(value) <= _ID_SET:
        raise ValueError(f"must be a list of byte ids, at least 0 and below {VOCAB_SIZE}")
    return value


def _biases(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > VOCAB_SIZE:
        raise ValueError(f"must be an object of at most {VOCAB_SIZE} byte ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 3):
            raise ValueError("its keys must be byte ids, written as strings")
        if type(bias) not in (int, float) or not abs(bias) <= MAX_BIAS:
            raise ValueError(f"its values must be numbers from -{MAX_BIAS} to {MAX_BIAS}")
        biases[int(key)] = float(bias)
    return biases


# Wide enough for every field, and small enough that a comparison with a float cannot overflow.
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

#: Checked and turned into ids by `CompletionRequest.take_prompts`.
PromptField = Annotated[
    Any,
    WithJsonSchema(
        {
            "description": "A string, a list of strings, a list of byte ids, or a list of such lists. Byte b is b + 4, "
            "BOS is 1 and put in front of every prompt; [1] asks for an unconditional sample.",
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _TEXT},
                _IDS,
                {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": _IDS},
            ],
        }
    ),
]

Stop = Annotated[
    list[str],
    BeforeValidator(_string_or_strings),
    WithJsonSchema(
        {
            "anyOf": [
                {**_TEXT, "maxLength": MAX_STOP_BYTES // 4},
                {"type": "array", "maxItems": MAX_STOP_STRINGS, "items": {**_TEXT, "maxLength": MAX_STOP_BYTES // 4}},
            ]
        }
    ),
]

StopIds = Annotated[
    list[Int64],
    BeforeValidator(_few_ids),
    WithJsonSchema({"type": "array", "maxItems": VOCAB_SIZE, "items": _ANY_ID}),
]

#: Ids 0..259.
Ids = Annotated[SkipValidation[list[int]], BeforeValidator(_ids), WithJsonSchema({"type": "array", "items": _ANY_ID})]

Bias = Annotated[
    dict[int, float],
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^(1?[0-9]{1,2}|2[0-5][0-9])$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        }
    ),
]


def request_body(schema: type[BaseModel]) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a route that reads `schema`. Fields that are not required may be null."""
    document = schema.model_json_schema()
    definitions = document.pop("$defs", {})
    content = {"application/json": {"schema": _resolved(document, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _resolved(node: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with references resolved, in which every optional property may be null."""
    if isinstance(node, list):
        return [_resolved(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = target | {key: value for key, value in node.items() if key != "$ref"}
    node = {key: _resolved(value, definitions) for key, value in node.items()}
    if isinstance(properties := node.get("properties"), dict):
        required = node.get("required", ())
        node["properties"] = {
            name: field if name in required else _or_null(field) for name, field in properties.items()
        }
    return node


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    options = field.get("anyOf", [])
    if field.keys() <= {"description", "title", "default"} or {"type": "null"} in options:
        return field
    about = {key: field[key] for key in ("description", "title", "default") if key in field}
    rest = {key: value for key, value in field.items() if key not in about}
    return about | {"anyOf": [rest, {"type": "null"}]}
