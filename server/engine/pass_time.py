"""What the next pass will take: predicted from the cost curves measured at the start, corrected by what passes took.

Prompts and decoding requests share passes, so nobody sees what either took alone. Each is expected to take what the
curves say of its rows, times a correction of its own. A Kalman filter learns both from what steps took in all: of an
error it puts down more to what makes more of the step, and to what is less well known.

A pass costs time, not rows: 100 rows of a prompt are nothing to one model and seconds to another. So the prompts that
are computed beside decoding requests get the rows that fit into `EngineSettings.max_gap_ms`, the longest gap between
two bytes that people who watch a text should see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastblt.server.engine.device.cost import Costs

if TYPE_CHECKING:
    from fastblt.server.engine.runner.model_runner import ModelRunner

#: Part of a pass that prompts get, however long decoding requests take, so that these cannot keep others from their
#: first byte.
_LEAST_SHARE = 0.25
#: A pass has a cost of its own, mostly the weights that it reads. Prompts get so many times that at least, so that
#: most of their time is spent on rows, also where a pass of one row takes longer than the bound.
_TIMES_FIXED = 3.0
#: Weight of the newest step in the running mean of what decoding requests take.
_NEWEST = 0.3
#: A pass that takes so many times its bound is late.
_LATE = 1.5
#: More rows than any pass has for free.
_MOST_WORTH = 4096
#: Part of a step beside its prompts from which on what it takes is known well, and passes with prompts after which
#: it is known what those take.
_LEAST_KNOWN, _TAUGHT = 0.6, 4
#: Bounds of the corrections, and of one step's error as a logarithm: what is further off is no pass, but a machine that
#: stood still.
_SCALES, _MOST_OFF = (0.1, 20.0), 1.0
#: Variances, of logarithms: how far off both corrections may be at first, and how much of that is the same for both,
#: since a machine that is slower than its curves is so for all rows; what they change from step to step; and what the
#: time of a step of the longest kind wavers.
_AT_FIRST, _COMMON, _CHANGE, _NOISE = 1.0, 0.8, 0.005, 0.04

#: The position and the row counts at which the costs of passes are measured; and, for what depth adds to the cost of
#: the global transformer, a patch deep in a text and a number of rows.
_COST_CONTEXT, _COST_ROWS = 512, (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DEEP_PATCH, _DEEP_ROWS = 4096, 8


def measure_costs(runner: ModelRunner, max_length: int) -> tuple[Costs, float]:
    """Measure the modules' cost curves, and the seconds that a row of the global transformer takes more for every patch
    before it. No request is longer than `max_length`."""
    position, patch, deep = (min(at, max_length - 1) for at in (_COST_CONTEXT, _COST_CONTEXT // 4, _DEEP_PATCH))
    costs = runner.costs(position, patch, _COST_ROWS)
    further = runner.costs(position, deep, (_DEEP_ROWS,))["global"](_DEEP_ROWS)
    more = further - costs["global"](_DEEP_ROWS)
    return costs, max(more, 0.0) / (_DEEP_ROWS * max(deep - patch, 1))


class PassTime:
    """Seconds of passes. `costs` are the modules' curves, `per_depth` the seconds that a row of the global transformer
    takes more for every patch before it, `bound` the seconds that a pass with prompts should take in all.
    """

    def __init__(self, costs: Costs, per_depth: float, bound: float) -> None:
        self._costs = costs
        self._per_depth = per_depth
        self.bound = bound
        self._fixed = self.rows_seconds(1, 1.0)
        #: What the rows of prompts take over what the curves say, and what those of decoding requests do; variances of
        #: the logarithms of both, and their covariance.
        self._scale = self._pace = 1.0
        self._scale_variance = self._pace_variance = _AT_FIRST
        self._covariance = _COMMON * _AT_FIRST
        #: What the decoding requests take of a step, a running mean.
        self._decoding = 0.0
        #: Passes with prompts, and how many of them took clearly longer than they should have.
        self.passes = self.late = 0
        # Since the last step after which no prompt was held: seconds, the longest step, what its prompts and what all
        # others take by the curves, and steps.
        self._seconds = self._longest = self._prompts = self._others = 0.0
        self._steps = 0

    def allowed(self, *, decoding: bool) -> float:
        """Seconds, by the curves, that prompts may take in the next pass; `decoding`: whether others decode in it."""
        fixed = _TIMES_FIXED * self._fixed * self._scale
        if not decoding:
            return max(self.bound, fixed) / self._scale
        least = self._decoding * _LEAST_SHARE / (1 - _LEAST_SHARE)
        return max(self.bound - self._decoding, least, fixed) / self._scale

    def rows_seconds(self, rows: float, patches_per_byte: float) -> float:
        """Seconds of all modules over `rows` bytes, near the start of a text."""
        costs = self._costs
        local = costs["patcher"](rows) + costs["encoder"](rows) + costs["decoder"](rows)
        return local + costs["global"](rows * patches_per_byte)

    def depth_seconds(self, position: int, rows: int, patches_per_byte: float) -> float:
        """What `rows` bytes from `position` on take more than at the start, since their patches look at all before."""
        patches = rows * patches_per_byte
        return self._per_depth * patches * (position * patches_per_byte + patches / 2)

    def prompt_seconds(self, rows: int, patches_per_byte: float) -> float:
        """Seconds of a whole prompt of `rows` bytes alone."""
        near = self.rows_seconds(rows, patches_per_byte)
        return self._scale * (near + self.depth_seconds(0, rows, patches_per_byte))

    def without_prompts(self, seconds: float, prompts: float) -> float | None:
        """What a step of `seconds` took beside its prompts, for which the curves give `prompts` seconds; None if that
        is not known well: those took most of it, or the first ones have not shown yet what prompts take here."""
        if not prompts:
            return seconds
        own = seconds - self._scale * prompts
        return own if self.passes >= _TAUGHT and own >= _LEAST_KNOWN * seconds else None

    def worth_waiting(self) -> int:
        """Rows that take as long as one more pass: so many must be spared by waiting for somebody else's pass."""
        rows = 1
        while rows < _MOST_WORTH and self.rows_seconds(rows, 0.25) < 2 * self._fixed:
            rows *= 2
        return rows

    def step_ended(
        self, seconds: float, prompts: PromptBudget, work: Iterable[tuple[str, int]], *, decoding: bool, held: bool
    ) -> None:
        """A step took `seconds` for the `work`, passes as (module, rows); `prompts` is what was planned of prompts in
        it. `decoding`: whether others decoded. `held`: some prompts wait for the next upstream pass, and a later step
        will compute the rest of them."""
        self._seconds += seconds
        self._longest = max(self._longest, seconds)
        self._prompts += prompts.seconds
        if decoding:
            self._others += self._work_seconds(work) - prompts.near_seconds
        self._steps += 1
        if held:
            return
        expected = self._scale * self._prompts
        if expected:
            self.passes += 1
            self.late += self._longest > _LATE * max(self.bound, _TIMES_FIXED * self._fixed * self._scale)
        self._learn(expected, self._pace * max(self._others, 0.0))
        self._seconds = self._longest = self._prompts = self._others = 0.0
        self._steps = 0

    def _work_seconds(self, work: Iterable[tuple[str, int]]) -> float:
        """What passes take by the curves. Steps that are not measured apart are passes of the decoder."""
        costs = self._costs
        times = Counter(work).items()
        return sum(count * costs.get(kind, costs["decoder"])(rows) for (kind, rows), count in times)

    def _learn(self, prompts: float, others: float) -> None:
        """Correct what prompts and decoding requests are expected to take, which of these steps was so much."""
        expected = prompts + others
        if not expected or self._seconds <= 0:
            return
        share, rest = prompts / expected, others / expected
        self._scale_variance += _CHANGE * share
        self._pace_variance += _CHANGE * rest
        # Covariances of a step's error with that of either correction.
        with_scale = share * self._scale_variance + rest * self._covariance
        with_pace = share * self._covariance + rest * self._pace_variance
        # The time of a small step is mostly not its rows'.
        noise = _NOISE / min(self._seconds / self.bound, 1.0)
        gain = 1 / (share * with_scale + rest * with_pace + noise)
        off = min(max(math.log(self._seconds / expected), -_MOST_OFF), _MOST_OFF)
        self._scale = _bounded(self._scale * math.exp(gain * with_scale * off))
        self._pace = _bounded(self._pace * math.exp(gain * with_pace * off))
        self._scale_variance -= gain * with_scale**2
        self._pace_variance -= gain * with_pace**2
        self._covariance -= gain * with_scale * with_pace
        if others:
            self._decoding += _NEWEST * (others * math.exp(gain * with_pace * off) / self._steps - self._decoding)


