"""Hashed n-gram embeddings, one n-gram at a time in Python's integers; shares no code with kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def embed(
    window: Sequence[int], primes: Sequence[int], sizes: Sequence[int], vocab: int, byte_table: Array, hash_table: Array
) -> Array:
    """One row [d]: for every prime and then every size, the last `size` ids of the window as digits in that prime."""
    out = byte_table[window[-1]].copy()
    table = 0
    for prime in primes:
        for size in sizes:
            number = sum(id_ * prime**j for j, id_ in enumerate(window[len(window) - size :]))
            # As a signed 64-bit integer; Python's remainder is the floor-mod.
            number = (number + 2**63) % 2**64 - 2**63
            out += hash_table[table * vocab + number % vocab]
            table += 1
    return out
