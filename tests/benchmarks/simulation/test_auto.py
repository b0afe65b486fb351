"""`auto` on made-up machines: near the best draft from the first requests on, whatever the machine is."""

from __future__ import annotations

import statistics

import pytest

from fastblt.benchmarks.simulation.auto import Machine
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.device.cost import DRAFT, MODULES, STEP, CostCurve, filter_of
from fastblt.server.engine.scheduler import Text
from fastblt.server.settings import PRETRAINED

#: Milliseconds by rows, about as the shipped model's on two cores.
_ROWS = (1, 32, 256, 1056)
_CURVES = {
    "patcher": (0.1, 0.22, 1.55, 6.2),
    "encoder": (0.06, 0.12, 0.75, 3.0),
    "global": (0.37, 1.2, 8.8, 36.0),
    "decoder": (0.11, 0.44, 3.3, 13.3),
    DRAFT: (0.08, 1.1, 8.0, 33.0),
    STEP: (0.1, 1.5, 12.0, 48.0),
    filter_of(4): (0.31, 2.3, 18.0, 72.0),
    filter_of(8): (0.5, 3.7, 30.0, 120.0),
    filter_of(16): (0.6, 13.0, 100.0, 400.0),
}


@pytest.mark.parametrize("clients", [1, 8, 32])
def test_auto_is_near_the_best_from_the_start(clients: int) -> None:
    assert set(MODULES) <= set(_CURVES)
    costs = {name: CostCurve(_ROWS, tuple(1e-3 * one for one in curve)) for name, curve in _CURVES.items()}
    config = load_checkpoint(str(PRETRAINED)).config
    each = 24 if clients == 1 else 8
    shares = [Machine(costs, config, (0.985, 0.7), Text(0.2, 192.0), seed).speed(clients, each) for seed in range(9)]
    assert statistics.median(shares) > 0.95 and max(shares) < 1.02
