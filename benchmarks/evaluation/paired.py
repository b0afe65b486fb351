"""Intervals for two settings or checkpoints that were judged at the same places.

What one does at a hard place the other likely does too, so the places are resampled in pairs (the bootstrap, 95 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastblt.benchmarks.evaluation.journal import Record

_RESAMPLES = 4000


def share(ours: Sequence[bool], theirs: Sequence[bool]) -> Record:
    """How many of `ours` are right, as a share of how many of `theirs` are, with its interval."""
    return _interval(ours, theirs, lambda one, other: one / np.maximum(other, 1))


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Record:
    """The share of `ours` that is right minus that of `theirs`, with its interval."""
    return _interval(ours, theirs, lambda one, other: (one - other) / len(ours))


def _interval(ours: Sequence[bool], theirs: Sequence[bool], figure: Callable[[NDArray, NDArray], NDArray]) -> Record:
    both = np.stack([np.asarray(ours, float), np.asarray(theirs, float)], 1)
    places = len(both)
    # How often each place is drawn, in every resample.
    drawn = np.random.default_rng(0).multinomial(places, np.full(places, 1 / places), _RESAMPLES)
    low, high = np.quantile(figure(*(drawn @ both).T), (0.025, 0.975))
    [value] = figure(*both.sum(0, keepdims=True).T)
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
