"""Parameters are checked where they are made, whoever makes them."""

from __future__ import annotations

from typing import Any

import pytest

from fastblt.server.request import DecodingMethod, DecodingParams, InvalidRequestError, SamplingParams, Unmasking


def test_names_become_members() -> None:
    params = DecodingParams("blt-dv", unmasking="one_step")  # type: ignore[arg-type]
    assert params.method is DecodingMethod.BLT_DV and params.unmasking is Unmasking.ONE_STEP


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": "nope"}, "decoding.method"),
        ({"unmasking": "x"}, "decoding.unmasking"),
        ({"entropy_rule": 3}, "decoding.entropy_rule"),
        ({"block_size": 33}, "decoding.block_size"),
        ({"draft_length": 0}, "decoding.draft_length"),
        ({"draft_length": 2.5}, "decoding.draft_length"),
        ({"confidence_threshold": float("nan")}, "decoding.confidence_threshold"),
    ],
)
def test_wrong_decoding_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        DecodingParams(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {260: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"min_tokens": None}, "min_tokens"),
        ({"temperature": None}, "temperature"),
        ({"top_p": None}, "top_p"),
        ({"top_k": 1.0}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": 2.0}, "logprobs"),
        ({"logit_bias": None}, "logit_bias"),
        ({"logit_bias": {5: None}}, "logit_bias"),
        ({"logit_bias": {5.5: 1.0}}, "logit_bias"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", None]}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [None]}, "stop_token_ids"),
        ({"structured_output": "a+"}, "structured_output"),
        ({"decoding": "magic"}, "decoding.method"),
        ({"decoding": None}, "decoding"),
    ],
)
def test_wrong_sampling_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**fields)
    assert refused.value.param == param


def test_a_seed_of_minus_one_is_drawn() -> None:
    assert SamplingParams(seed=-1).seed is None and SamplingParams(seed=-2).seed == -2
