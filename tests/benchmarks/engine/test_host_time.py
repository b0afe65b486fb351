from __future__ import annotations

import time

from fastblt.benchmarks.engine.host_time import Timer, compare
from fastblt.benchmarks.settings import with_diffusion
from fastblt.models.blt import Blt
from tests.tiny import random_ids


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_call_within_another_counts_once() -> None:
    timer = Timer()
    inner = timer.around(lambda: _work(0.02))

    def outer() -> None:
        inner()
        _work(0.02)

    timer.around(outer)()
    assert 0.04 <= timer.seconds < 0.06
    inner()
    assert timer.seconds >= 0.06


def test_host_time_of_every_method(model: Blt) -> None:
    rows = compare(model, [random_ids(seed, 24) for seed in range(4)], 20, (1, 4), 2)
    assert len(rows) == 2 * len(with_diffusion(model.config.block_sizes))
    for name, row in rows.items():
        assert row["alone"]["mean"] > 0 and row["beside"]["mean"] > 0, name
        assert row["requests_per_pass"] <= row["requests"]
        assert len(row["rounds"]) == 2 and row["alone"]["mean"] == min(row["rounds"])
    assert rows["blt, 1"]["requests_per_pass"] == 1