def _bounded(scale: float) -> float:
    return min(max(scale, _SCALES[0]), _SCALES[1])


class PromptBudget:
    """What prompts may still take of the next pass: rows, and seconds where these are known."""

    def __init__(self, rows: int, time: PassTime | None = None, seconds: float = 0.0, patches_per_byte: float = 0.5):
        self._rows = rows
        self._time = time
        self._seconds = seconds
        self._per_byte = patches_per_byte
        self._used = 0
        self._deep = 0.0

    def fit(self, position: int, wanted: int, kept: float = 0.0) -> int:
        """How many of `wanted` rows from `position` on there is room for, with the part `kept` of all left alone."""
        most = min(wanted, int(self._rows * (1 - kept)) - self._used)
        if self._time is None or most <= 0 or self._seconds_with(position, most) <= self._seconds * (1 - kept):
            return max(most, 0)
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            if self._seconds_with(position, middle) <= self._seconds * (1 - kept):
                low = middle
            else:
                high = middle
        # Something goes on in every pass.
        return low if low or self._used else 1

    def take(self, position: int, rows: int) -> None:
        """Use rows from `position` on."""
        if self._time is not None:
            self._deep += self._time.depth_seconds(position, rows, self._per_byte)
        self._used += rows

    @property
    def seconds(self) -> float:
        """What was taken takes, by the curves; 0 where these are not known."""
        return self._deep + self.near_seconds

    @property
    def near_seconds(self) -> float:
        """What it would take near the start of a text."""
        return 0.0 if self._time is None or not self._used else self._base(self._used)

    def _base(self, rows: int) -> float:
        assert self._time is not None
        return self._time.rows_seconds(rows, self._per_byte)

    def _seconds_with(self, position: int, rows: int) -> float:
        assert self._time is not None
        deep = self._time.depth_seconds(position, rows, self._per_byte)
        return self._deep + deep + self._base(self._used + rows)
