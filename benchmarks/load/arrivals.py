"""When requests are sent: arrival times of open-loop load, which do not wait for answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastblt.benchmarks.load.names import Ramp


def arrivals(
    count: int,
    rate: float,
    burstiness: float = 1.0,
    seed: int = 0,
    *,
    ramp: Ramp | None = None,
    end_rate: float | None = None,
) -> NDArray[np.float64]:
    """Seconds [count] after the start at which requests arrive, at `rate` a second.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is more even,
    and infinity is a constant gap. An infinite `rate` sends everything at once. With a `ramp` the rate goes from `rate`
    to `end_rate` over the requests. Raises ValueError for rates and shapes that are not positive.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError("the request rate and the burstiness must be positive; inf is allowed")
    if ramp is None:
        rates = np.full(count, rate)
    elif end_rate is None or not 0 < end_rate < np.inf or rate == np.inf:
        raise ValueError("a ramp needs a positive, finite rate to begin with and another to end with")
    else:
        share = np.arange(count) / max(1, count - 1)
        rates = rate + (end_rate - rate) * share if ramp is Ramp.LINEAR else rate * (end_rate / rate) ** share
    if burstiness == np.inf:
        gaps = np.ones(count)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, count)
    gaps = gaps / rates
    # The first request starts the clock.
    return np.concatenate([[0.0], gaps.cumsum()[:-1]]) if count else gaps
