"""Rounds tell how every byte was made: of random requests, alone and preempted, they add up to the output."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Delta, Origin, Request, Round, SamplingParams
from tests.server.harness import MODELS, Finished, least_memory, model, random_request, run, settings, short_sighted

few = hypothesis_settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**32 - 1)
METHODS = ("blt", "blt-s", "blt-dv", "blt-dsv", "blt-d")


def rounds_of(deltas: list[Delta]) -> list[Round]:
    return [one for delta in deltas for one in delta.rounds or ()]


def check(request: Request, result: Finished) -> None:
    """What rounds say of a request, against its output, its patch report and its ledger."""
    rounds = rounds_of(result.deltas)
    assert [i for one in rounds for i in one.ids] == result.ids
    # Rounds never run ahead of the bytes that were sent.
    sent = told = 0
    for delta in result.deltas:
        sent += len(delta.ids)
        told += sum(len(one.ids) for one in delta.rounds or ())
        assert told <= sent
    at = 0
    for one in rounds:
        assert one.start == at and one.ids and len(one.origins) == len(one.ids)
        at += len(one.ids)
        _check_origins(one, last=one is rounds[-1])
    entropies = [value for one in rounds for value in one.entropies]
    report = result.patches
    assert entropies == list(report.entropies[: len(entropies)])
    starts = [start for one in rounds for start in one.patches]
    assert starts == [start for start in report.starts if start < len(entropies)]
    method = request.params.decoding.method
    if method != DecodingMethod.BLT_D:
        assert len(entropies) == len(result.ids)
    assert {one.method for one in rounds} <= {method}
    for earlier, later in pairwise(rounds):
        assert earlier.decoder <= later.decoder and earlier.seconds <= later.seconds
        assert earlier.gb_blt < later.gb_blt


def _check_origins(one: Round, *, last: bool) -> None:
    made, kept = one.origins, len(one.ids)
    if Origin.FILLED in made:
        assert set(made) == {Origin.FILLED} and not one.draft and min(one.steps) >= 1
        return
    accepted = min(one.accepted, kept)
    assert one.ids[:accepted] == one.draft[:accepted]
    assert all(origin in (Origin.DRAFTED, Origin.BLOCK) for origin in made[:accepted])
    assert [origin is Origin.BLOCK for origin in made[:accepted]] == [step > 0 for step in one.steps[:accepted]]
    assert len(one.steps) == len(one.draft)
    if kept > accepted:
        refused = one.accepted < len(one.draft)
        assert made[accepted:] == [Origin.CORRECTED if refused else Origin.CAUSAL]
        assert not refused or one.ids[accepted] != one.draft[accepted]
    else:
        assert last, "only the end of the text cuts a round"


@few
@given(seeds)
def test_rounds_add_up_to_the_output(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    asked = [random_request(rng, f"r{i}", return_patches=True, return_rounds=True) for i in range(5)]
    plain = [replace(one, params=replace(one.params, return_patches=False, return_rounds=False)) for one in asked]
    done = run(Engine(model(which), settings()), asked, [rng.randrange(20) for _ in asked])
    expected = run(Engine(model(which), settings()), plain)
    for request in asked:
        result = done[request.request_id]
        # Asking changes nothing, and nobody else is told.
        assert result.ids == expected[request.request_id].ids
        assert not any(delta.rounds for delta in expected[request.request_id].deltas)
        if result.reason != "error":
            check(request, result)


@pytest.mark.parametrize("method", METHODS)
def test_the_costs_of_a_round_are_those_of_the_request_so_far(method: str) -> None:
    params = SamplingParams(
        max_tokens=60, seed=1, ignore_eos=True, return_rounds=True, return_patches=True, decoding=DecodingParams(method)
    )
    result = run(Engine(model(0), settings()), [Request("r", [1, *range(40, 60)], params, 0.0)])["r"]
    last, ledger = rounds_of(result.deltas)[-1], result.ledger
    assert (last.patcher, last.encoder, last.global_, last.decoder) == (
        (ledger.patcher, ledger.encoder, ledger.global_, ledger.decoder)
    )
    assert last.gb == pytest.approx(ledger.gb)
    if method == "blt":
        assert last.gb_blt == pytest.approx(ledger.gb)


def test_preempted_requests_tell_each_round_once() -> None:
    rng = random.Random(0)
    tight = {"max_running": 6, "max_pass_rows": 16}
    long = {"max_tokens": 150, "min_tokens": 150, "stop": (), "ignore_eos": True}
    asked = [random_request(rng, f"r{i}", return_patches=True, return_rounds=True, **long) for i in range(6)]
    asked = [replace(request, prompt_ids=request.prompt_ids[:6]) for request in asked]
    engine = short_sighted(Engine(model(1), settings(**tight, cache_bytes=least_memory(1, 200, **tight))))
    done = run(engine, asked)
    assert engine.stats().preemptions > 0
    for request in asked:
        check(request, done[request.request_id])


def test_a_stop_string_takes_back_what_rounds_have_not_told() -> None:
    params = SamplingParams(max_tokens=80, seed=2, ignore_eos=True, decoding=DecodingParams("blt-s"))
    whole = run(Engine(model(0), settings()), [Request("r", [1, *range(40, 60)], params, 0.0)])["r"].ids
    stop = bytes(i - 4 for i in whole[20:24] if i >= 4)
    assert len(stop) == 4
    stopping = replace(params, stop=(stop,), return_rounds=True, return_patches=True)
    request = Request("r", [1, *range(40, 60)], stopping, 0.0)
    result = run(Engine(model(0), settings()), [request])["r"]
    assert result.reason == "stop" and len(result.ids) <= 20
    check(request, result)


def test_auto_tells_the_method_of_every_round() -> None:
    params = SamplingParams(max_tokens=200, seed=1, ignore_eos=True, return_rounds=True)
    result = run(Engine(model(0), settings()), [Request("r", [1, *range(40, 60)], params, 0.0)])["r"]
    rounds = rounds_of(result.deltas)
    assert rounds[0].method == "blt" and DecodingMethod.AUTO not in {one.method for one in rounds}
    assert [i for one in rounds for i in one.ids] == result.ids
