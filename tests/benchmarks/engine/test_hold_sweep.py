from __future__ import annotations

import pytest

from fastblt.benchmarks.engine.hold_sweep import HOLDS, measure
from fastblt.models.blt import Blt
from tests.tiny import random_ids


def test_every_setting_serves_everybody(model: Blt, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [random_ids(seed, 30) for seed in range(6)]
    rows = measure(model, prompts, (3, 6), 24, rounds=1)
    assert len(rows) == 2 * 2 * len(HOLDS)
    for row in rows:
        assert row["bytes_per_second"] > 0 and 0 < row["p50_gap_ms"] <= row["p99_gap_ms"] <= row["p99_in_all_ms"]
    held = {(row["method"], row["requests"], row["max_hold_ms"]): row["global_passes_per_byte"] for row in rows}
    for method in ("blt-s k8", "blt-dv-8 1step"):
        assert held[method, 6, None] < held[method, 6, 0.0]
    assert "| none |" in capsys.readouterr().out
