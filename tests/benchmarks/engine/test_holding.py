from __future__ import annotations

import pytest

from fastblt.benchmarks.engine.holding import HOLDS, PAPER_1B, compare_latency, compare_weights
from fastblt.benchmarks.settings import LOSSLESS
from fastblt.models.blt import Blt
from tests.tiny import random_ids


def test_holding_spares_upstream_passes(model: Blt, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [random_ids(seed, 30) for seed in range(8)]
    rows = compare_weights(model, prompts, holds=(1, 64), length=24, rounds=2)
    assert len(rows) == 2 * len(LOSSLESS)
    for name in LOSSLESS:
        never, always = rows[f"{name}, 1 passes a beat"], rows[f"{name}, 64 passes a beat"]
        assert always["global_passes_per_byte"] < never["global_passes_per_byte"]
        assert always["weights_read_1b"] < never["weights_read_1b"]
        for row in (never, always):
            upstream = PAPER_1B.encoder + PAPER_1B.global_
            read = row["decoder_passes_per_byte"] * PAPER_1B.decoder + row["global_passes_per_byte"] * upstream
            assert row["weights_read_1b"] == pytest.approx(8 * read / 1e6)
            assert row["together_1b"] <= row["weights_read_1b"] * 1.001
            assert row["bytes_per_second"] > 0
    assert "blt-dv-8 1step" in capsys.readouterr().out


def test_every_hold_serves_everybody(model: Blt, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [random_ids(seed, 30) for seed in range(6)]
    rows = compare_latency(model, prompts, (3, 6), 24, rounds=1)
    assert len(rows) == (len(LOSSLESS) - 1) * 2 * len(HOLDS)
    for row in rows:
        assert row["bytes_per_second"] > 0 and 0 < row["p50_gap_ms"] <= row["p99_gap_ms"] <= row["p99_in_all_ms"]
    held = {(row["method"], row["requests"], row["max_hold_ms"]): row["global_passes_per_byte"] for row in rows}
    for method in LOSSLESS[1:]:
        assert held[method, 6, None] < held[method, 6, 0.0]
    assert "| none |" in capsys.readouterr().out
