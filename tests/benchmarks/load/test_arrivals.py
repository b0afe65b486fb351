from __future__ import annotations

import numpy as np
import pytest

from fastblt.benchmarks.load.arrivals import arrivals
from fastblt.benchmarks.load.names import Ramp


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, np.inf])
def test_rate_and_burstiness_are_what_was_asked_for(burstiness: float) -> None:
    times = arrivals(20_000, rate=5.0, burstiness=burstiness, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    # The coefficient of variation of a gamma distribution.
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, abs=0.05)


@pytest.mark.parametrize(("ramp", "middle"), [(Ramp.LINEAR, 5.5), (Ramp.EXPONENTIAL, 10**0.5)])
def test_a_ramp_goes_from_one_rate_to_the_other(ramp: Ramp, middle: float) -> None:
    times = arrivals(1001, 1.0, np.inf, ramp=ramp, end_rate=10.0)
    rates = 1 / np.diff(times)
    assert rates[0] == pytest.approx(1.0) and rates[-1] == pytest.approx(10.0, rel=0.01)
    assert rates[500] == pytest.approx(middle, rel=0.01)


def test_same_seed_same_arrivals_and_no_rate_is_at_once() -> None:
    assert (arrivals(50, 2.0, seed=3) == arrivals(50, 2.0, seed=3)).all()
    assert (arrivals(50, 2.0, seed=3) != arrivals(50, 2.0, seed=4)).any()
    assert not arrivals(50, np.inf).any() and len(arrivals(0, 1.0)) == 0


@pytest.mark.parametrize(("rate", "burstiness", "end"), [(0.0, 1.0, None), (1.0, 0.0, None), (np.inf, 1.0, 2.0)])
def test_what_means_nothing_is_refused(rate: float, burstiness: float, end: float | None) -> None:
    with pytest.raises(ValueError, match="rate"):
        arrivals(3, rate, burstiness, ramp=Ramp.LINEAR if end else None, end_rate=end)
