from __future__ import annotations

from dataclasses import replace

import pytest

from fastblt.benchmarks.savings.cost_curve import CostCurve, Recorder
from fastblt.benchmarks.savings.methods import BLT, batch_settings, diffusion, speculation
from fastblt.benchmarks.savings.roofline import in_turns, parts
from fastblt.models.blt import Blt
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod


def test_methods_take_turns(model: Blt, prompts: list[list[int]]) -> None:
    engine = Engine(model, replace(batch_settings(prompts[:2], 12), prefix_cache=False))
    curve = CostCurve.measure(engine, 2, budget=0.01, context=8, requests=2)
    assert curve.common.keys() == curve.seconds.keys()
    size = model.config.block_sizes[0]
    settings = {"blt": BLT, "blt-s k4": speculation(4), "blt-dv": diffusion(DecodingMethod.BLT_DV, size, "1step")}
    runs = in_turns(engine, curve, Recorder(engine), settings, prompts[:2], 12, 2)
    assert {name: len(own) for name, own in runs.items()} == dict.fromkeys(settings, 2)
    for name, own in runs.items():
        for batch in own:
            row = parts(batch)
            # A pass takes its time from the run's, once.
            assert row["engine"] > 0 and sum(row["modules"].values()) + row["engine"] == pytest.approx(row["measured"])
            expected = sum(curve.predict(done) * batch.drift[done.module] for done in batch.passes)
            assert row["predicted_over_measured"] == pytest.approx(expected / batch.seconds)
            rows = {done.rows for done in batch.passes if done.module == "decode"}
            # Two requests, one row each where nothing is drafted.
            assert (max(rows) <= 2) == (name == "blt")


def test_a_recorder_forgets(model: Blt, prompts: list[list[int]]) -> None:
    engine = Engine(model, replace(batch_settings(prompts[:1], 4), prefix_cache=False))
    curve = CostCurve.measure(engine, 1, budget=0.01)
    recorder = Recorder(engine)
    in_turns(engine, curve, recorder, {"blt": BLT}, prompts[:1], 4, 1)
    assert recorder.take() == []
    # What measures the curve is no pass of a request.
    curve.drift(engine)
    assert recorder.take() == []
