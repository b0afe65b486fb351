"""The noise: Random123's known answers, the scalar oracle, and the exactness of its rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.kernels.noise import gumbel, mix_seed, philox4x32
from tests.oracles import selection_oracle as oracle

# Random123's kat_vectors, philox 4x32, 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x32(torch.tensor(words(counter)), torch.tensor(words(key))).tolist() == words(expected)
    assert list(oracle.philox(words(counter), words(key))) == words(expected)


def test_philox_batches_and_leaves_its_arguments() -> None:
    generator = torch.Generator().manual_seed(1)
    counter = torch.randint(0, 2**32, (3, 5, 4), generator=generator)
    key = torch.randint(0, 2**32, (3, 1, 2), generator=generator)
    before = counter.clone(), key.clone()
    result = philox4x32(counter, key)
    assert torch.equal(counter, before[0]) and torch.equal(key, before[1])
    for i in range(3):
        for j in range(5):
            assert result[i, j].tolist() == list(oracle.philox(counter[i, j].tolist(), key[i, 0].tolist()))


def test_mix_seed() -> None:
    # The published first outputs of splitmix64 started at 0.
    assert mix_seed(0, 0) % 2**64 == 0xE220A8397B1DCDAF
    assert mix_seed(0, 1) % 2**64 == 0x6E789E6AA1B965F4
    for seed in (0, 1, 42, -1, 2**63 - 1, -(2**63), 2**64 - 1):
        for choice in (0, 1, 7, 127):
            mixed = mix_seed(seed, choice)
            assert mixed == oracle.splitmix64(seed, choice)
            assert -(2**63) <= mixed < 2**63
    assert len({mix_seed(seed, choice) for seed in range(100) for choice in range(20)}) == 2000


def test_gumbel_equals_the_oracle() -> None:
    seeds = [0, 1, -1, mix_seed(7, 0), 2**63 - 1, -(2**63), 1 << 32, 5]
    positions = [0, 1, 2, 1000, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
    noise = gumbel(torch.tensor(seeds), torch.tensor(positions))
    assert noise.dtype == torch.float32 and noise.shape == (8, 260)
    for row, seed, position in zip(noise, seeds, positions, strict=True):
        assert row.tolist() == oracle.gumbel(seed, position)


def test_gumbel_depends_on_all_of_seed_and_position() -> None:
    seeds = torch.tensor([0, 1, 1 << 32, -(1 << 63), 0, 0, 0])
    positions = torch.tensor([5, 5, 5, 5, 6, 5 + (1 << 32), 5 + (1 << 31)])
    noise = gumbel(seeds, positions)
    for i in range(7):
        for j in range(i):
            assert (noise[i] == noise[j]).float().mean() < 0.01


def test_gumbel_of_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert gumbel(empty, empty).shape == (0, 260)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="needs a wider float than 64 bits as the judge")
def test_every_value_of_the_noise_is_correctly_rounded() -> None:
    """All 2^23 of them: the fp32 value is right, and but for one no float64 logarithm could have made it wrong."""
    step, narrow = 1 << 20, []
    for start in range(0, 1 << 23, step):
        exact = (np.arange(start, start + step).astype(np.longdouble) + 0.5) * np.longdouble(2) ** -23
        exact = -np.log(-np.log(exact))
        rounded = exact.astype(np.float32)
        uniform = torch.arange(start, start + step, dtype=torch.float64).add_(0.5).mul_(2.0**-23)
        assert np.array_equal(uniform.log_().neg_().log_().neg_().float().numpy(), rounded)
        wide = rounded.astype(np.longdouble)
        above = (np.nextafter(rounded, np.float32(np.inf)) + wide) / 2 - exact
        below = exact - (np.nextafter(rounded, np.float32(-np.inf)) + wide) / 2
        unit = np.longdouble(2) ** -52 * (1 + np.abs(exact))
        narrow += (start + np.flatnonzero(np.minimum(above, below) < 5 * unit)).tolist()
    assert narrow == [3085996]
