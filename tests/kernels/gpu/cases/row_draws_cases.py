"""Parameters of a pass's rows by Triton, as by torch."""

from __future__ import annotations

import pytest
import torch

from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.gpu.row_draws import row_draws_triton
from fastblt.kernels.row_draws import row_draws_torch


@pytest.mark.parametrize("size", [1, 8, 130])
def test_parameters(size: int) -> None:
    generator, owners = torch.Generator().manual_seed(size), 5
    draws = Draws(
        torch.rand(6, owners, generator=generator),
        torch.randint(-(2**62), 2**62, (2, owners), generator=generator),
        torch.randint(0, 9, (owners,), generator=generator),
    )
    rows = torch.randint(-1, 9, (6, size), generator=generator, dtype=torch.int32)
    rows[0] = torch.randint(0, owners, (size,), generator=generator)
    found, expected = vars(row_draws_triton(draws, rows)), vars(row_draws_torch(draws, rows))
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
