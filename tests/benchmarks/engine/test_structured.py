from __future__ import annotations

import pytest

from fastblt.benchmarks.engine.structured import measure


def test_every_structure_at_one_and_at_many_requests(capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(requests=2, length=6, repeats=1)
    assert len(found["first seen"]) == len(found["seen before"]) == 16
    assert all(value > 0 for values in found.values() for value in values.values())
    assert "| arithmetic, blt-s k8, 2 |" in capsys.readouterr().out
