"""Contracts 1-3 of the design, over random models, requests and schedules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams
from tests.server.harness import (
    MODELS,
    least_memory,
    model,
    random_decoding,
    random_params,
    random_request,
    run,
    settings,
    short_sighted,
    with_method,
)

seeds = strategies.integers(0, 2**32)
few = hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tight_settings(rng: random.Random, seed: int, requests: int) -> dict:
    """A random schedule: chunk sizes, holding, page sizes, and sometimes so few pages that requests are preempted."""
    chosen: dict = {
        "max_pass_rows": rng.choice((5, 16, 64, 300)),
        "max_passes_per_beat": rng.choice((1, 2, 8, 64)),
        "max_hold_ms": rng.choice((None, 0.0, 2.0)),
        "page_size": rng.choice((16, 64)),
        "max_running": rng.choice((2, requests)),
    }
    if rng.random() < 0.5:
        chosen["cache_bytes"] = least_memory(seed, 200, **chosen)
    return chosen


@few
@given(seeds)
def test_alone_equals_batched_chunked_preempted(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    requests = [random_request(rng, f"r{i}") for i in range(rng.randint(2, 6))]
    chosen = tight_settings(rng, which, len(requests))
    engine = Engine(model(which), settings(**chosen))
    requests = [r for r in requests if len(r.prompt_ids) + r.params.max_tokens <= engine.max_model_len]
    arrivals = [rng.randrange(30) for _ in requests]
    together = run(engine, requests, arrivals)
    for request in requests:
        alone = run(Engine(model(which), settings()), [request])[request.request_id]
        assert together[request.request_id].ids == alone.ids
        assert together[request.request_id].reason == alone.reason
        assert together[request.request_id].error is None


def test_preempted_requests_give_the_same_bytes() -> None:
    """The property above means little for preemption unless it happens: here it must."""
    long = {"max_tokens": 150, "min_tokens": 150, "stop": (), "ignore_eos": True, "return_patches": True}
    for seed in range(2):
        rng = random.Random(seed)
        which = 1 + seed
        tight = {"max_running": 6, "max_pass_rows": 16}
        tight["cache_bytes"] = least_memory(which, 200, **tight)
        requests = [random_request(rng, f"r{i}", **long) for i in range(6)]
        # Short prompts and long outputs: admission cannot see the shortage coming.
        requests = [replace(request, prompt_ids=request.prompt_ids[:6]) for request in requests]
        engine = short_sighted(Engine(model(which), settings(**tight)))
        together = run(engine, requests)
        assert engine.stats().preemptions > 0
        for request in requests:
            alone = run(Engine(model(which), settings()), [request])[request.request_id]
            assert together[request.request_id].ids == alone.ids
            assert together[request.request_id].patches == alone.patches


def test_holding_has_a_bound() -> None:
    """In milliseconds: no hold at 0; without a bound as long as anybody can go on."""
    requests = [
        random_request(random.Random(100 + i), f"r{i}", max_tokens=40, min_tokens=40, stop=()) for i in range(6)
    ]
    holds, beats = {}, {}
    for bound in (0.0, 3.0, None):
        engine = Engine(model(1), settings(max_hold_ms=bound))
        run(engine, requests)
        holds[bound], beats[bound] = engine.stats().holds, engine.stats().beats
    assert holds[0.0] == 0 < holds[3.0] <= holds[None]
    assert beats[0.0] > beats[3.0] >= beats[None]


@few
@given(seeds)
def test_verified_methods_are_lossless(seed: int) -> None:
    """Verified drafts give the bytes of BLT, greedy and sampled, whatever they are and whoever is beside them."""
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    base = random_request(rng, "blt", random_params(rng, decoding=DecodingParams(DecodingMethod.BLT)))
    requests = [base]
    for i in range(4):
        decoding = random_decoding(rng)
        while decoding.method not in (DecodingMethod.BLT_S, DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV):
            decoding = random_decoding(rng)
        requests.append(with_method(base, f"v{i}", decoding))
    others = [random_request(rng, f"other{i}") for i in range(2)]
    done = run(Engine(model(which), settings()), requests + others, [rng.randrange(10) for _ in range(7)])
    for request in requests[1:]:
        assert done[request.request_id].ids == done["blt"].ids, request.params.decoding
        assert done[request.request_id].reason == done["blt"].reason


@few
@given(seeds)
def test_aborts_free_everything_and_disturb_nobody(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    requests = [random_request(rng, f"r{i}") for i in range(5)]
    arrivals = [rng.randrange(20) for _ in requests]
    aborts = {f"r{i}": rng.randrange(40) for i in range(0, 5, 2)}
    done = run(Engine(model(which), settings(max_running=3)), requests, arrivals, aborts)
    for request in requests:
        alone = run(Engine(model(which), settings()), [request])[request.request_id]
        result = done[request.request_id]
        if result.reason == "abort":
            assert request.request_id in aborts
            assert result.ids == alone.ids[: len(result.ids)]
        else:
            assert result.ids == alone.ids


def test_a_failing_pass_ends_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    engine = Engine(model(0), settings())
    requests = [random_request(rng, f"r{i}", max_tokens=40, min_tokens=40, stop=()) for i in range(3)]
    for request in requests[:2]:
        engine.add(request)
    for _ in range(5):
        engine.step()
    real = engine._runner.decode

    def broken(batch: list) -> list:
        raise RuntimeError("the device went away")

    monkeypatch.setattr(engine._runner, "decode", broken)
    ended = []
    for _ in range(20):
        ended += [delta for delta in engine.step() if delta.finish_reason]
    assert {str(delta.finish_reason) for delta in ended} == {"error"} and len(ended) == 2
    assert all("RuntimeError" in (delta.error or "") for delta in ended)
    assert engine.balanced()
    monkeypatch.setattr(engine._runner, "decode", real)
    assert run(engine, requests[2:])["r2"].error is None


def test_a_long_run_without_a_maximum_is_one_patch() -> None:
    """3,000 zeros under a threshold that nothing exceeds: the open patch outlives every window."""
    engine = Engine(
        model(0), settings(max_model_len=4096, patching_threshold=1e9, max_patch_length=0, max_pass_rows=512)
    )
    request = random_request(random.Random(1), "zeros", random_params(random.Random(1), max_tokens=20, min_tokens=20))
    request = replace(request, prompt_ids=[1] + [4] * 3000)
    done = run(engine, [request])["zeros"]
    assert done.error is None and len(done.ids) == 20
    # BOS is the one patch that ever closes.
    assert done.ledger.patches == 0 and done.ledger.global_ == 1
