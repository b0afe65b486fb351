from __future__ import annotations

import pytest

from fastblt.benchmarks.load.fresh import fresh


def test_every_setting_on_a_fresh_server(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = fresh(model=checkpoint, rounds=1, clients=(2,), temperature=(0.8,), setting=("blt",))
    row = found["2 clients, 0.8"]
    assert row["bytes_per_second"].keys() == {"auto", "blt"} and row["over_best"] == row["over_blt"] > 0
    assert "auto over the best" in capsys.readouterr().out
