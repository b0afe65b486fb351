"""Schemas: what would be satisfied wrongly is refused by name, and what asks for nothing is no fault."""

from __future__ import annotations

from typing import Any

import pytest

from fastblt.models.vocabulary import encode
from fastblt.server.engine.constraints.grammar import compile_grammar
from fastblt.server.request import InvalidRequestError, StructuredOutput


def accepts(schema: Any, text: str) -> bool:
    matcher = compile_grammar(StructuredOutput.json(schema))
    return matcher.consume_tokens(encode(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"enum": [9007199254740993]}, "2\\^53"),
        ({"properties": {"a": {"const": {"b": [-(2**60)]}}}}, "#/properties/a/const"),
        ({"type": "integer", "maximum": 2**53 + 1}, "#/maximum"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "#/exclusiveMinimum"),
        ({"allOf": [{"type": "integer", "exclusiveMaximum": -(2**53)}]}, "#/allOf/0/exclusiveMaximum"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum"),
        ({"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 0.5}, "exclusiveMinimum"),
        ({"allOf": [{"type": "number", "exclusiveMinimum": 0}, {"maximum": 0.5}]}, "exclusiveMinimum"),
        ({"type": "string", "maxlength": 1}, "unknown keyword 'maxlength'"),
        ({"items": {"type": "string", "nullable": True}}, "#/items/nullable"),
        ({"anyOf": [{"type": "null"}, {"minLenght": 1}]}, "#/anyOf/1/minLenght"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "#/uniqueItems: .*differ"),
        ({"type": "object", "minProperties": 2}, "#/minProperties: .*differ"),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False, "minProperties": 2}, "#/minProperties"),
        ({"$ref": "#"}, "no text satisfies it"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        compile_grammar(StructuredOutput.json(schema))


def test_what_asks_for_nothing_is_no_fault() -> None:
    for word in ("binary", "path", "password", "of-my-own"):
        assert accepts({"type": "string", "format": word}, '"x"')
    assert not accepts({"type": "string", "format": "date"}, '"x"')
    assert accepts({"type": "array", "items": {"type": "null"}, "uniqueItems": False}, "[null,null]")
    assert accepts({"type": "object", "minProperties": 2, "required": ["a"]}, '{"a":1,"b":2}')
    # Names of properties and values are no keywords.
    assert accepts(
        {"type": "object", "properties": {"nullable": {"const": {"maxlength": 1}}}}, '{"nullable":{"maxlength":1}}'
    )
    assert accepts({"type": "string", "minLength": 1.0, "default": {"any": 1}, "x-order": 1}, '"x"')
    assert accepts({"type": "number", "exclusiveMinimum": 0}, "0.5")
    assert accepts({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.5")
    assert accepts({"enum": [2**53]}, str(2**53))
