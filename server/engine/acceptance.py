"""How many bytes of a draft are accepted: what a checkpoint says of it, and what rounds have shown since."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fastblt.models.config import SAMPLED
from fastblt.server.request import DecodingMethod

#: Weight of what the checkpoint says, in rounds; and how many of the last rounds count.
PRIOR_ROUNDS, MEMORY = 8.0, 400.0
#: Acceptance assumed where a checkpoint says nothing.
_UNKNOWN = {DecodingMethod.BLT_S: 0.7, DecodingMethod.BLT_DV: 0.3}


class Acceptance:
    """How often a draft's bytes are accepted, by position, given that all before them were; `prior` where none were.

    Where a position has few trials, the estimate of the one before it is used.
    """

    def __init__(self, length: int, prior: float) -> None:
        self.prior = prior
        self._tried = np.zeros(length)
        self._right = np.zeros(length)

    def count(self, drafted: int, accepted: int) -> None:
        """Count a round; older rounds fade."""
        tried, fade = slice(min(accepted + 1, drafted)), 1 - 1 / MEMORY
        self._tried[tried] = fade * self._tried[tried] + 1
        self._right[tried] *= fade
        self._right[:accepted] += 1

    def bytes(self, length: int) -> float:
        """Bytes of a draft of `length` that will be right, on average."""
        expected, all_right, chance = 0.0, 1.0, self.prior
        for tried, right in zip(self._tried[:length].tolist(), self._right[:length].tolist(), strict=True):
            chance = (right + PRIOR_ROUNDS * chance) / (tried + PRIOR_ROUNDS)
            all_right *= chance
            expected += all_right
        return expected


def sampled(table: Mapping[str, float]) -> dict[str, float]:
    """The table's values of sampled text; those of greedy text where it has none."""
    return {name: table.get(name + SAMPLED, share) for name, share in table.items() if not name.endswith(SAMPLED)}


def prior(table: Mapping[str, float], method: DecodingMethod, lengths: tuple[int, ...]) -> float:
    """The chance that a drafted byte is right, given those before it, from the checkpoint's table of acceptances.

    The table has shares of drafted bytes: the mean over a draft of chance^1, chance^2, ...
    """
    for length in sorted(lengths, reverse=True):
        name = f"blt-s k{length}" if method == DecodingMethod.BLT_S else f"{method}-{length} 1step"
        if (share := table.get(name)) is not None:
            return _chance(share, length)
    return _UNKNOWN[method]


def _chance(share: float, length: int) -> float:
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        mean = math.fsum(middle**at for at in range(1, length + 1)) / length
        low, high = (middle, high) if mean < share else (low, middle)
    return (low + high) / 2
