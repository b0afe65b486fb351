"""Any schema: what is produced under it satisfies it, by another library's reading, or the schema is refused."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from fastblt.models.vocabulary import EOS_ID, decode, encode
from fastblt.server.engine.constraints.grammar import GrammarError, GrammarState, compile_grammar
from fastblt.server.request import InvalidRequestError, StructuredOutput

#: Bytes of a completion, at most.
_ROOM = 150
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
#: What ends strings, arrays and objects; a random walk would seldom come to it.
_ENDS = frozenset(encode(b'"]}'))

_NAMES = st.sampled_from(["a", "b", "é", 'q"'])
_NUMBERS = (
    st.integers(-20, 20)
    | st.sampled_from([0.5, -0.25, 1.5, 10.75, 1e-3, 0.0])
    | st.integers(-(2**54), 2**54)
    | st.sampled_from([2**53, 2**53 + 1, -(2**53), 10**30, 1e300])
)
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text('ab"\\é\n🎉', max_size=3)
_VALUES = st.recursive(
    _SCALARS, lambda values: st.lists(values, max_size=2) | st.dictionaries(_NAMES, values, max_size=2), max_leaves=4
)
_COUNTS = st.integers(0, 3)


def _keywords(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keywords."""
    return st.fixed_dictionaries({}, optional=optional)


def _of(kind: str, **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return _keywords(**optional).map(lambda schema: {"type": kind, **schema})


_BOUNDS = dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBERS)
_LEAVES = st.one_of(
    _of("integer", **_BOUNDS, multipleOf=st.integers(1, 7)),
    _of("number", **_BOUNDS),
    _of("string", minLength=_COUNTS, maxLength=_COUNTS),
    _of("string", pattern=st.sampled_from(["^[ab]{2}$", "^é+$", "b", "^(a|b)"]), maxLength=_COUNTS),
    # A date is kept in its form: the other library knows in which years there is a 29 February.
    _of("string", format=st.sampled_from(["ipv4", "ipv6", "uuid", "password"])),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "integer"]}, True, {}]),
    st.builds(lambda value: {"const": value}, _VALUES),
    st.builds(lambda values: {"enum": values}, st.lists(_VALUES, min_size=1, max_size=3)),
    st.builds(
        lambda value, bounds: {"enum": [value, 3, "ab"], **bounds}, _VALUES, _keywords(**_BOUNDS, maxLength=_COUNTS)
    ),
    st.builds(lambda name: {"$ref": f"#/$defs/{name}"}, st.sampled_from("pq")),
)


def _combined(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    some = st.lists(parts, min_size=1, max_size=2)
    return st.one_of(
        _of(
            "array",
            items=parts,
            prefixItems=some,
            minItems=_COUNTS,
            maxItems=_COUNTS,
            uniqueItems=st.booleans(),
        ),
        _of(
            "object",
            properties=st.dictionaries(_NAMES, parts, max_size=3),
            required=st.lists(_NAMES, max_size=2, unique=True),
            additionalProperties=st.just(False) | parts,
            patternProperties=st.dictionaries(st.sampled_from(["^a", "b$"]), parts, max_size=1),
            minProperties=_COUNTS,
            maxProperties=_COUNTS,
        ),
        st.builds(lambda key, of: {key: of}, st.sampled_from(["anyOf", "oneOf", "allOf"]), some),
        st.builds(lambda part, bounds: {"allOf": [part, bounds]}, parts, _keywords(**_BOUNDS, maxLength=_COUNTS)),
    )


_PARTS = st.recursive(_LEAVES, _combined, max_leaves=5)
_SCHEMAS = st.builds(
    lambda part, p, q: {"allOf": [part], "$defs": {"p": p, "q": q}}, _PARTS, _LEAVES, _PARTS
) | st.builds(
    lambda part, p, q: {**part, "$defs": {"p": p, "q": q}},
    _PARTS.filter(lambda part: part is not True),
    _LEAVES,
    _PARTS,
)


def _produced(matcher: LLMatcher, rng: random.Random) -> str | None:
    """A text that ends where the grammar lets it; None if it does not, or takes too long."""
    state, ids = GrammarState(lambda _: matcher), list[int]()
    while len(ids) < _ROOM:
        choices = np.flatnonzero(state.allowed).tolist()
        if EOS_ID in choices and (choices == [EOS_ID] or rng.random() < 0.5):
            return decode(ids).decode()
        ends = [token for token in choices if token in _ENDS]
        token = rng.choice(ends if ends and rng.random() < 0.5 else [token for token in choices if token != EOS_ID])
        try:
            state.commit(token)
        except GrammarError:
            # No text satisfies what it has come to: the completion ends with an error.
            return None
        ids.append(token)
    return None


def _passes(matcher: LLMatcher, text: str) -> bool:
    matcher = matcher.deep_copy()
    return matcher.consume_tokens(encode(text.encode())) and matcher.is_accepting()


def _near(schema: str) -> list[str]:
    """The numbers of a schema, its bounds among them, as they can be written, and whole ones beside them."""
    numbers = {
        number for written in _NUMBER.findall(schema) for number in (written, written.lstrip("-"), f"-{written}")
    }
    whole = [int(number) for number in numbers if number.lstrip("-").isdigit() and not number.startswith("--")]
    beside = {f"{number + step}{end}" for number in whole for step in (-1, 0, 1) for end in ("", ".0")}
    return sorted(numbers | beside)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(_SCHEMAS, st.lists(_VALUES, min_size=3, max_size=3), st.integers(0, 2**32))
def test_what_a_schema_lets_pass_satisfies_it(schema: dict[str, Any], values: list[Any], seed: int) -> None:
    structured = StructuredOutput.json(schema)
    try:
        matcher = compile_grammar(structured)
    except InvalidRequestError:
        return
    rng = random.Random(seed)
    texts = [text for text in (_produced(matcher, rng) for _ in range(3)) if text is not None]
    tried = [json.dumps(value, ensure_ascii=False) for value in values] + _near(structured.text)
    texts += [text for text in tried if _passes(matcher, text)]
    # Read exactly: doubles would hide what they cannot tell apart.
    exact = json.loads(structured.text, parse_float=Decimal)
    validator = jsonschema.Draft202012Validator(exact, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for text in texts:
        try:
            validator.validate(json.loads(text, parse_float=Decimal))
        except RecursionError:
            # It refers to itself without going any deeper, as in {"anyOf": [{"$ref": "#/$defs/q"}, ...]} for q.
            return
