"""How many bytes of a draft are accepted, by what was counted and by a checkpoint's table."""

from __future__ import annotations

import pytest

from fastblt.server.engine.acceptance import Acceptance, prior
from fastblt.server.request import DecodingMethod


def test_acceptance_is_the_mean_of_what_was_counted() -> None:
    acceptance = Acceptance(4, 0.5)
    for _ in range(5000):
        acceptance.count(4, 2)
    assert acceptance.bytes(4) == pytest.approx(2.0, abs=0.1)
    assert acceptance.bytes(1) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("length", [1, 4, 16])
def test_chance_of_a_byte_from_a_share_of_bytes(chance: float, length: int) -> None:
    share = sum(chance**at for at in range(1, length + 1)) / length
    table = {f"blt-s k{length}": share}
    assert prior(table, DecodingMethod.BLT_S, (length,)) == pytest.approx(chance, abs=1e-3)
