"""From what a request and a server ask for to what runs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fastblt.server.decoding.blt import Blt
from fastblt.server.decoding.blt_d import BltD
from fastblt.server.decoding.blt_dv import BltDV
from fastblt.server.decoding.blt_s import BltS
from fastblt.server.decoding.choose import make_method, resolve
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, InvalidRequestError
from tests.server.harness import model, settings
from tests.tiny import tiny_config, tiny_model

DIFFUSES = tiny_config(0, block_sizes=(4, 8))
PLAIN = tiny_config(0, block_sizes=(), decoder_input="encoder")


def params(**fields: Any) -> DecodingParams:
    if "method" in fields:
        fields["method"] = DecodingMethod(fields["method"])
    return DecodingParams(**fields)


def what_runs(asked: dict[str, Any], defaults: dict[str, Any] | None = None, config: Any = DIFFUSES) -> dict[str, Any]:
    resolved = resolve(params(**asked), params(**(defaults or {})), config)
    return {name: value for name, value in vars(resolved).items() if value is not None}


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({"method": "blt"}, {"method": "blt"}),
        ({"method": "blt-s"}, {"method": "blt-s", "draft_length": 8, "paper_accounting": False}),
        (
            {"method": "blt-d"},
            {
                "method": "blt-d", "block_size": 8, "unmasking": "confidence", "confidence_threshold": 0.7,
                "align_blocks": False,
            },
        ),
        (
            {"method": "blt-dv"},
            {"method": "blt-dv", "block_size": 8, "unmasking": "one_step", "paper_accounting": False},
        ),
        # A bound means its rule.
        (
            {"method": "blt-dv", "block_size": 4, "confidence_threshold": 0.0, "max_steps": 2},
            {
                "method": "blt-dv", "block_size": 4, "unmasking": "confidence", "confidence_threshold": 0.0,
                "max_steps": 2, "paper_accounting": False,
            },
        ),
        (
            {"method": "blt-d", "entropy_bound": 2.0},
            {
                "method": "blt-d", "block_size": 8, "unmasking": "entropy", "entropy_bound": 2.0,
                "entropy_rule": "inclusive", "align_blocks": False,
            },
        ),
        # What every method does anyway is no contradiction.
        ({"method": "blt", "align_blocks": False, "paper_accounting": False}, {"method": "blt"}),
    ],
)  # fmt: skip
def test_every_setting_of_the_method_and_no_other(asked: dict[str, Any], runs: dict[str, Any]) -> None:
    assert what_runs(asked) == runs


def test_a_request_goes_before_the_server_field_by_field() -> None:
    defaults = {
        "method": "blt-dv", "block_size": 4, "draft_length": 3, "unmasking": "entropy", "entropy_bound": 5.0,
        "confidence_threshold": 0.2,
    }  # fmt: skip
    mine = {"method": "blt-dv", "block_size": 4, "paper_accounting": False}
    entropy = {"unmasking": "entropy", "entropy_bound": 5.0, "entropy_rule": "inclusive"}
    assert what_runs({}, defaults) == mine | entropy
    assert what_runs({"block_size": 8}, defaults) == mine | entropy | {"block_size": 8}
    assert what_runs({"entropy_bound": 1.0}, defaults) == mine | entropy | {"entropy_bound": 1.0}
    one_step = {"unmasking": "one_step"}
    assert what_runs(one_step, defaults) == mine | one_step
    confidence = {"unmasking": "confidence", "confidence_threshold": 0.2}
    assert what_runs({"unmasking": "confidence"}, defaults) == mine | confidence
    # Defaults of other methods are ignored.
    assert what_runs({"method": "blt"}, defaults) == {"method": "blt"}
    assert what_runs({"method": "blt-s"}, defaults)["draft_length"] == 3


def test_auto() -> None:
    """It has no settings: a controller chooses them."""
    assert what_runs({}) == what_runs({"method": "auto"}) == {"method": "auto"}
    assert what_runs({"method": "auto"}, {"method": "blt-d", "block_size": 8}) == {"method": "auto"}
    assert what_runs({}, {"draft_length": 3}, config=PLAIN) == {"method": "auto"}


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        (
            {"method": "blt", "draft_length": 4},
            "draft_length",
            "belongs to blt-s and blt-dsv, and this request runs blt",
        ),
        ({"method": "blt", "block_size": 4}, "block_size", "belongs to blt-d and blt-dv"),
        ({"method": "blt", "unmasking": "one_step"}, "unmasking", "belongs to blt-d and blt-dv"),
        ({"method": "blt", "max_steps": 1}, "max_steps", "belongs to blt-d and blt-dv"),
        ({"method": "blt", "paper_accounting": True}, "paper_accounting", "belongs to blt-s and blt-dv"),
        ({"method": "blt-s", "block_size": 4}, "block_size", "runs blt-s"),
        ({"method": "blt-s", "confidence_threshold": 0.5}, "confidence_threshold", "belongs to blt-d and blt-dv"),
        ({"method": "blt-s", "align_blocks": True}, "align_blocks", "belongs to blt-d,"),
        ({"method": "blt-d", "draft_length": 4}, "draft_length", "belongs to blt-s"),
        ({"method": "blt-d", "paper_accounting": True}, "paper_accounting", "belongs to blt-s and blt-dv"),
        ({"method": "blt-dv", "align_blocks": True}, "align_blocks", "belongs to blt-d,"),
        ({"method": "blt-dv", "draft_length": 4}, "draft_length", "belongs to blt-s"),
        (
            {"method": "blt-d", "unmasking": "entropy", "confidence_threshold": 0.5},
            "confidence_threshold",
            "belongs to unmasking confidence, and this request's is entropy",
        ),
        ({"method": "blt-d", "unmasking": "confidence", "entropy_bound": 1.0}, "entropy_bound", "unmasking entropy"),
        ({"method": "blt-d", "confidence_threshold": 0.5, "entropy_bound": 1.0}, "entropy_bound", "unmasking entropy"),
        ({"method": "blt-d", "unmasking": "confidence", "entropy_rule": "inclusive"}, "entropy_rule", "entropy"),
        ({"method": "blt-dv", "unmasking": "one_step", "max_steps": 2}, "max_steps", "confidence or entropy"),
        ({"method": "blt-dv", "max_steps": 2}, "max_steps", "this request's is one_step"),
        ({"block_size": 4}, "block_size", "which this server chose; name a method"),
        (
            {"method": "auto", "draft_length": 4},
            "draft_length",
            "belongs to blt-s and blt-dsv, and this request runs auto",
        ),
        ({"method": "blt-d", "block_size": 5}, "block_size", "was not trained; this checkpoint has 4, 8"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        what_runs(asked)
    assert caught.value.param == f"decoding.{field}"


@pytest.mark.parametrize("method", ["blt-d", "blt-dv"])
def test_a_checkpoint_without_a_diffusion_head(method: str) -> None:
    with pytest.raises(InvalidRequestError, match="no diffusion head") as caught:
        resolve(params(method=method), params(), PLAIN, untrained_sizes=True)
    assert caught.value.param == "decoding.method"


def test_make_method() -> None:
    kinds = {"blt": Blt, "blt-s": BltS, "blt-d": BltD, "blt-dv": BltDV}
    for name, kind in kinds.items():
        assert type(make_method(resolve(params(method=name), params(), DIFFUSES))) is kind


def test_untrained_block_sizes_are_for_those_who_ask() -> None:
    asked = params(method="blt-d", block_size=5)
    assert resolve(asked, params(), DIFFUSES, untrained_sizes=True).block_size == 5


def test_an_engine_refuses_defaults_that_no_request_could_have() -> None:
    for defaults in ({"method": "blt-d", "block_size": 5}, {"block_size": 5}):
        with pytest.raises(InvalidRequestError, match="block_size 5"):
            Engine(model(0), settings(decoding=params(**defaults)))
        Engine(model(0), settings(decoding=params(**defaults), allow_untrained_block_size=True))
    plain = tiny_model(0, block_sizes=(), decoder_input="encoder")
    with pytest.raises(InvalidRequestError, match="no diffusion head"):
        Engine(plain, settings(decoding=params(method="blt-dv")))
