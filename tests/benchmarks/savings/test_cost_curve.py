from __future__ import annotations

import pytest

from fastblt.benchmarks.savings.cost_curve import least_seconds, module_weights, weights_read
from fastblt.benchmarks.savings.passes import Pass
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt


def test_few_rows_wait_for_memory_and_many_for_arithmetic(model: Blt) -> None:
    parameters, head = ModuleParameters.of(model.config), 100
    limits = {"read_gb_s": 10.0, "gflop_s": 50.0}
    one, many = (Pass("decode", rows, 0.0) for rows in (1, 1000))
    weights = module_weights(parameters, head)["decode"]

    def least(*passes: Pass) -> float:
        return least_seconds(passes, parameters, head, 2.0, 4.0, limits)

    assert least(one) == pytest.approx(weights_read([one], parameters, head, 2.0) / 10)
    assert least(many) == pytest.approx(2 * 1000 * weights / 50e9)
    assert least(one, many) == pytest.approx(least(one) + least(many))
    # The entropy model's weights have bytes of their own.
    assert least(Pass("entropies", 1, 0.0)) == pytest.approx(4 * parameters.patcher / 10e9)
