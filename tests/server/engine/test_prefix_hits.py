"""A prefix hit never changes an output (contract 2), and spares what it says."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.kernels.cpu.decoder_steps import Decoded
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, ErrorCode, Request, SamplingParams
from tests.server.harness import (
    MODELS,
    Finished,
    least_memory,
    model,
    random_decoding,
    random_params,
    random_request,
    run,
    settings,
    short_sighted,
)

METHODS = (DecodingMethod.BLT, DecodingMethod.BLT_S, DecodingMethod.BLT_D, DecodingMethod.BLT_DV)


def alone(which: int, request: Request) -> Finished:
    return run(Engine(model(which), settings(prefix_cache=False)), [request])[request.request_id]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [1, *random.Random(seed).choices(range(4, 260), k=length - 1)]


def greedy(name: str, ids: list[int], **overrides: object) -> Request:
    params = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "decoding": DecodingParams(DecodingMethod.BLT)}
    return Request(name, ids, SamplingParams(**(params | overrides)), 0.0)  # type: ignore[arg-type]


@hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.integers(0, 2**32))
def test_hits_change_no_byte(seed: int) -> None:
    """Three waves, each with prompts that go on from those before or from what they gave, in one engine."""
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    chosen: dict = {
        "page_size": rng.choice((4, 8, 16, 40, 64)),
        "max_pass_rows": rng.choice((5, 16, 64, 300)),
        "max_passes_per_beat": rng.choice((1, 8, 64)),
        "max_running": rng.choice((2, 5)),
    }
    if rng.random() < 0.5:
        chosen["cache_bytes"] = least_memory(which, 250, **chosen)
    engine = Engine(model(which), settings(**chosen))
    texts = [prompt(rng.choice((20, 90, 180)), rng.randrange(2**32)) for _ in range(2)]
    for wave in range(3):
        requests = []
        for number in range(4):
            text = rng.choice(texts)
            keep = len(text) if rng.random() < 0.5 else rng.randint(1, len(text))
            ids = text[:keep] + rng.choices(range(4, 260), k=rng.choice((0, 1, 9)))
            params = random_params(rng, decoding=random_decoding(rng), return_patches=rng.random() < 0.3)
            request = Request(f"w{wave}-{number}", ids, params, 0.0, cache_salt=rng.choice((None, None, "a")))
            if len(ids) + params.max_tokens <= engine.max_model_len:
                requests.append(request)
        aborts = {request.request_id: rng.randrange(30) for request in requests if rng.random() < 0.15}
        done = run(engine, requests, [rng.randrange(25) for _ in requests], aborts)
        without = run(Engine(model(which), settings(prefix_cache=False)), requests)
        for request in requests:
            result, expected = done[request.request_id], without[request.request_id]
            if result.reason == "abort":
                assert result.ids == expected.ids[: len(result.ids)]
            else:
                assert (result.ids, result.reason) == (expected.ids, expected.reason), request
                if request.params.return_patches:
                    assert result.patches == expected.patches
            texts.append([i for i in request.prompt_ids + result.ids if i != 2])


@pytest.mark.parametrize("method", METHODS)
def test_a_hit_spares_the_passes_of_the_prefix(method: DecodingMethod) -> None:
    decoding = DecodingParams(method)
    engine = Engine(model(0), settings(max_pass_rows=16))
    first = run(engine, [greedy("first", prompt(200), decoding=decoding)])["first"]
    again = run(engine, [greedy("again", [*prompt(200), 9], decoding=decoding)])["again"]
    request = greedy("again", [*prompt(200), 9], decoding=decoding)
    expected = run(Engine(model(0), settings(max_pass_rows=16, prefix_cache=False)), [request])["again"]
    assert again.ids == expected.ids
    assert first.deltas[-1].cached == expected.deltas[-1].cached == 0
    # What is left is less than a page of 16 and a patch of 8: two of 13 chunks, at most.
    assert again.deltas[-1].cached >= 200 - 16 - 8
    assert expected.ledger.encoder - again.ledger.encoder >= 10
    assert expected.ledger.decoder - again.ledger.decoder >= 10
    assert expected.ledger.global_ - again.ledger.global_ >= 10
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (199 + 200, again.deltas[-1].cached)
    assert stats.pages_cached["global"] > 0
    for name, total in stats.pages_total.items():
        assert stats.pages_free[name] + stats.pages_cached[name] == total


def test_a_conversation_hits_what_it_generated() -> None:
    engine = Engine(model(0), settings())
    ids = prompt(30)
    for turn in range(3):
        done = run(engine, [greedy(f"t{turn}", ids, max_tokens=80)])[f"t{turn}"]
        # All but what the last patch and an unfinished round leave.
        assert done.deltas[-1].cached >= (len(ids) - 2 - 9 if turn else 0)
        assert done.ids == alone(0, greedy("x", ids, max_tokens=80)).ids
        ids = ids + done.ids + [7]


def test_preempted_requests_profit() -> None:
    """They find what they had computed, even behind their prompts, and report the same patches."""
    rng = random.Random(0)
    tight = {"max_running": 6, "max_pass_rows": 16}
    tight["cache_bytes"] = least_memory(2, 200, **tight)
    engine = short_sighted(Engine(model(2), settings(**tight)))
    found: list[int] = []
    admit = engine._prefix.admit

    def watched(sequence):  # type: ignore[no-untyped-def]
        admit(sequence)
        if sequence.output.ids:
            found.append(sequence.decoded - sequence.prompt_length)

    engine._prefix.admit = watched  # type: ignore[method-assign]
    long = {"max_tokens": 150, "min_tokens": 150, "stop": (), "ignore_eos": True, "return_patches": True}
    requests = [replace(request, prompt_ids=request.prompt_ids[:6]) for request in
                (random_request(rng, f"r{i}", **long) for i in range(6))]  # fmt: skip
    done = run(engine, requests)
    assert max(found) > 20
    for request in requests:
        expected = alone(2, request)
        assert done[request.request_id].ids == expected.ids
        assert done[request.request_id].patches == expected.patches


def test_prompts_to_be_scored_are_not_looked_up() -> None:
    engine = Engine(model(0), settings())
    run(engine, [greedy("a", prompt(100))])
    scored = run(engine, [greedy("b", prompt(100), prompt_logprobs=0)])["b"]
    assert len(scored.deltas[0].prompt_logprobs or ()) == 99
    assert scored.deltas[-1].cached == 0 and engine.stats().prefix_queries == 99
    # What they compute is there for others.
    assert run(engine, [greedy("c", prompt(100))])["c"].deltas[-1].cached > 70


def test_what_gave_nan_is_not_reused_and_others_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model(0), settings())
    run(engine, [greedy("a", prompt(100))])
    before = engine.stats().pages_cached
    forward = engine._runner._forward
    real = forward.logits
    monkeypatch.setattr(forward, "logits", lambda *args: torch.full_like(real(*args), float("nan")))
    # Where one call computes logits and chooses from them, it says so itself.
    in_one_call = forward.decode_steps

    def bad(*args: Any, **kwargs: Any) -> Decoded:
        decoded = in_one_call(*args, **kwargs)
        decoded.made.bad = bytes([1] * len(decoded.made.bad))
        return decoded

    monkeypatch.setattr(forward, "decode_steps", bad)
    broken = run(engine, [greedy("b", prompt(100))])["b"]
    assert broken.deltas[-1].error_code is ErrorCode.NOT_FINITE and broken.deltas[-1].cached > 50
    monkeypatch.setattr(forward, "logits", real)
    monkeypatch.setattr(forward, "decode_steps", in_one_call)
    assert engine.stats().pages_cached == before
    assert run(engine, [greedy("c", prompt(100))])["c"].deltas[-1].cached == broken.deltas[-1].cached


def test_salts_and_the_switch_keep_requests_apart() -> None:
    engine = Engine(model(0), settings())
    for name, salt in (("a", "x"), ("b", "y"), ("c", None)):
        request = replace(greedy(name, prompt(60)), cache_salt=salt)
        assert run(engine, [request])[name].deltas[-1].cached == 0
    off = Engine(model(0), settings(prefix_cache=False))
    for name in ("a", "b"):
        assert run(off, [greedy(name, prompt(60))])[name].deltas[-1].cached == 0
    stats = off.stats()
    assert stats.pages_free == stats.pages_total and not any(stats.pages_cached.values())
    assert (stats.prefix_queries, stats.prefix_hits) == (0, 0)
