"""Cost curves, and that measuring them leaves no trace."""

from __future__ import annotations

import random

import pytest
import torch

from fastblt.server.engine.cache.kv_caches import OVERSHOOT
from fastblt.server.engine.device.cost import DRAFT, MODULES, STEP, CostCurve, filter_of
from fastblt.server.engine.engine import Engine
from tests.server.harness import model, random_request, run, settings


def test_between_and_beyond_the_points() -> None:
    curve = CostCurve((1, 2, 8), (1.0, 1.5, 4.5))
    assert [curve(rows) for rows in (0, 0.5, 1, 1.5, 2, 5, 8, 16)] == [0.0, 1.0, 1.0, 1.25, 1.5, 3.0, 4.5, 8.5]
    assert CostCurve((4,), (2.0,))(8) == 4.0


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
def test_measuring_leaves_no_trace(which: int, deterministic: bool) -> None:
    """Neither in memory nor in the bytes of requests that run across it."""
    rng = random.Random(which)
    requests = [random_request(rng, f"r{i}") for i in range(3)]
    plain = run(Engine(model(which), settings(deterministic=deterministic)), requests)
    engine = Engine(model(which), settings(deterministic=deterministic))
    costs = engine._runner.costs(50, 12, (1, 2, 4))
    fused = {DRAFT, STEP, *map(filter_of, (4, 8))} if engine._runner.fused_steps else set()
    assert set(costs) == {*MODULES, *fused}
    for curve in costs.values():
        assert 0 < curve.seconds[0] <= curve.seconds[-1]
    assert engine.balanced()
    again = run(engine, requests)
    assert {name: done.ids for name, done in plain.items()} == {name: done.ids for name, done in again.items()}
    assert engine.balanced()


@pytest.mark.parametrize("which", [1, 4])
@pytest.mark.parametrize("beyond", [0, 1, 7])
def test_measuring_writes_to_nobodys_pages(which: int, beyond: int) -> None:
    """Also where the longest request ends with a page, so that another request's page table begins behind it."""
    engine = Engine(model(which), settings(max_model_len=320 - OVERSHOOT + beyond))
    assert engine._caches.max_length == 320 + beyond
    for number in range(8):
        engine.add(random_request(random.Random(number), f"r{number}", max_tokens=40, min_tokens=40, stop=()))
    while len(engine._scheduler.running) < 8:
        engine.step()
    layers = [layer for group in engine._caches.groups.values() for layer in group.layers]
    stored = [engine._runner._forward.tokens[1:], *(layer[engine.settings.page_size :] for layer in layers)]
    before = [one.clone() for one in stored]
    engine.calibrate()
    for one, own in zip(stored, before, strict=True):
        # As bytes: what was never written may be anything, also NaN, which equals nothing.
        assert torch.equal(one.contiguous().view(torch.uint8), own.view(torch.uint8))


def test_the_work_of_a_step_is_told() -> None:
    engine = Engine(model(1), settings())
    engine.add(random_request(random.Random(0), "r"))
    engine.step()
    modules = [module for module, _ in engine._runner.work]
    assert modules.count("decoder") == 1 and "patcher" in modules and "encoder" in modules
    assert all(rows >= 1 for _, rows in engine._runner.work)
