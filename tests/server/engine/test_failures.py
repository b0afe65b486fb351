"""Passes that fail: who ends, who goes on, and that everything is free afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, ErrorCode, Request
from tests.server.harness import Finished, model, random_params, random_request, run, settings

METHODS = [DecodingMethod.BLT, DecodingMethod.BLT_S, DecodingMethod.BLT_D, DecodingMethod.BLT_DV]


def requests(count: int) -> list[Request]:
    rng = random.Random(7)
    return [
        random_request(
            rng,
            f"r{i}",
            random_params(rng, decoding=DecodingParams(METHODS[i % 4]), max_tokens=30, min_tokens=30, stop=()),
        )
        for i in range(count)
    ]


def failing(real: Callable[..., Any], error: Exception, when: Callable[[int, list[Any]], bool]) -> Callable[..., Any]:
    """`real`, but it raises `error` on those calls for which `when(number, batch)`."""
    calls = 0

    def call(batch: list[Any], *more: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls, batch):
            raise error
        return real(batch, *more)

    return call


def alone(asked: list[Request]) -> dict[str, Finished]:
    return {request.request_id: run(Engine(model(0), settings()), [request])[request.request_id] for request in asked}


@pytest.mark.parametrize("stage", ["scan", "encode", "upstream", "decode"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_shrinks_and_tries_again(stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(4)
    engine = Engine(model(0), settings())
    real = getattr(engine._runner, stage)
    monkeypatch.setattr(engine._runner, stage, failing(real, error, lambda number, batch: number in (3, 9)))
    results = run(engine, asked)
    # Nobody notices.
    assert {name: r.ids for name, r in results.items()} == {name: r.ids for name, r in alone(asked).items()}
    assert engine.stats().preemptions >= 4


def test_who_never_fits_ends_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(4)
    engine = Engine(model(0), settings())
    error = torch.OutOfMemoryError("CUDA out of memory")

    def greedy(number: int, batch: list[Any]) -> bool:
        return any(sequence.request.request_id == "r1" for sequence, _ in batch)

    monkeypatch.setattr(engine._runner, "decode", failing(engine._runner.decode, error, greedy))
    results = run(engine, asked)
    expected = alone(asked)
    assert results["r1"].deltas[-1].error_code is ErrorCode.OUT_OF_MEMORY
    for name in ("r0", "r2", "r3"):
        assert results[name].ids == expected[name].ids
    # One at a time was the consequence, and it passes.
    assert engine._scheduler.limit < settings().max_running
    run(engine, requests(24)[4:])
    assert engine._scheduler.limit > 1


def test_a_failure_with_the_outcome_of_one_request_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(4)
    engine = Engine(model(0), settings())
    real = engine._postprocessor.process

    def process(sequence: Any, plan: Any, result: Any) -> Any:
        if sequence.request.request_id == "r2" and len(sequence.output.ids) > 5:
            raise KeyError("a secret detail")
        return real(sequence, plan, result)

    monkeypatch.setattr(engine._postprocessor, "process", process)
    results = run(engine, asked)
    expected = alone(asked)
    assert results["r2"].deltas[-1].error_code is ErrorCode.PASS_FAILED
    assert "secret" not in str(results["r2"].error)
    for name in ("r0", "r1", "r3"):
        assert results[name].ids == expected[name].ids
