"""Grammars: what is refused, what is kept, and that drafts leave no trace."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, VOCAB_SIZE, decode, encode
from fastblt.server.engine.constraints import grammar
from fastblt.server.engine.constraints.grammar import GrammarError, Grammars, GrammarState
from fastblt.server.request import MAX_GRAMMAR_BYTES, GrammarKind, InvalidRequestError, StructuredOutput
from tests.server.engine.schemas import random_schema

PERSON = StructuredOutput.json(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
few = settings(max_examples=40, deadline=None)


def state_of(structured: StructuredOutput, text: str = "") -> GrammarState:
    state = Grammars().start(structured)
    for token in encode(text.encode()):
        assert state.allowed[token]
        state.commit(token)
    return state


def bytes_allowed(state: GrammarState) -> bytes:
    return decode(np.flatnonzero(state.allowed).tolist())


@few
@given(st.integers(0, 2**32))
def test_random_walks_through_random_schemas_are_valid_json(seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    state = Grammars().start(StructuredOutput.json(schema))
    ids: list[int] = []
    while len(ids) < 3000 and state.allowed[BYTE_OFFSET:].any():
        choices = np.flatnonzero(state.allowed).tolist()
        # Whitespace is optional nearly everywhere, and would be most of what a walk does.
        token = rng.choice([c for c in choices if c not in encode(b" \n\r\t")] or choices)
        if token == EOS_ID:
            break
        state.commit(token)
        ids.append(token)
    else:
        assert len(ids) < 3000, "the walk does not end"
    assert state.allowed[EOS_ID]
    jsonschema.validate(json.loads(decode(ids)), schema)


@few
@given(st.integers(0, 2**32))
def test_a_state_is_a_function_of_what_was_committed(seed: int) -> None:
    """Drafts, allowed or not, looked at in any order, leave nothing behind; their masks are those that come."""
    rng = random.Random(seed)
    grammars, structured = Grammars(), StructuredOutput.json(random_schema(rng))
    start, plain = grammars.start(structured), grammars.start(structured)
    fixed: list[int] = []
    while len(fixed) < 60 and plain.allowed[BYTE_OFFSET:].any():
        draft: list[int] = []
        for _ in range(rng.randint(0, 8)):
            choices = np.flatnonzero(start.along(draft)[-1]).tolist()
            wild = rng.random() < 0.1
            draft.append(rng.randrange(VOCAB_SIZE) if wild or not choices else rng.choice(choices))
            if rng.random() < 0.2:
                draft = draft[: rng.randrange(len(draft))]
        masks = start.along(draft)
        token = rng.choice([c for c in np.flatnonzero(plain.allowed).tolist() if c != EOS_ID])
        follow = draft if draft and rng.random() < 0.8 else [token]
        for at, token in enumerate(follow):
            if at < len(masks):
                assert (masks[at] == plain.allowed).all()
            if token == EOS_ID or not plain.allowed[token]:
                break
            start.commit(token)
            plain.commit(token)
            fixed.append(token)
        again = Grammars().start(structured)
        for token in fixed:
            again.commit(token)
        assert (again.allowed == start.allowed).all() and (again.allowed == plain.allowed).all()


def test_end_of_text_is_allowed_exactly_where_the_grammar_accepts() -> None:
    digits = StructuredOutput.regex("[0-9]{2,3}")
    assert [bool(state_of(digits, text).allowed[EOS_ID]) for text in ("", "1", "12", "123")] == [False] * 2 + [True] * 2
    assert bytes_allowed(state_of(digits, "12")) == b"0123456789"
    assert bytes_allowed(state_of(digits, "123")) == b""
    whole = state_of(PERSON, '{"name": "x", "age": 1')
    assert not whole.allowed[EOS_ID]
    whole.commit(ord("}") + BYTE_OFFSET)
    assert np.flatnonzero(whole.allowed).tolist() == [EOS_ID]


def test_bytes_of_a_character_are_masked_one_by_one() -> None:
    state = state_of(StructuredOutput.choice(["é", "ê", "日"]))
    assert bytes_allowed(state) == b"\xc3\xe6"
    state.commit(0xC3 + BYTE_OFFSET)
    assert bytes_allowed(state) == b"\xa9\xaa"


def test_a_run_of_whitespace_is_bounded() -> None:
    state = state_of(StructuredOutput.json({"type": "object"}), "{" + " " * 20)
    assert b" " not in bytes_allowed(state)


@pytest.mark.parametrize(
    ("structured", "reason"),
    [
        (StructuredOutput.regex("(a"), "unclosed group"),
        (StructuredOutput.regex("(?=a)b"), "look-around"),
        (StructuredOutput.regex("(?-u:\\xff)"), "pattern can match invalid"),
        (StructuredOutput.regex(""), "no byte can begin"),
        (StructuredOutput.choice([]), "no byte can begin"),
        (StructuredOutput.json({"type": "strin"}), "#/type must be one or some of array"),
        (StructuredOutput.json({"type": "integer", "minimum": 5, "maximum": 4}), "Unsatisfiable"),
        (StructuredOutput.json({"not": {"type": "string"}}), "not"),
        (StructuredOutput.json({"$ref": "#"}), "cannot be used"),
        (StructuredOutput.json({"$ref": "http://example.com/x.json"}), "example.com"),
        (StructuredOutput("json_schema", "[1"), "delimiter"),  # type: ignore[arg-type]
        (StructuredOutput.grammar("start: nowhere"), "unknown name"),
        (StructuredOutput.grammar("root ::= [0-9"), "GBNF"),
        (StructuredOutput.grammar("start: <[1]>"), "no byte can begin"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(structured: StructuredOutput, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as error:
        Grammars().start(structured)
    assert error.value.param == "structured_outputs"
    assert len(str(error.value)) < 1000


def test_grammars_are_bounded() -> None:
    StructuredOutput.regex("a" * MAX_GRAMMAR_BYTES)
    with pytest.raises(InvalidRequestError, match="at most"):
        StructuredOutput.regex("é" * (MAX_GRAMMAR_BYTES // 2 + 1))
    with pytest.raises(InvalidRequestError, match="surrogate"):
        StructuredOutput.json({"const": "\ud800"})
    with pytest.raises(InvalidRequestError, match="one of"):
        StructuredOutput("xml", "<a/>")  # type: ignore[arg-type]


def test_the_most_recently_used_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = grammar.compile_grammar

    def counting(structured: StructuredOutput) -> Any:
        compiled.append(structured.text)
        return real(structured)

    monkeypatch.setattr(grammar, "compile_grammar", counting)
    grammars = Grammars(bound=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        grammars.start(StructuredOutput(GrammarKind.REGEX, text))
    assert compiled == ["a", "b", "c", "b"]


def test_a_grammar_too_complex_fails_where_it_gets_there_and_not_before() -> None:
    """Looking ahead into what is too complex, and others who went there, do no harm to who does not."""
    bomb = StructuredOutput.regex("b+|(a{1,1000}){1,1000}")
    grammars = Grammars()
    state, neighbor = grammars.start(bomb), grammars.start(bomb)
    ahead = encode(b"a" * 400)
    masks = state.along(ahead)
    assert 10 < len(masks) < len(ahead)
    with pytest.raises(GrammarError, match="too many expressions"):
        for token in ahead:
            neighbor.commit(token)
    for one in (state, grammars.start(bomb)):
        one.commit(ord("b") + BYTE_OFFSET)
        assert bytes_allowed(one) == b"b" and one.allowed[EOS_ID]
    # What was looked at in a draft is what comes.
    committed = 0
    fresh = Grammars().start(bomb)
    with pytest.raises(GrammarError):
        for token in ahead:
            assert (masks[committed] == fresh.allowed).all()
            fresh.commit(token)
            committed += 1
    assert committed == len(masks) - 1
