"""Progress, its absence, and how long that may last."""

from __future__ import annotations

import pytest

from fastblt.server.process.watchdog import Condition, Watchdog


@pytest.mark.parametrize("limit", [0.5, 3.0, 8.0, 60.0, 600.0])
def test_a_stall_is_seen_within_the_limit_and_given_up_at_twice(limit: float) -> None:
    watchdog = Watchdog(limit)
    looks, waited = [], []
    for _ in range(round(2 * limit / watchdog.interval)):
        looks.append(watchdog.look(False))
        waited.append(watchdog.waited)
    # One more interval may pass before the first look.
    stalled = waited[looks.index(Condition.STALLED)] + watchdog.interval
    hopeless = waited[looks.index(Condition.HOPELESS)]
    assert limit / 2 < stalled < limit and hopeless == pytest.approx(2 * limit, abs=watchdog.interval)
    assert watchdog.look(True) is Condition.FINE


def test_progress_now_and_then_is_enough() -> None:
    watchdog = Watchdog(8.0)
    assert all(watchdog.look(number % 5 == 0) is Condition.FINE for number in range(100))
