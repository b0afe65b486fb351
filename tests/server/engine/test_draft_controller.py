"""The controller of `auto`, against acceptances that are replayed to it and costs that are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastblt.models.config import BltConfig
from fastblt.server.decoding.auto import Draft
from fastblt.server.engine.device.cost import DRAFT, MODULES, CostCurve, Costs, filter_of
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.engine.scheduler import Text
from fastblt.server.request import DecodingMethod
from tests.server.harness import model

BLT = Draft()
#: Of requests so long that only their rounds count.
TEXT = Text(0.25, 1e9)


def curves(fixed: float, row: float) -> Costs:
    """A pass costs `fixed` seconds and `row` for every row; the global transformer three times as much."""
    rows = (1, 1024)
    return {
        name: CostCurve(rows, tuple((3 if name == "global" else 1) * (fixed + row * n) for n in rows))
        for name in MODULES
    }


def config(**changes: object) -> BltConfig:
    base = model(1).config
    assert base.block_sizes
    return base if not changes else base.__class__(**{**vars(base), **changes})


def began(controller: DraftController, requests: int) -> Draft:
    """What the rounds of all requests draft that begin now."""
    drafts = {controller.next() for _ in range(requests)}
    (draft,) = drafts
    return draft


def ended(controller: DraftController, draft: Draft, requests: int) -> None:
    """The rounds of all requests end."""
    for _ in range(requests):
        controller.ended(draft)


def replay(
    controller: DraftController, right: Callable[[Draft, int], float], requests: int, rounds: int = 3000
) -> Draft:
    """Rounds whose bytes are right with the probability right(draft, position); what is drafted at the end."""
    rng = random.Random(0)
    for step in range(rounds):
        draft = controller.next()
        controller.ended(draft)
        kind = draft
        if draft.method == DecodingMethod.BLT_DSV:
            # Its blocks are as right as BLT-DV's, and its drafts are those of BLT-S.
            block, kind = Draft(DecodingMethod.BLT_DV, draft.block), Draft(DecodingMethod.BLT_S, draft.length)
            passed = 0
            while passed < draft.block - 1 and rng.random() < right(block, passed):
                passed += 1
            controller.filtered(draft, draft.block - 1, passed)
        accepted = 0
        while accepted < draft.length and rng.random() < right(kind, accepted):
            accepted += 1
        if draft.length:
            controller.round_ended(draft, draft.length, accepted)
        if step % requests == requests - 1:
            controller.step_ended(requests, lambda: TEXT, None, [])
    return controller.best


def timed(controller: DraftController, own: float, requests: int, slow: tuple[Draft, ...] = ()) -> Draft:
    """Rounds of all requests together, which take what the curves say and `own` seconds more for each step, those of
    `slow` drafts twice as long; what is drafted at the end."""
    for _ in range(500):
        draft = began(controller, requests)
        passes, steps, _ = controller._round(draft, requests)
        seconds = (passes + steps * own) * (2 if draft in slow else 1)
        for left in range(round(steps) - 1, -1, -1):
            ended(controller, draft, 0 if left else requests)
            controller.step_ended(requests, lambda: TEXT, seconds / round(steps), [])
    return controller.best


def test_short_requests_that_are_many_prefer_short_rounds() -> None:
    """They wait for rounds of others and end within a last one, each time the longer the longer rounds are."""
    costs = curves(1e-3, 1e-5) | {DRAFT: CostCurve((1, 32), (1e-4, 1e-4))}

    def longest(requests: int, output: float) -> int:
        controller = DraftController(config(), costs)
        for _ in range(1000):
            controller.round_ended(Draft(DecodingMethod.BLT_S, 32), 32, 32)
        controller.step_ended(requests, lambda: Text(0.25, output), None, [("decoder", 1)] * 500)
        return max((one for one in controller.drafts if one.method == DecodingMethod.BLT_S), key=controller.rate).length

    assert longest(1, 24.0) == longest(1, 1e9)
    assert longest(16, 24.0) < longest(16, 1e9)


def test_weights_dominate_and_drafts_are_right() -> None:
    """One pass costs the same whatever it carries: the longest drafts of the longest blocks beat everything."""
    controller = DraftController(config(), curves(1e-3, 1e-9))
    best = replay(controller, lambda draft, at: 0.99, 1)
    assert best == Draft(DecodingMethod.BLT_DSV, 32, max(config().block_sizes))


def test_blocks_that_the_decoder_refuses_do_not_draft() -> None:
    """Where single rows are right and blocks are not, BLT-DSV takes two passes for every two bytes: BLT-S is better."""
    costs = curves(1e-4, 1e-5) | {"global": CostCurve((1, 64), (5e-3, 5e-3))}
    right = {DecodingMethod.BLT_S: 0.95, DecodingMethod.BLT_DV: 0.02}
    assert replay(DraftController(config(), costs), lambda draft, at: right[draft.method], 1).method == (
        DecodingMethod.BLT_S
    )
    # And the other way round where blocks are right, too.
    right[DecodingMethod.BLT_DV] = 0.9
    assert replay(DraftController(config(), costs), lambda draft, at: right[draft.method], 1).method == (
        DecodingMethod.BLT_DSV
    )


def test_what_a_whole_filtered_draft_takes_counts_and_not_its_single_passes() -> None:
    """Where one call makes the draft, its inner rounds may take far less than passes that are asked for one by one."""
    costs = curves(1e-3, 1e-4) | {"global": CostCurve((1, 64), (5e-3, 5e-3)), DRAFT: CostCurve((1, 64), (2e-4, 2e-2))}
    right = {DecodingMethod.BLT_S: 0.97, DecodingMethod.BLT_DV: 0.7}
    slow = replay(DraftController(config(), costs), lambda draft, at: right[draft.method], 1)
    assert slow.method == DecodingMethod.BLT_S
    fused = {filter_of(size): CostCurve((1, 64), (3e-4, 3e-2)) for size in config().block_sizes}
    quick = replay(DraftController(config(), costs | fused), lambda draft, at: right[draft.method], 1)
    assert quick.method == DecodingMethod.BLT_DSV


def test_rounds_that_begin_together_try_another_draft_together_and_less_and_less_often() -> None:
    def tries(requests: int, steps: int) -> list[int]:
        """The steps in which another draft is tried."""
        controller = DraftController(config(), curves(1e-3, 1e-4))
        controller.step_ended(requests, lambda: TEXT, None, [("decoder", requests)] * 200)
        tried = []
        for step in range(steps):
            draft = began(controller, requests)
            if draft != controller.best:
                tried.append(step)
            ended(controller, draft, requests)
            controller.step_ended(requests, lambda: TEXT, None, [])
        return tried

    assert tries(1, 200) == [12, 13, 32, 33, 61, 62, 104, 105, 167, 168]
    assert tries(64, 60) == [3, 4, 10, 11, 19, 20, 32, 33, 50, 51]


def test_what_cannot_be_better_is_tried_less_often() -> None:
    """As far as is known: from rounds that told what each kind takes, and how much of it is accepted."""
    controller = DraftController(config(), curves(1e-3, 1e-4))
    tried = []
    for step in range(4000):
        draft = began(controller, 1)
        ended(controller, draft, 1)
        if draft != controller.best:
            tried.append(step)
        if draft.length:
            controller.round_ended(draft, draft.length, 0)
        controller.step_ended(1, lambda: TEXT, None, [])
    early, late = sum(step < 200 for step in tried) / 200, sum(step >= 2000 for step in tried) / 2000
    assert 0 < late < early / 2


def test_a_choice_for_one_request_is_looked_at_again_when_there_are_many() -> None:
    """Within a few steps, not within the next sixteen."""

    def right(draft: Draft, at: int) -> float:
        return 0.8 if draft.method == DecodingMethod.BLT_DV else 0.1

    controller = DraftController(config(), curves(4e-3, 4e-4))
    replay(controller, right, 64, rounds=20_000)
    loaded = controller.best
    for _ in range(15):
        controller.step_ended(1, lambda: TEXT, 0.0, [("decoder", 1)] * 16)
    assert controller.best != loaded and controller.rate(controller.best) > 1.05 * controller.rate(loaded)


def test_nothing_drafted_is_right() -> None:
    controller = DraftController(config(), curves(1e-3, 1e-4))
    assert replay(controller, lambda draft, at: 0.02, 1) == BLT


def test_only_blt_s_is_right() -> None:
    """Where upstream is what costs, it drafts; its length is that where another byte costs more than it brings."""
    costs = curves(1e-4, 1e-5) | {"global": CostCurve((1, 64), (5e-3, 5e-3))}
    best = replay(
        DraftController(config(), costs), lambda draft, at: 0.95 if draft.method == DecodingMethod.BLT_S else 0.05, 1
    )
    assert best.method == DecodingMethod.BLT_S and best.length >= 4
    short = replay(
        DraftController(config(), costs),
        lambda draft, at: (0.95 if at < 2 else 0.1) if draft.method == DecodingMethod.BLT_S else 0.05,
        1,
    )
    assert short == Draft(DecodingMethod.BLT_S, 2)


def test_rows_become_dear_under_load() -> None:
    """Some of a draft is wasted: worth it while passes cost the same, not when every row does."""

    def right(draft: Draft, at: int) -> float:
        return 0.8 if draft.method == DecodingMethod.BLT_DV else 0.1

    costs = curves(2e-3, 1e-4)
    alone = replay(DraftController(config(), costs), right, 1)
    loaded = replay(DraftController(config(), costs), right, 64)
    assert alone.method == DecodingMethod.BLT_DV
    assert loaded.length < alone.length


def test_it_learns_that_the_checkpoint_was_wrong_and_back() -> None:
    told = config(acceptance={f"blt-dv-{size} 1step": 0.95 for size in config().block_sizes})
    controller = DraftController(told, curves(1e-3, 1e-6))
    assert controller.best.method == DecodingMethod.BLT_DV
    assert replay(controller, lambda draft, at: 0.05 if draft.method == DecodingMethod.BLT_DV else 0.4, 1) != (
        Draft(DecodingMethod.BLT_DV, max(told.block_sizes))
    )
    assert replay(controller, lambda draft, at: 0.99, 1, 6000).method in (DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV)


def test_a_cold_start_follows_the_checkpoint() -> None:
    costs, sizes = curves(1e-3, 1e-6), config().block_sizes
    good = DraftController(config(acceptance={f"blt-dv-{size} 1step": 0.9 for size in sizes}), costs)
    little = {f"blt-dv-{size} 1step": 0.01 for size in sizes} | {"blt-s k8": 0.01}
    assert good.best.method == DecodingMethod.BLT_DV
    assert DraftController(config(acceptance=little), costs).best == BLT


def test_a_cold_start_knows_what_a_filter_keeps_of_greedy_and_of_sampled_text() -> None:
    table = {"blt-s k32": 0.95, "blt-dv-4 1step": 0.3, "blt-dsv-4 k32": 0.9, "blt-dsv-4 k32 sampled": 0.1}
    for greedy, filtered in ((1.0, True), (0.0, False)):
        controller = DraftController(config(acceptance=table), curves(1e-3, 1e-6))
        controller.step_ended(1, lambda greedy=greedy: TEXT._replace(greedy=greedy), None, [])
        assert (controller.best == Draft(DecodingMethod.BLT_DSV, 32, 4)) == filtered


def test_small_gains_do_not_switch() -> None:
    """Two drafts that give the same but for noise: it settles on one."""
    controller = DraftController(config(), curves(1e-3, 1e-5))
    replay(controller, lambda draft, at: 0.5, 4)
    switches, before = 0, controller.best
    rng = random.Random(1)
    for _ in range(3000):
        draft = began(controller, 1)
        ended(controller, draft, 1)
        if draft.method == DecodingMethod.BLT_DSV:
            passed = 0
            while passed < draft.block - 1 and rng.random() < 0.5:
                passed += 1
            controller.filtered(draft, draft.block - 1, passed)
        accepted = 0
        while accepted < draft.length and rng.random() < 0.5:
            accepted += 1
        if draft.length:
            controller.round_ended(draft, draft.length, accepted)
        controller.step_ended(4, lambda: TEXT, rng.uniform(0, 2e-4), [])
        switches += controller.best != before
        before = controller.best
    assert switches <= 3


def test_without_a_diffusion_head() -> None:
    controller = DraftController(config(block_sizes=()), curves(1e-3, 1e-6))
    assert {draft.method for draft in controller.drafts} == {DecodingMethod.BLT, DecodingMethod.BLT_S}
    for _ in range(200):
        assert controller.next().method != DecodingMethod.BLT_DV


def test_the_engines_own_time_favors_few_passes() -> None:
    costs = curves(1e-4, 1e-6)
    costs = costs | {"global": CostCurve((1, 64), (2e-2, 2e-2))}
    quick, slow = DraftController(config(), costs), DraftController(config(), costs)
    timed(quick, 1e-4, 1)
    timed(slow, 1e-2, 1)
    many, few = Draft(DecodingMethod.BLT_S, 16), Draft(DecodingMethod.BLT_DV, 8)
    assert quick.rate(many) > quick.rate(few)
    assert slow.rate(many) < slow.rate(few)


@pytest.mark.parametrize("requests", [1, 32])
def test_drafts_that_take_longer_than_their_passes_are_left(requests: int) -> None:
    costs = curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))}
    controller = DraftController(config(), costs)
    first = controller.best
    assert timed(controller, 1e-4, requests) == first
    second = timed(DraftController(config(), costs), 1e-4, requests, (first,))
    assert second != first
    # All are slow in the same way: nothing is gained by leaving the better one.
    every = tuple(controller.drafts)
    assert timed(DraftController(config(), costs), 1e-4, requests, every).method == first.method


def test_a_round_is_timed_whole_where_steps_tell_nothing_in_between() -> None:
    """Rounds of two steps, one that drafts and one that verifies; each step may be mostly prompts and tell nothing."""
    costs = curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))}
    controller = DraftController(config(), costs)
    rng = random.Random(2)
    for _ in range(400):
        draft = began(controller, 32)
        passes, *_ = controller._round(draft, 32)
        for seconds in (0.1 * passes, 0.9 * passes):
            ended(controller, draft, 32 if seconds > 0.5 * passes else 0)
            controller.step_ended(32, lambda: TEXT, None if rng.random() < 0.4 else seconds, [])
    passes, _, made = controller._round(controller.best, 32)
    assert controller.rate(controller.best) == pytest.approx(32 * made / passes, rel=0.1)


def test_plans_that_wait_are_timed_where_they_run() -> None:
    """Of 32 requests two come anew each round: these draft first, in a short step, in which the others are planned."""
    costs = curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))}
    controller = DraftController(config(), costs)
    rng = random.Random(3)
    for _ in range(400):
        draft = began(controller, 32)
        passes, *_ = controller._round(draft, 32)
        if wait := rng.random() < 0.5:
            controller.step_ended(32, lambda: TEXT, 0.05 * passes, [])
        if wait and rng.random() < 0.5:
            began(controller, 2)
        ended(controller, draft, 32)
        controller.step_ended(32, lambda: TEXT, (0.95 if wait else 1.0) * passes, [])
    passes, _, made = controller._round(controller.best, 32)
    assert controller.rate(controller.best) == pytest.approx(32 * made / passes, rel=0.1)


def test_drafts_promise_what_they_gave_whatever_others_teach() -> None:
    """What passes take over the curves differs by the kind of draft here, so that no one correction fits all."""
    factors = {
        DecodingMethod.BLT: 1.0,
        DecodingMethod.BLT_S: 0.8,
        DecodingMethod.BLT_DV: 1.3,
        DecodingMethod.BLT_DSV: 1.2,
    }
    costs = curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))}
    controller = DraftController(config(), costs)
    took: dict[Draft, tuple[float, int]] = {}
    for _ in range(3000):
        draft = began(controller, 32)
        ended(controller, draft, 32)
        seconds = factors[draft.method] * controller._round(draft, 32)[0]
        took[draft] = seconds, took.get(draft, (0.0, 0))[1] + 1
        for _ in range(32):
            controller.round_ended(draft, draft.length, draft.length // 2)
        controller.step_ended(32, lambda: TEXT, seconds, [])
    known = {draft: took[draft][0] for draft, told in controller._told.items() if told.rounds > 5}
    assert len(known) >= 3
    for draft, seconds in known.items():
        assert controller.rate(draft) == pytest.approx(32 * controller._round(draft, 32)[2] / seconds, rel=0.1)


def test_a_round_is_timed_only_among_as_many_requests() -> None:
    """While requests come or go, nobody can tell how many shared a round, and the best draft would look slow."""
    controller = DraftController(config(), curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))})
    for requests in [1, 2, 4, 8, 16, 32, 16, 8, 4, 2] * 20:
        draft = began(controller, requests)
        ended(controller, draft, requests)
        controller.step_ended(requests, lambda: TEXT, 3 * controller._round(draft, requests)[0], [])
    assert not controller._told
    for _ in range(8):
        draft = began(controller, 32)
        ended(controller, draft, 32)
        controller.step_ended(32, lambda: TEXT, controller._round(draft, 32)[0], [])
    assert controller._told


def test_a_step_that_leaves_nobody_tells_nothing() -> None:
    """Where rounds take less than the curves say, nothing is left for the engine's own time."""
    controller = DraftController(config(), curves(1e-3, 1e-5) | {DRAFT: CostCurve((1,), (1e-4,))})
    for requests in [1] * 20 + [0] * 20:
        controller.ended(controller.next())
        controller.step_ended(requests, lambda: TEXT, 1e-9, [])
    assert controller.rate(controller.best) > 0


@given(data=st.data(), fused=st.booleans())
def test_whatever_steps_take_and_whoever_is_in_them_something_is_drafted(data: st.DataObject, fused: bool) -> None:
    costs = curves(0.0, 0.0) if data.draw(st.booleans()) else curves(1e-3, 1e-5)
    controller = DraftController(config(), costs | ({DRAFT: CostCurve((1,), (1e-4,))} if fused else {}))
    seconds = st.none() | st.sampled_from([0.0, 1e-9, 1e-3, 10.0])
    counts = st.integers(0, 64)
    for requests, new, over, taken in data.draw(st.lists(st.tuples(counts, counts, counts, seconds))):
        drafts = {controller.next() for _ in range(new)}
        assert len(drafts) == (new > 0) and drafts <= set(controller.drafts)
        ended(controller, data.draw(st.sampled_from(controller.drafts)), over)
        for draft in drafts:
            if draft.length:
                controller.round_ended(draft, draft.length, data.draw(st.integers(0, draft.length)))
            if draft.block:
                controller.filtered(draft, draft.block - 1, data.draw(st.integers(0, draft.block - 1)))
        controller.step_ended(requests, lambda: TEXT, taken, [("decoder", requests)])
        assert controller.rate(controller.best) >= 0
