"""Rotate, write and attend, one number at a time in float64; shares no code with kernels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def rotated(x: Array, position: int, theta: float) -> Array:
    """One head [D] turned to its position: pairs (2i, 2i+1) by position / theta^(2i/D)."""
    out = np.empty_like(x)
    size = len(x)
    for i in range(size // 2):
        angle = position / theta ** (2 * i / size)
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


class Memory:
    """Keys and values by request and position, as dictionaries: there are no pages to get wrong."""

    def __init__(self, theta: float) -> None:
        self._theta = theta
        self.keys: dict[tuple[int, int], Array] = {}
        self.values: dict[tuple[int, int], Array] = {}

    def write(self, request: int, position: int, k: Array, v: Array) -> None:
        self.keys[request, position] = np.stack([rotated(head, position, self._theta) for head in k])
        self.values[request, position] = v

    def attend(self, request: int, position: int, q: Array, low: int, high: int) -> Array:
        """q [H, D] over positions [low, high) -> [H, D]."""
        out = np.zeros_like(q)
        for h in range(len(q)):
            query = rotated(q[h], position, self._theta)
            group = h // (len(q) // len(self.keys[request, low]))
            scores = [float(query @ self.keys[request, p][group]) / math.sqrt(q.shape[1]) for p in range(low, high)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for weight, p in zip(weights, range(low, high), strict=True):
                out[h] += weight / sum(weights) * self.values[request, p][group]
        return out
