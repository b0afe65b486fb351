"""Log-probabilities of prompts against the model itself, and the order in which requests wait."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch

from fastblt.models.blt import Blt
from fastblt.models.vocabulary import EOS_ID
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.sequence import Sequence
from fastblt.server.request import ByteLogprobs, DecodingMethod, DecodingParams, Request, SamplingParams
from tests.server.harness import (
    MODELS,
    Finished,
    least_memory,
    model,
    random_decoding,
    random_params,
    random_request,
    restless,
    run,
    settings,
    short_sighted,
)


def expected(blt: Blt, ids: list[int]) -> torch.Tensor:
    """Log-softmax [N - 1, 260] of the uncached model at the rows before ids[1:]."""
    with torch.inference_mode():
        return torch.log_softmax(blt(torch.tensor([ids])).logits[0, :-1].float(), -1)


def scores(finished: Finished) -> list[ByteLogprobs]:
    [first, *others] = [delta.prompt_logprobs for delta in finished.deltas]
    assert others == [None] * len(others), "prompt logprobs come once, with the first delta"
    assert first is not None
    return first


def check(blt: Blt, request: Request, got: list[ByteLogprobs]) -> None:
    top = request.params.prompt_logprobs
    assert top is not None
    want = expected(blt, request.prompt_ids)
    assert len(got) == len(want)
    for token, row, score in zip(request.prompt_ids[1:], want, got, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values = torch.topk(row, top).values.tolist() if top else []
        assert [value for _, value in score.top] == pytest.approx(values, abs=1e-4)
        assert [float(row[i]) for i, _ in score.top] == pytest.approx(values, abs=1e-4)
        # The same number where the byte is among the best: clients compare for equality.
        assert dict(score.top).get(token, score.logprob) == score.logprob
        assert score.rank is not None
        assert int((row > row[token] + 1e-4).sum()) < score.rank <= int((row > row[token] - 1e-4).sum())


@pytest.mark.parametrize("which", MODELS[:2])
def test_prompts_are_scored_as_the_model_scores_them(which: int) -> None:
    rng = random.Random(which)
    chosen = settings(max_pass_rows=rng.choice((5, 16, 64)), deterministic=bool(which % 2))
    requests = []
    for i in range(8):
        request = random_request(rng, f"r{i}", max_tokens=6, min_tokens=0)
        asked = rng.choice((None, 0, 1, 5))
        requests.append(replace(request, params=replace(request.params, prompt_logprobs=asked)))
    done = run(Engine(model(which), chosen), requests, [rng.randrange(6) for _ in requests])
    for request in requests:
        if request.params.prompt_logprobs is None or len(request.prompt_ids) == 1:
            assert all(delta.prompt_logprobs is None for delta in done[request.request_id].deltas)
        else:
            check(model(which), request, scores(done[request.request_id]))


def test_preempted_prompts_are_scored_once() -> None:
    rng = random.Random(0)
    tight = {"max_running": 6, "max_pass_rows": 16}
    tight["cache_bytes"] = least_memory(1, 200, **tight)
    engine = restless(short_sighted(Engine(model(1), settings(**tight))), 5)
    params = {"max_tokens": 100, "min_tokens": 100, "stop": (), "ignore_eos": True, "logit_bias": {}}
    requests = [
        Request(
            f"r{i}",
            [1, *(rng.randrange(4, 260) for _ in range(60))],
            random_params(rng, **params, decoding=random_decoding(rng), prompt_logprobs=2),
            time.monotonic(),
        )
        for i in range(6)
    ]
    done = run(engine, requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        check(model(1), request, scores(done[request.request_id]))


def test_the_id_that_ends_a_request_has_its_logprobs() -> None:
    def ending(**fields: object) -> tuple[int, ByteLogprobs] | None:
        params = SamplingParams(temperature=0.0, max_tokens=4, decoding=DecodingParams(), **fields)  # type: ignore[arg-type]
        [finished] = run(Engine(model(0), settings()), [Request("r", [1, 70], params, 0.0)]).values()
        assert finished.ids == []
        return finished.deltas[-1].ending

    [row] = expected(model(0), [1, 70, 70])[1:]
    for fields, token in (
        ({"logit_bias": {EOS_ID: 100.0}}, EOS_ID),
        ({"logit_bias": {80: 100.0}, "stop_token_ids": (80,)}, 80),
    ):
        assert ending(**fields) is None  # type: ignore[arg-type]
        got = ending(**fields, logprobs=1)  # type: ignore[arg-type]
        assert got is not None and got[0] == token
        assert got[1].logprob == pytest.approx(float(row[token]), abs=1e-4)


def test_low_priority_values_run_first_and_equal_ones_in_order() -> None:
    engine = Engine(model(0), settings(max_running=1))
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    priorities = [0, 5, 0, -1, 5, -1]
    for i, priority in enumerate(priorities):
        engine.add(Request(f"r{i}", [1, 70], params, 0.0, priority=priority))
    order = []
    while engine.has_work():
        order += [delta.request_id for delta in engine.step() if delta.finish_reason is not None]
    assert order == ["r3", "r5", "r0", "r2", "r1", "r4"]


def test_what_matters_least_is_preempted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step is a byte: nobody ends before the last has begun.
    tight = {"max_running": 5, "max_pass_rows": 16, "max_passes_per_beat": 1}
    tight["cache_bytes"] = least_memory(1, 200, **tight)
    engine = short_sighted(Engine(model(1), settings(**tight)))
    scheduler = engine._scheduler
    blt = DecodingParams(DecodingMethod.BLT)
    params = SamplingParams(max_tokens=150, min_tokens=150, ignore_eos=True, seed=1, decoding=blt)
    preempt, victims, order = scheduler.preempt, list[str](), list[str]()

    def watched(sequence: Sequence) -> None:
        assert sequence.request.priority == max(one.request.priority for one in scheduler.running)
        victims.append(sequence.request.request_id)
        preempt(sequence)

    monkeypatch.setattr(scheduler, "preempt", watched)

    def step() -> None:
        order.extend(delta.request_id for delta in engine.step() if delta.finish_reason is not None)

    # Short prompts and long outputs: admission cannot see the shortage coming.
    for i in range(4):
        engine.add(Request(f"r{i}", [1, 70 + i], params, 0.0, priority=3 - i))
        step()
    assert engine.stats().running == 4
    engine.add(Request("urgent", [1, 80], params, 0.0, priority=-1))
    while engine.has_work():
        step()
    assert engine.stats().preemptions == len(victims) > 0
    assert "urgent" not in victims and order.index("urgent") < order.index("r0")
    assert sorted(order) == ["r0", "r1", "r2", "r3", "urgent"]
