from __future__ import annotations

import pytest

from fastblt.benchmarks.savings.batches import Course, engine_of, engine_seconds
from fastblt.benchmarks.savings.cost_curve import CostCurve
from fastblt.benchmarks.savings.roofline import parts
from fastblt.models.blt import Blt


def test_methods_take_turns(model: Blt, prompts: list[list[int]]) -> None:
    engine = engine_of(model, prompts[:2], 12)
    curve = CostCurve.measure(engine, 2, budget=0.01, context=8, requests=2)
    assert curve.common.keys() == curve.seconds.keys()
    size = model.config.block_sizes[0]
    settings = ["blt", "blt-s k4", f"blt-dv-{size} 1step"]
    course = Course(engine, curve)
    for run in (course.round(settings, prompts[:2], 12) for _ in range(2)):
        assert list(run) == settings
        for name, batch in run.items():
            row = parts(batch, batch)
            # A pass takes its time from the run's, once.
            assert row["engine"] > 0 and sum(row["modules"].values()) + row["engine"] == pytest.approx(row["measured"])
            expected = sum(curve.predict(done) * batch.drift[done.module] for done in batch.passes)
            assert row["predicted_over_measured"] == pytest.approx(
                (expected + engine_seconds(batch) * sum(done.module == "decode" for done in batch.passes))
                / batch.seconds
            )
            rows = {done.rows for done in batch.passes if done.module == "decode"}
            # Two requests, one row each where nothing is drafted.
            assert (max(rows) <= 2) == (name == "blt")


def test_a_recorder_forgets(model: Blt, prompts: list[list[int]]) -> None:
    engine = engine_of(model, prompts[:1], 4)
    curve = CostCurve.measure(engine, 1, budget=0.01)
    course = Course(engine, curve)
    course.round(["blt"], prompts[:1], 4)
    assert course.recorder.take() == []
    # What measures the curve is no pass of a request.
    curve.drift(engine)
    assert course.recorder.take() == []
