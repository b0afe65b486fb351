from __future__ import annotations

import pytest

from fastblt.benchmarks.kernels.linear import measure


def test_both_sides_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    result = measure(24, 40, 1, rows=(1, 9), rounds=2)
    assert [row["rows"] for row in result["rows"]] == [1, 9]
    assert all(row["torch_ms"] > 0 and row["c_ms"] > 0 for row in result["rows"]) and result["floor_ms"] > 0
    assert capsys.readouterr().out.count("\n| ") == 3
