"""What the controller of `auto` makes of drafts whose costs are not those of single passes: against simulated ones."""

from __future__ import annotations

import random
import statistics

import pytest

from fastblt.server.decoding.auto import Draft
from fastblt.server.engine.device.cost import DRAFT, CostCurve, filter_of
from fastblt.server.engine.draft_controller import DraftController
from fastblt.server.request import DecodingMethod
from tests.server.engine.test_draft_controller import TEXT, config, curves


@pytest.mark.parametrize("requests", [1, 8, 32])
@pytest.mark.parametrize("right", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("fixed, row", [(1e-3, 0.0), (1e-4, 1e-4)])
def test_filtered_drafts_of_many_end_with_the_longest(requests: int, right: float, fixed: float, row: float) -> None:
    rng = random.Random(0)
    inner = CostCurve((1, 64), (fixed + row, fixed + 64 * row))
    sizes = [size for size in config().block_sizes if size > 1]
    controller = DraftController(config(), curves(0, 0) | {filter_of(size): inner for size in sizes})

    def passed(block: int) -> int:
        found = 0
        while found < block - 1 and rng.random() < right:
            found += 1
        return found

    for size in sizes:
        draft = Draft(DecodingMethod.BLT_DSV, 32, size)
        for _ in range(2000):
            controller.filtered(draft, size - 1, passed(size))
        took = []
        for _ in range(200):
            drafted = [0] * requests
            seconds = 0.0
            while waiting := [at for at, many in enumerate(drafted) if many < draft.length]:
                seconds += inner(len(waiting))
                for at in waiting:
                    drafted[at] += passed(size) + 2
            took.append(seconds)
        _, expected = controller._filtering(draft, requests)
        assert expected == pytest.approx(statistics.mean(took), rel=0.2)


def test_slow_first_rounds_are_those_of_a_start_and_not_of_their_draft() -> None:
    costs = curves(1e-3, 1e-6) | {DRAFT: CostCurve((1, 64), (2e-4, 4e-4))}
    controller = DraftController(config(), costs)
    first = controller.best
    rates = {draft: controller.rate(draft) for draft in controller.drafts}
    others = [draft for draft in controller.drafts if draft.method != first.method]
    near = max(others, key=lambda draft: rates[draft])
    before = rates[first] / rates[near]
    for _ in range(3):
        assert controller.next() == first
        controller.ended(first)
        expected = controller._round_time.seconds(*controller._reckon(first, 1))
        controller.step_ended(1, lambda: TEXT, 1.5 * expected, [("decoder", 1)] * 20)
    # The machine may be slow as well: others must gain little of what the first rounds lost.
    assert controller.rate(first) / controller.rate(near) > before / 1.1
