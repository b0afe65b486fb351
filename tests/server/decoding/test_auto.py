"""`auto` gives the bytes of BLT, whatever it is told to draft."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.server.decoding.auto import Auto, Draft
from fastblt.server.decoding.method import Outcome
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams
from tests.server.harness import (
    MODELS,
    Fickle,
    fickle,
    model,
    random_params,
    random_request,
    run,
    settings,
    with_method,
)

AUTO = DecodingParams(DecodingMethod.AUTO)


def fickle_engine(which: int, seed: int, **changes: object) -> tuple[Engine, Fickle]:
    engine = Engine(model(which), settings(**changes))
    return engine, fickle(engine, seed)


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(strategies.integers(0, 2**32))
def test_no_draft_changes_a_byte(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    base = random_request(rng, "blt", random_params(rng, decoding=DecodingParams(DecodingMethod.BLT)))
    plain = run(Engine(model(which), settings()), [base])["blt"]
    engine, _ = fickle_engine(which, seed)
    others = [random_request(rng, f"other{i}") for i in range(2)]
    done = run(engine, [with_method(base, "a", AUTO), with_method(base, "b", AUTO), *others], [0, 3, 1, 5])
    for name in ("a", "b"):
        assert (done[name].ids, done[name].reason) == (plain.ids, plain.reason)


def test_every_kind_of_draft_takes_part() -> None:
    rng = random.Random(5)
    params = replace(random_params(rng, decoding=AUTO), max_tokens=160, min_tokens=160, stop=(), ignore_eos=True)
    request = random_request(rng, "auto", params)
    engine, controller = fickle_engine(1, 5)
    done = run(engine, [request])["auto"]
    assert controller.named == set(controller.drafts)
    assert len(done.ids) == 160
    plain = run(Engine(model(1), settings()), [with_method(request, "blt", DecodingParams(DecodingMethod.BLT))])
    assert done.ids == plain["blt"].ids


class Given:
    """Drafts that are given, and the rounds that ended."""

    def __init__(self, *drafts: Draft) -> None:
        self._drafts = iter(drafts)
        self.rounds: list[Draft] = []

    def next(self) -> Draft:
        return next(self._drafts)

    def ended(self, draft: Draft) -> None:
        self.rounds.append(draft)


def test_a_round_keeps_its_draft_to_the_end() -> None:
    """And the first pass, as one after a preemption, drafts nothing."""
    drafts = Given(Draft(DecodingMethod.BLT_S, 2), Draft(DecodingMethod.BLT_DV, 4))
    auto = Auto(drafts)
    assert auto.plan(10, 0, 50).causal == 10
    assert auto.advance(auto.plan(10, 0, 50), Outcome(ids=[7])).commit == [7]
    for drafted in (8, 9):
        plan = auto.plan(11, 10, 49)
        assert plan.draft and plan.causal == 1
        auto.advance(plan, Outcome(ids=[drafted]))
    verification = auto.plan(11, 10, 49)
    assert verification.samples == 3
    # Who waits for others is planned again: its next draft stays, and is asked for once.
    verification = auto.plan(11, 10, 49)
    assert drafts.rounds == []
    auto.advance(verification, Outcome(ids=[8, 5], accepted=1))
    assert drafts.rounds == [Draft(DecodingMethod.BLT_S, 2)]
    assert len(auto.plan(13, 12, 47).block_ids) == 4
    auto.reset()
    assert not auto.plan(13, 0, 47).draft
