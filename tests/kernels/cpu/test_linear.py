"""Maps of few rows in C: against sums in double precision, and row by row against itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.kernels.cpu.linear import linear
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import set_threads


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    yield
    set_threads(None)


def test_the_native_path_is_there() -> None:
    assert library() is not None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 23), st.sampled_from([1, 7, 8, 64, 131]), st.sampled_from([1, 2, 3, 8, 50, 129]), st.integers(1, 3)
)
def test_against_double_precision(rows: int, inputs: int, outputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    set_threads(threads)
    result = linear(x, weight)
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, atol=1e-4, rtol=1e-4)
    set_threads(1)
    for row in range(rows):
        assert torch.equal(linear(x[row : row + 1], weight)[0], result[row]), "a row depends on its batch"


def test_rows_that_do_not_lie_together() -> None:
    x, weight = torch.randn(64, 5).T, torch.randn(9, 64)
    torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=1e-4, rtol=1e-4)


def test_poison_stays_in_its_row() -> None:
    x, weight = torch.randn(7, 40), torch.randn(11, 40)
    good = linear(x, weight)
    x[3, 5] = float("nan")
    bad = linear(x, weight)
    assert bad[3].isnan().all() and torch.equal(bad[[0, 1, 2, 4, 5, 6]], good[[0, 1, 2, 4, 5, 6]])


def test_weights_that_it_cannot_read() -> None:
    for weight in (torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(4, 8).T):
        with pytest.raises(ValueError, match="contiguous fp32"):
            linear(torch.zeros(2, weight.shape[1]), weight)
