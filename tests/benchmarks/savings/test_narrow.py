from __future__ import annotations

import pytest

from fastblt.benchmarks.savings.batches import Batch, engine_seconds, predicted
from fastblt.benchmarks.savings.passes import Pass


def batch(seconds: float, by_curve: float, *passes: Pass) -> Batch:
    return Batch([], seconds, 1, list(passes), by_curve, {}, [], [])


def test_a_prediction_has_the_engines_time_of_another_run() -> None:
    early = batch(10.0, 6.0, Pass("decode", 1, 3.0), Pass("decode", 4, 4.0), Pass("logits", 1, 1.0))
    assert engine_seconds(early) == pytest.approx(1.0)
    late = batch(99.0, 7.0, *[Pass("decode", 1, 3.0)] * 5, Pass("upstream", 1, 3.0))
    assert predicted(late, early) == pytest.approx(12.0)
