from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastblt.server.engine.round_time import RoundTime, shares


@given(st.floats(0.7, 2.5), st.floats(1e-5, 1e-3), st.integers(0, 9))
def test_pace_and_own_time_are_found_from_rounds_that_differ(pace: float, each: float, seed: int) -> None:
    time, rng = RoundTime(), random.Random(seed)
    for _ in range(200):
        requests, passes = rng.choice([1, 4, 8, 32]), rng.choice([1e-3, 5e-3, 2e-2])
        steps = rng.choice([1, 9])
        time.count(passes, shares(steps, requests), pace * passes + each * steps * (requests + 1))
    expected = pace * 1e-2 + each * 9
    assert time.seconds(1e-2, shares(1, 8)) == pytest.approx(expected, rel=0.15)


def test_a_round_without_passes_tells_nothing() -> None:
    time = RoundTime()
    first = time.seconds(1e-2, shares(1, 32))
    time.count(0.0, shares(1, 1), 1.0)
    assert time.seconds(1e-2, shares(1, 32)) == first


def test_rounds_of_one_kind_tell_what_they_take_in_all() -> None:
    time = RoundTime()
    for _ in range(50):
        time.count(1e-2, shares(1, 8), 1.5e-2)
    assert time.seconds(1e-2, shares(1, 8)) == pytest.approx(1.5e-2, rel=0.05)
