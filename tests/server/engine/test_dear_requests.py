"""A step never waits on one request: the dearest stop strings, biases, penalties and log-probabilities that the limits
allow cost others little, in processor time of the engine's thread."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest

from fastblt.models.vocabulary import BYTE_OFFSET, encode
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from tests.server.harness import model, settings

#: Strings of which every byte of a text of one letter continues all, and none ever ends.
STOPS = tuple(b"a" * 1000 + bytes([98 + i % 20, 98 + i // 20]) for i in range(64))
ONLY_A = {ord("a") + BYTE_OFFSET: 100.0}
DEAR: dict[str, dict[str, Any]] = {
    "stop strings": {"stop": STOPS, "logit_bias": ONLY_A},
    "stop ids": {"stop_token_ids": tuple(range(BYTE_OFFSET, BYTE_OFFSET + 64))},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 1.5, "repetition_penalty": 1.5},
    "biases": {"logit_bias": {BYTE_OFFSET + i: -1.0 for i in range(100)}},
    "log-probabilities": {"logprobs": 20, "return_patches": True},
}
#: Seconds of the engine's thread for a step in which seven requests of a kind take part.
BOUND = 0.05


@pytest.mark.parametrize("method", [DecodingMethod.BLT, DecodingMethod.BLT_S, DecodingMethod.BLT_D])
@pytest.mark.parametrize("name", DEAR)
def test_others_go_on_beside_dear_requests(name: str, method: DecodingMethod) -> None:
    engine = Engine(model(0), settings(max_running=8, max_waiting=16, threads=1, cache_bytes=96 << 20))
    for number in range(7):
        own = SamplingParams(
            max_tokens=300, ignore_eos=True, seed=number, decoding=DecodingParams(method), **DEAR[name]
        )
        engine.add(Request(f"dear-{number}", [1, *encode(b"a")], own, 0.0))
    free = SamplingParams(max_tokens=60, ignore_eos=True, decoding=DecodingParams(DecodingMethod.BLT))
    engine.step()
    engine.add(Request("free", [1, *encode(b"x")], free, 0.0))
    steps: list[float] = []
    had = 0
    while had < 60:
        before = time.thread_time()
        had += sum(len(delta.ids) for delta in engine.step() if delta.request_id == "free")
        steps.append(time.thread_time() - before)
    assert statistics.median(steps) < BOUND
    # One step may make masks or compile something for the first time.
    assert max(steps) < 4 * BOUND
    for number in range(7):
        engine.abort(f"dear-{number}")
    engine.step()
    assert not engine.has_work() and engine.balanced()
