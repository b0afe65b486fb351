"""Progress, its absence, and how long that may last."""

from __future__ import annotations

import pytest

from fastblt.server.process.watchdog import Condition, Watchdog


@pytest.mark.parametrize("limit", [0.5, 3.0, 8.0, 60.0, 600.0])
def test_a_stall_is_seen_within_the_limit_and_given_up_within_twice(limit: float) -> None:
    watchdog = Watchdog(limit)
    looks = [watchdog.look(False) for _ in range(round(2 * limit / watchdog.interval))]
    # One more interval may pass before the first look.
    stalled = (looks.index(Condition.STALLED) + 2) * watchdog.interval
    hopeless = (looks.index(Condition.HOPELESS) + 2) * watchdog.interval
    assert limit / 2 < stalled < limit and 1.2 * limit < hopeless < 2 * limit
    assert watchdog.look(True) is Condition.FINE


def test_progress_now_and_then_is_enough() -> None:
    watchdog = Watchdog(8.0)
    assert all(watchdog.look(number % 5 == 0) is Condition.FINE for number in range(100))
