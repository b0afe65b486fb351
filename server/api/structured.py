"""Reads OpenAI's `response_format` and vLLM's `structured_outputs`: the grammar that a completion must follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastblt.server.request import GrammarKind, InvalidRequestError, StructuredOutput

#: Keys of an object in these fields. Every valid object has fewer. This bounds the error message of an invalid one.
_MAX_KEYS = 32

#: Options that are on or off; off is as if they were not there. Any other false value is a client's mistake.
_SWITCHES = frozenset(["json_object", "disable_any_whitespace"])

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def structured_output(response_format: Any, structured_outputs: Any) -> StructuredOutput | None:
    """The grammar that the two fields ask for; None for free text.

    Raises InvalidRequestError for invalid values, or if both fields ask for a grammar.
    """
    by_format = None if response_format is None else _response_format(response_format)
    by_outputs = None if structured_outputs is None else _structured_outputs(structured_outputs)
    if by_format is not None and by_outputs is not None:
        raise InvalidRequestError(
            "response_format and structured_outputs both ask for a grammar; send one", "structured_outputs"
        )
    return by_format or by_outputs


def _response_format(value: Any) -> StructuredOutput | None:
    field = "response_format"
    match _object(value, field).get("type"):
        case "text":
            return None
        case "json_object":
            return _json(_ANY_OBJECT, {}, field)
        case "json_schema":
            wrapper = _object(value.get("json_schema"), f"{field}.json_schema")
            return _json(wrapper.get("schema"), {}, f"{field}.json_schema.schema")
        case _:
            raise InvalidRequestError("response_format.type must be text, json_object or json_schema", field)


def _structured_outputs(value: Any) -> StructuredOutput | None:
    field = "structured_outputs"
    options = {key: option for key, option in _object(value, field).items() if option is not None}
    for key in _SWITCHES & options.keys():
        if not isinstance(options[key], bool):
            raise InvalidRequestError(f"{field}.{key} must be true or false", field)
        if not options[key]:
            del options[key]
    whitespace = {
        "x-guidance": {
            **({"whitespace_flexible": False} if options.pop("disable_any_whitespace", None) else {}),
            **({"whitespace_pattern": w} if (w := options.pop("whitespace_pattern", None)) is not None else {}),
        }
    }
    readers: dict[str, Callable[[Any], StructuredOutput]] = {
        "json": lambda schema: _json(schema, whitespace, f"{field}.json"),
        "json_object": lambda _: _json(_ANY_OBJECT, whitespace, field),
        "regex": lambda text: StructuredOutput.regex(_text(text, f"{field}.regex")),
        "choice": lambda texts: StructuredOutput.choice(_texts(texts, f"{field}.choice")),
        "grammar": lambda text: StructuredOutput.grammar(_text(text, f"{field}.grammar")),
    }
    if not options:
        return None
    if len(options) > 1 or not options.keys() <= readers.keys():
        raise InvalidRequestError(
            f"structured_outputs takes one of {', '.join(readers)}, and disable_any_whitespace or whitespace_pattern",
            field,
        )
    [(key, option)] = options.items()
    return readers[key](option)


def _json(schema: Any, options: dict[str, Any], field: str) -> StructuredOutput:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{field} is not valid JSON", field) from None
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{field} must be a JSON schema: an object, or one as a string", field)
    try:
        text = json.dumps({**schema, **options} if options.get("x-guidance") else schema, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequestError(f"{field} is nested too deeply", field) from None
    return StructuredOutput(GrammarKind.JSON_SCHEMA, text)


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MAX_KEYS:
        raise InvalidRequestError(f"{field} must be an object of at most {_MAX_KEYS} keys", field)
    return value


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{field} must be a string", field)
    return value


def _texts(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequestError(f"{field} must be a list of strings, not an empty one", field)
    return value
