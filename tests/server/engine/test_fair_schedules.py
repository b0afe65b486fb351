"""Contract 2 under everything that shares the engine out: passes bounded by time, turns, prefixes that one computes for
several, little memory. None of it changes a byte."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.server.engine import scheduler
from fastblt.server.engine.device.cost import MODULES, CostCurve
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request
from tests.server.harness import (
    MODELS,
    Finished,
    fickle,
    least_memory,
    model,
    random_decoding,
    random_params,
    random_request,
    restless,
    run,
    settings,
    short_sighted,
    with_method,
)

AUTO = DecodingParams(DecodingMethod.AUTO)


def alone(which: int, request: Request) -> Finished:
    """By itself, and without drafts if it is `auto`."""
    if request.params.decoding == AUTO:
        request = with_method(request, request.request_id, DecodingParams(DecodingMethod.BLT))
    return run(Engine(model(which), settings(prefix_cache=False)), [request])[request.request_id]


def common_texts(rng: random.Random, count: int, **overrides: object) -> list[Request]:
    """Requests of all methods whose prompts often begin alike, some of them equal."""
    texts = [[1, *rng.choices(range(4, 260), k=rng.choice((60, 120, 170)))] for _ in range(2)]
    requests = []
    for number in range(count):
        text = rng.choice(texts)
        ids = text[: rng.choice((len(text), len(text), rng.randint(20, len(text))))]
        ids = ids + rng.choices(range(4, 260), k=rng.choice((0, 0, 5, 40)))
        decoding = AUTO if rng.random() < 0.25 else random_decoding(rng)
        params = random_params(rng, decoding=decoding, **overrides)
        params = replace(params, return_patches=rng.random() < 0.2)
        requests.append(replace(random_request(rng, f"r{number}", params), prompt_ids=ids, choice=number % 2))
        if rng.random() < 0.2:
            requests[-1] = replace(requests[-1], cache_salt="a")
    return requests


def bound_by_time(engine: Engine, rng: random.Random) -> None:
    """Passes that should take next to no time get few rows, by curves that are as good as any."""
    each = 10 ** rng.uniform(-7, -3)
    curves = {name: CostCurve((1, 256), (each, 256 * each)) for name in MODULES}
    engine.time_passes(curves, 10 ** rng.uniform(-9, -6))


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.integers(0, 2**32))
# A request for `auto` came while others ran in little memory; the eldest waited for one that was preempted again and
# again.
@example(6)
@example(16024406)
def test_no_schedule_changes_a_byte(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    chosen: dict = {
        "max_pass_rows": rng.choice((5, 16, 64, 300)),
        "max_passes_per_beat": rng.choice((1, 8, 64)),
        "page_size": rng.choice((4, 16, 64)),
        "max_running": rng.choice((1, 2, 4, 8)),
        "max_gap_ms": rng.choice((1.0, 3.0, 100.0)),
    }
    if rng.random() < 0.5:
        chosen["cache_bytes"] = least_memory(which, 270, **chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "FIRST_TURN", rng.choice((0.0, 1e-3, 0.25)))
        patch.setattr(scheduler, "NEXT_TURN", rng.choice((0.0, 1e-3, 4.0)))
        engine = Engine(model(which), settings(**chosen))
        if rng.random() < 0.7:
            fickle(engine, seed)
        if rng.random() < 0.7:
            bound_by_time(engine, rng)
        if rng.random() < 0.5:
            short_sighted(engine)
        if rng.random() < 0.3:
            restless(engine, rng.choice((3, 10)))
        requests = common_texts(rng, rng.randint(2, 8))
        requests = [r for r in requests if len(r.prompt_ids) + r.params.max_tokens <= engine.max_model_len]
        together = run(engine, requests, [rng.choice((0, 0, rng.randrange(40))) for _ in requests])
    for request in requests:
        expected, result = alone(which, request), together[request.request_id]
        assert (result.ids, result.reason, result.error) == (expected.ids, expected.reason, None)
        if request.params.return_patches:
            assert result.patches == expected.patches


def test_turns_are_taken_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above means little for turns unless they happen: here they must, with two places for six."""
    monkeypatch.setattr(scheduler, "FIRST_TURN", 0.0)
    monkeypatch.setattr(scheduler, "NEXT_TURN", 0.0)
    rng = random.Random(1)
    long = {"max_tokens": 100, "min_tokens": 100, "stop": (), "ignore_eos": True}
    requests = [random_request(rng, f"r{number}", **long) for number in range(6)]
    engine = Engine(model(2), settings(max_running=2))
    together = run(engine, requests, [0, 0, 5, 5, 10, 10])
    assert engine.stats().turns > 6 and engine.stats().preemptions == 0
    for request in requests:
        assert together[request.request_id].ids == alone(2, request).ids


def test_a_prompt_of_many_choices_is_computed_once() -> None:
    rng = random.Random(2)
    request = random_request(rng, "r", max_tokens=8, min_tokens=8, stop=(), ignore_eos=True)
    prompt = [1, *rng.choices(range(4, 260), k=300)]
    requests = [replace(request, request_id=f"r{n}", prompt_ids=prompt, choice=n) for n in range(8)]
    engine = Engine(model(1), settings(max_pass_rows=64))
    together = run(engine, requests)
    stats = engine.stats()
    # All but what is left of a page, and of a patch, is the first one's.
    assert stats.prefix_joined >= 7 * (300 - 16 - 40)
    for one in requests:
        assert together[one.request_id].ids == alone(1, one).ids
        assert together[one.request_id].deltas[-1].cached >= (one.choice > 0) * (300 - 16 - 40)


def test_nobody_waits_for_ever_for_who_is_preempted() -> None:
    """The younger one needs less, so it is served first; it never gets to the page that the elder waits for."""
    rng = random.Random(4)
    text = [1, *rng.choices(range(4, 260), k=80)]
    plain = DecodingParams(DecodingMethod.BLT)
    params = random_params(rng, max_tokens=4, min_tokens=4, stop=(), ignore_eos=True, decoding=plain)
    requests = [Request("elder", text, params, 0.0), Request("younger", text[:60], params, 0.0)]
    together = run(restless(Engine(model(0), settings(max_pass_rows=4)), every=2), requests, [0, 4])
    for one in requests:
        assert together[one.request_id].ids == alone(0, one).ids


def test_a_leader_that_goes_is_followed_by_another() -> None:
    """The one that computes for all is aborted halfway: what it has done stays, and the next goes on."""
    rng = random.Random(3)
    prompt = [1, *rng.choices(range(4, 260), k=300)]
    params = random_params(rng, max_tokens=4, min_tokens=4, stop=(), ignore_eos=True)
    requests = [Request(f"r{n}", prompt, params, 0.0, choice=n) for n in range(4)]
    engine = Engine(model(1), settings(max_pass_rows=32))
    together = run(engine, requests, aborts={"r0": 4})
    assert together["r0"].reason == "abort"
    for one in requests[1:]:
        assert together[one.request_id].ids == alone(1, one).ids
    assert engine.stats().prefix_joined > 2 * 200
