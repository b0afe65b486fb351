from __future__ import annotations

import pytest

from fastblt.benchmarks.checks.weights import measure


def test_narrow_weights_are_compared_with_wide_ones(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(
        model=checkpoint,
        weights=("float32", "bfloat16", "int8"),
        setting=("blt", "blt-s k4"),
        num_prompts=2,
        length=32,
        output_len=8,
    )
    wide, half, eighth = result["weights"].values()
    assert result["passed"] and "all" in capsys.readouterr().out
    assert wide["bytes_per_weight"] > half["bytes_per_weight"]
    assert wide["same_choice"] == wide["leading"] == 1
    for row in (half, eighth):
        # Random weights, which a rounding changes little.
        assert 0 < abs(row["bits_per_byte"] - wide["bits_per_byte"]) < 0.1
        assert 0.7 < row["same_choice"] <= 1 and 0 <= row["acceptance"]["blt-s k4"] <= 1
