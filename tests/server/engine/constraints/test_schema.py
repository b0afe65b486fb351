"""Schemas: what would be satisfied wrongly is refused by name, and what asks for nothing is no fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.vocabulary import encode
from fastblt.server.engine.constraints import schema as schema_module
from fastblt.server.engine.constraints.grammar import GrammarError, GrammarState, compile_grammar
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
        ({"multipleOf": -3}, "#/multipleOf must be a number above 0"),
        ({"type": "string", "multipleOf": 0}, "#/multipleOf must be a number above 0"),
        ({"type": "null", "minLength": -1}, "#/minLength must be a whole number, 0 or more"),
        ({"$defs": {"a": {"maxItems": 1.5}}}, "#/\\$defs/a/maxItems must be a whole number"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength \\(5\\) is greater than maxLength"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum \\(5\\) is greater than maximum"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems \\(3\\) is greater than maxItems"),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "contains no integer"),
        ({"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 7}, "multiple of 7"),
        ({"type": "foo"}, "#/type must be one or some of array, boolean"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "#/x-guidance/lenient: .* kept or refused"),
        ({"x-guidance": {"lenient": True}}, "#/x-guidance/lenient"),
        ({"x-guidance": {"coerce_one_of": True}}, "#/x-guidance/coerce_one_of"),
        ({"x-guidance": 3}, "#/x-guidance must be an object"),
        ({"not": {}}, "Unimplemented keys: .*not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "Write anyOf"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        compile_grammar(StructuredOutput.json(schema))


_WRONG = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([-0.5, 1.5, 2.0, 10**400, "a", "string", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "type"]), inner, max_size=2),
    max_leaves=3,
)
_PLACES: list[Callable[[Any], Any]] = [
    lambda schema: schema,
    lambda schema: {"$defs": {"unused": schema}},
    lambda schema: {"type": "object", "properties": {"a": schema}},
    lambda schema: {"anyOf": [{"type": "null"}, schema]},
    lambda schema: {"type": "array", "items": schema},
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(schema_module._VALUES)), _WRONG, st.sampled_from(_PLACES))
def test_what_is_no_schema_by_the_standard_is_refused(keyword: str, value: Any, place: Callable[[Any], Any]) -> None:
    """Also where it could do no harm: under another type, or in a definition that nothing refers to."""
    schema = place({keyword: value})
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        wrong = False
    except jsonschema.SchemaError:
        # It was a list before 2020, and names that come twice in a list are one.
        twice = isinstance(value, list) and len(set(map(repr, value))) < len(value)
        wrong = not (isinstance(value, list) and (keyword == "items" or twice))
    try:
        compile_grammar(StructuredOutput.json(schema))
    except InvalidRequestError as error:
        assert str(error).startswith("the json_schema cannot be used: ")
        assert not wrong or keyword in str(error) or isinstance(value, dict | list), error
    else:
        assert not wrong


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"x-guidance": {"lenient": true}, "not": {}}', "#/x-guidance/lenient"),
        ('{"type": "integer", "multipleOf": -3}', "#/multipleOf must be"),
        ('\n {"properties": {"a": {"maxlength": 3}}}', "#/properties/a/maxlength: unknown keyword"),
        ('{"type": "array", "uniqueItems": true}', "#/uniqueItems"),
        ("{", "EOF while parsing"),
    ],
)
def test_a_schema_in_a_grammar_is_no_way_around(schema: str, reason: str) -> None:
    for before in ("", '"%json" ', r'"\"" /"%json\// '):
        with pytest.raises(InvalidRequestError, match=reason):
            compile_grammar(StructuredOutput.grammar(f"start: {before}%json {schema}"))


def test_a_schema_in_a_grammar_is_kept() -> None:
    whole = 'start: "%json {" %json {"type": "string", "format": "mine", "maxLength": 2.0} /[%]json/ // %json {"a"\n'
    matcher = compile_grammar(StructuredOutput.grammar(whole))
    assert matcher.consume_tokens(encode(b'%json {"ab"%json')) and matcher.is_accepting()
    matcher = compile_grammar(StructuredOutput.grammar(whole))
    assert not matcher.consume_tokens(encode(b'%json {"abc"'))


@pytest.mark.parametrize("closed", [False, True])
def test_too_many_optional_properties_are_told_so(closed: bool) -> None:
    def produced(count: int) -> str | None:
        schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}
        matcher = compile_grammar(StructuredOutput.json(schema | ({"additionalProperties": False} if closed else {})))
        state = GrammarState(lambda _: matcher)
        try:
            for token in encode(b'{"p1":1}'):
                state.commit(token)
        except GrammarError as error:
            return str(error)
        return None

    assert produced(450) is None
    assert "too many ways" in (said := produced(800) or "") and "fewer optional properties in one object" in said


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
