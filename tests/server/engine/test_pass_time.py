"""A pass with prompts takes about as long as it should, on any machine, and prompts always get a part of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.server.engine.device.cost import MODULES, CostCurve, Costs
from fastblt.server.engine.pass_time import PassTime, PromptBudget


def curves(fixed: float, each: float) -> Costs:
    return {name: CostCurve((1, 256), (fixed + each, fixed + 256 * each)) for name in MODULES}


def work(costs: Costs, prompts: PromptBudget, decoding: int, passes: int = 1) -> list[tuple[str, int]]:
    """Passes of a step over rows of prompts and of so many decoding requests: all modules once, then the decoder."""
    rows = prompts._used + decoding
    small = [(name, rows) for name in ("patcher", "encoder", "decoder") if rows]
    upstream = [("global", rows // 4)] if rows >= 4 else []
    return small + upstream + [("decoder", decoding)] * (passes - 1)


def seconds(costs: Costs, work: list[tuple[str, int]]) -> float:
    return sum(costs[module](rows) for module, rows in work)


@given(
    st.floats(1e-6, 0.2),
    st.floats(1e-7, 1e-2),
    st.floats(0, 1e-6),
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 30_000)), min_size=1, max_size=6),
)
def test_what_fits_is_as_much_as_the_time_allows(
    fixed: float, each: float, per_depth: float, prompts: list[tuple[int, int]]
) -> None:
    pass_time = PassTime(curves(fixed, each), per_depth, 0.1)
    seconds = pass_time.allowed(decoding=False)
    assert seconds >= 0.1
    budget = PromptBudget(2048, pass_time, seconds, 0.25)
    given_rows = 0
    for position, wanted in prompts:
        rows = budget.fit(position, wanted)
        assert 0 <= rows <= min(wanted, 2048 - given_rows)
        if rows:
            budget.take(position, rows)
        given_rows += rows
        if rows < min(wanted, 2048 - given_rows + rows):
            # One row more would take too long.
            more = PromptBudget(2048, pass_time, seconds, 0.25)
            more._used, more._deep = budget._used, budget._deep
            more.take(position + rows, 1)
            assert more.seconds > seconds
    assert given_rows
    # Only a single row may take longer.
    assert budget.seconds <= seconds or given_rows == 1


def test_rows_alone_bound_a_pass_whose_time_is_not_known() -> None:
    budget = PromptBudget(100)
    assert budget.fit(0, 500) == 100
    assert budget.fit(0, 500, kept=0.25) == 75
    budget.take(0, 75)
    assert (budget.fit(0, 500, kept=0.25), budget.fit(0, 500), budget.seconds) == (0, 25, 0.0)


NOTHING = PromptBudget(0)


def prompts_of(pass_time: PassTime, *, decoding: bool) -> PromptBudget:
    """Prompts that take all the time there is for them."""
    budget = PromptBudget(10**6, pass_time, pass_time.allowed(decoding=decoding), 0.25)
    budget.take(0, budget.fit(0, 10**6))
    return budget


@settings(deadline=None)
@given(st.floats(0.4, 4.0), st.floats(0.5, 2.5), st.integers(1, 40), st.booleans())
def test_what_prompts_and_others_take_is_learned_though_they_share_passes(
    scale: float, apart: float, most: int, alone: bool
) -> None:
    """A machine that is faster or slower than its curves say, otherwise for prompts than for drafts: what prompts take
    is known roughly where every step has some, and well where some steps have none."""
    pace, costs = scale * apart, curves(1e-4, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    for step in range(80):
        budget = prompts_of(pass_time, decoding=step > 0)
        made = work(costs, budget, min(step, most), passes=33)
        others = seconds(costs, made) - budget.near_seconds
        took = scale * budget.seconds + pace * others
        pass_time.step_ended(took, budget, made, decoding=step > 0, held=False)
        if alone and step % 4 == 3:
            made = work(costs, NOTHING, most, passes=33)
            pass_time.step_ended(pace * seconds(costs, made), NOTHING, made, decoding=True, held=False)
    assert 1 / 1.6 < pass_time._scale / scale < 1.6
    if alone:
        assert 0.95 < pass_time._scale / scale < 1.05


def test_a_machine_that_stands_still_once_is_soon_forgotten() -> None:
    costs = curves(1e-4, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    for step in range(60):
        budget = prompts_of(pass_time, decoding=True)
        made = work(costs, budget, 8, passes=33)
        pass_time.step_ended(seconds(costs, made) + 3 * (step == 40), budget, made, decoding=True, held=False)
        assert pass_time._scale < 1.6
    assert 0.9 < pass_time._scale < 1.1


def test_what_passes_really_take_is_learned() -> None:
    """A machine that is three times as slow as its curves say; 40 ms for those who decode."""
    costs = curves(1e-3, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    for _ in range(60):
        budget = prompts_of(pass_time, decoding=True)
        made = work(costs, budget, 1, passes=34)
        took = 0.04 + 3 * budget.seconds
        pass_time.step_ended(took, budget, made, decoding=True, held=False)
        pass_time.step_ended(0.04, NOTHING, work(costs, NOTHING, 1, passes=34), decoding=True, held=False)
    assert abs(took - 0.1) < 0.01
    assert pass_time.late < pass_time.passes == 60
    # What a step takes beside its prompts is known where that is most of it.
    own = pass_time.without_prompts(0.05, 0.01 / 3)
    assert own is not None and abs(own - 0.04) < 1e-3
    assert pass_time.without_prompts(took, budget.seconds) is None


def test_what_a_step_took_beside_its_prompts_is_not_known_from_the_first_one_on() -> None:
    costs = curves(1e-3, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    budget = PromptBudget(10**6, pass_time, 0.01, 0.25)
    budget.take(0, budget.fit(0, 10**6))
    for passes in range(6):
        assert (pass_time.without_prompts(0.05, budget.seconds) is not None) == (passes >= 4)
        assert pass_time.without_prompts(0.05, 0.0) == 0.05
        pass_time.step_ended(0.05, budget, work(costs, budget, 1, passes=41), decoding=True, held=False)


def test_decoding_requests_leave_prompts_a_quarter() -> None:
    costs = curves(1e-3, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    for _ in range(60):
        pass_time.step_ended(0.9, NOTHING, [("decoder", 1)] * 891, decoding=True, held=False)
    assert pass_time.allowed(decoding=True) == pytest.approx(0.3, rel=0.03)
    assert pass_time.allowed(decoding=False) == pytest.approx(0.1, rel=0.01)


def test_a_pass_that_reads_many_weights_is_used_well() -> None:
    """Where one row takes 2 s, prompts get enough rows to be worth a pass."""
    pass_time = PassTime(curves(0.5, 1e-3), 0.0, 0.1)
    budget = PromptBudget(2048, pass_time, pass_time.allowed(decoding=True), 0.25)
    assert budget.fit(0, 10_000) > 500


def test_parts_of_a_pass_in_two_steps_count_together() -> None:
    """Prompts planned in one step and computed in a later one, after a beat of others."""
    costs = curves(1e-3, 1e-5)
    pass_time = PassTime(costs, 0.0, 0.1)
    for _ in range(40):
        budget = prompts_of(pass_time, decoding=False)
        made = work(costs, budget, 0)
        pass_time.step_ended(budget.seconds, budget, made[:2], decoding=False, held=True)
        pass_time.step_ended(budget.seconds, NOTHING, made[2:], decoding=False, held=False)
    assert abs(2 * budget.seconds - 0.1) < 0.01
