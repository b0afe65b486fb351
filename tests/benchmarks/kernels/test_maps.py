from __future__ import annotations

import pytest
import torch

from fastblt.benchmarks.kernels import maps


def test_all_kinds_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_FAR", 2**14)
    result = maps.measure(inputs=64, outputs=48, rows=(1, 3), threads=1, rounds=1)
    assert all(list(own) == list(maps.KINDS) for own in result["milliseconds"].values())
    assert all(value > 0 for own in result["milliseconds"].values() for value in own.values())


def test_every_kind_is_the_same_map() -> None:
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    for kind, (make, _) in maps.KINDS.items():
        tolerance = 0.05 if "int8" in kind else 0.02
        error = make(weight)(x) - x @ weight.T
        assert error.norm() < tolerance * (x @ weight.T).norm(), kind
