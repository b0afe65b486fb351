from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fastblt.benchmarks.harness import Output, complete, start, whole_length
from fastblt.benchmarks.savings.passes import CALL, FILTER, Recorder
from fastblt.benchmarks.settings import decoding
from fastblt.models.blt import Blt
from fastblt.server.engine.device.cost import DRAFT, STEP


@pytest.mark.parametrize(
    "method", ["blt", "blt-s k4", "blt-dv-{} 1step", "blt-d-{} a0.7", "blt-dsv-{} k8", "blt-dsv-{} k8 a0.3"]
)
def test_what_is_recorded_is_what_the_engine_counts(model: Blt, prompts: list[list[int]], method: str) -> None:
    """Rows of the decoder's passes, divided from calls of many, against those that the runner tells the controller."""
    setting = method.format(model.config.block_sizes[0])
    engine = start(model, 3)
    recorder, counted = Recorder(engine), Counter[int]()

    def after_step(outputs: list[Output]) -> None:
        counted.update(rows for module, rows in engine._runner.work if module in ("decoder", DRAFT, STEP))

    with recorder.on():
        params: list[Any] = [whole_length(decoding(setting), 24, seed=seed) for seed in range(3)]
        complete(engine, prompts[:3], params, after_step=after_step)
    passes = [done for done in recorder.take() if done.module == "decode"]
    assert Counter(done.rows for done in passes) == counted
    kinds = {done.inside for done in passes}
    assert kinds <= {"", STEP, DRAFT, CALL, FILTER} and (FILTER in kinds) == method.startswith("blt-dsv")
