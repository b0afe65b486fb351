"""Contracts 1-3 of the design through a GPU's program: a late device, with its rounds, replays and padding.

`test_contracts.py` has them on a CPU. Here both sides of every comparison go through the device: a request alone, and
among others of any method, in chunks, preempted, and with prefix hits.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.kernels.cpu.native import library
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.stats import EngineStats
from fastblt.server.request import DecodingMethod, DecodingParams, Request
from fastblt.server.settings import EngineSettings
from tests.server.engine.late import late_engine
from tests.server.harness import (
    MODELS,
    Finished,
    model,
    random_decoding,
    random_params,
    random_request,
    restless,
    run,
    settings,
    with_method,
)

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

VERIFIED = (DecodingMethod.BLT_S, DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV)


def requests_of(rng: random.Random) -> list[Request]:
    """A request of BLT, the same one by every verified method, and others of any method that begin like it or not."""
    base = random_request(rng, "blt", random_params(rng, decoding=DecodingParams(DecodingMethod.BLT)))
    made = [base]
    for method in VERIFIED:
        decoding = random_decoding(rng)
        while decoding.method != method:
            decoding = random_decoding(rng)
        made.append(with_method(base, str(method), decoding))
    for at in range(2):
        other = random_request(rng, f"other{at}")
        if rng.random() < 0.5:
            other = replace(other, prompt_ids=[*base.prompt_ids, *other.prompt_ids[1:30]])
        made.append(other)
    return made


def check(seed: int) -> EngineStats:
    """All contracts over one random schedule; what the engine of all requests counted."""
    rng = random.Random(seed)
    which, requests = rng.choice(MODELS), requests_of(rng)
    how = settings(
        max_pass_rows=rng.choice((5, 16, 64, 300)), max_passes_per_beat=rng.choice((1, 2, 64)),
        max_running=rng.choice((2, 6)), page_size=rng.choice((4, 16)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:

        def device(own: EngineSettings) -> Engine:
            return late_engine(patch, model(which), own, random.Random(rng.random()))

        engine = restless(device(how), rng.choice((4, 9)))
        assert engine._runner.fused_steps is not None
        together = run(engine, requests, [rng.randrange(20) for _ in requests])
        alone: dict[str, Finished] = {}
        for request in requests:
            alone |= run(device(settings(prefix_cache=False)), [request])
    for name, expected in alone.items():
        done = together[name]
        assert (done.ids, done.reason, done.error) == (expected.ids, expected.reason, None), name
    for method in VERIFIED:
        assert (together[method].ids, together[method].reason) == (together["blt"].ids, together["blt"].reason), method
    return engine.stats()


@hypothesis_settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.integers(0, 2**32))
def test_alone_equals_batched_chunked_preempted_and_hit(seed: int) -> None:
    check(seed)


def test_the_schedules_preempt_and_hit() -> None:
    """The property above means little unless they do."""
    found = [check(seed) for seed in range(3)]
    assert sum(stats.preemptions for stats in found) > 0
    assert sum(stats.prefix_hits for stats in found) > 0
