"""What parameters may do to a request: towards temperature 0 they are greedy, and none blames the model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastblt.models.reference_selection import GREEDY_BELOW as REFERENCE_GREEDY_BELOW
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    GREEDY_BELOW,
    DecodingMethod,
    DecodingParams,
    ErrorCode,
    Request,
    SamplingParams,
    Utf8,
)
from tests.server.harness import Finished, model, random_request, run, settings

TINY = (1e-46, 1e-45, 1e-40, 1e-38, 1e-37, 1e-30, 1e-20, 1e-10, 1e-6, 9.9e-6)
METHODS = tuple(DecodingMethod)


def ask(seed: int, decoding: DecodingParams, **fields: object) -> Request:
    params = SamplingParams(max_tokens=30, seed=seed, decoding=decoding, **fields)  # type: ignore[arg-type]
    return random_request(random.Random(seed), "r", params)


def one(engine: Engine, request: Request) -> Finished:
    return run(engine, [request])[request.request_id]


@pytest.mark.parametrize("method", METHODS)
def test_tiny_temperatures_are_greedy(method: DecodingMethod) -> None:
    assert REFERENCE_GREEDY_BELOW == GREEDY_BELOW
    engine = Engine(model(1), settings(prefix_cache=False))
    for fields in ({}, {"logprobs": 2}, {"top_p": 0.5, "min_p": 0.2}, {"utf8": Utf8.STRICT, "presence_penalty": 1.0}):
        request = ask(3, DecodingParams(method), **fields)
        greedy = one(engine, replace(request, params=replace(request.params, temperature=0.0)))
        for temperature in TINY:
            result = one(engine, replace(request, params=replace(request.params, temperature=temperature)))
            assert (result.ids, result.reason) == (greedy.ids, greedy.reason), (fields, temperature)
            if method is not DecodingMethod.AUTO:
                assert result.ledger == greedy.ledger


numbers = st.floats(allow_nan=False, allow_infinity=False)


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    method=st.sampled_from(METHODS),
    temperature=st.one_of(st.sampled_from(TINY), st.floats(0, 100), st.just(GREEDY_BELOW)),
    penalty=st.one_of(st.sampled_from((0.01, 100.0)), st.floats(0.01, 100)),
    counted=st.sampled_from((-2.0, 0.0, 2.0)),
    bias=st.dictionaries(st.integers(4, 259), st.sampled_from((-100.0, 100.0)), max_size=260),
    cuts=st.sampled_from(({}, {"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1.0}, {"top_k": 3, "top_p": 5e-324})),
    strict=st.booleans(),
)
def test_no_parameters_leave_nothing_or_blame_the_model(
    seed: int,
    method: DecodingMethod,
    temperature: float,
    penalty: float,
    counted: float,
    bias: dict[int, float],
    cuts: dict[str, float],
    strict: bool,
) -> None:
    request = ask(
        seed,
        DecodingParams(method),
        temperature=temperature,
        repetition_penalty=penalty,
        presence_penalty=counted,
        frequency_penalty=counted,
        logit_bias=bias,
        utf8=Utf8.STRICT if strict else Utf8.REPLACE,
        **cuts,
    )
    assert one(ENGINE, request).reason in ("stop", "length")


ENGINE = Engine(model(2), settings())


@pytest.mark.parametrize("method", [method for method in METHODS if method is not DecodingMethod.AUTO])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_leaves_nothing_ends_alone_and_forgets_nothing(method: DecodingMethod, temperature: float) -> None:
    """No parameters that are taken do so: this one is out of range, and overflows whatever the prompt has."""
    engine = Engine(model(0), settings())
    rng = random.Random(0)
    first = Request("a", [1, *rng.choices(range(4, 260), k=90)], SamplingParams(max_tokens=5, temperature=0.0), 0.0)
    run(engine, [first])
    cached, params = engine.stats().pages_cached, SamplingParams(temperature=temperature)
    object.__setattr__(params, "repetition_penalty", 1e-45)
    object.__setattr__(params, "decoding", DecodingParams(method))
    object.__setattr__(params, "logit_bias", {})
    every = [1, *first.prompt_ids[1:], *range(4, 260)]
    spoilt = Request("b", every, params, 0.0)
    results = run(engine, [spoilt, replace(first, request_id="c")])
    assert results["b"].deltas[-1].error_code is ErrorCode.NOTHING_LEFT
    assert results["c"].reason in ("stop", "length") and results["c"].deltas[-1].cached > 50
    assert all(count >= cached[name] for name, count in engine.stats().pages_cached.items())
