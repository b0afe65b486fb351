"""Hashed n-gram embeddings against the oracle; `gpu/cases` runs the same under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.kernels.hash_embedding import hash_embedding, hash_embedding_torch
from fastblt.models.blt import HASH_PRIMES, _hash_powers
from tests.kernels.rows import here
from tests.oracles.hash_oracle import embed

SHAPES = [((3, 4, 5, 6, 7, 8), 1, 509, 48), ((3, 5), 3, 61, 300), ((2, 3, 4), 2, 128, 16), ((1,), 1, 7, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_random_windows(shape: tuple[tuple[int, ...], int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    sizes, functions, vocab, dim = shape
    generator = torch.Generator().manual_seed(vocab)
    tables = len(sizes) * functions
    byte_table = here(torch.randn(260, dim, generator=generator, device="cpu")).to(dtype)
    hash_table = here(torch.randn(tables * vocab, dim, generator=generator, device="cpu")).to(dtype)
    windows = here(torch.randint(0, 260, (2, 3, max(sizes)), generator=generator, device="cpu"))
    windows[0, 0, :-1] = 0
    windows[1, 2] = 259
    powers, offsets = here(_hash_powers(sizes, functions)), torch.arange(tables) * vocab
    if functions > 1:
        # Both signs of the wrapped sums are here.
        sums = (windows.unsqueeze(-2) * powers).sum(-1)
        assert (sums < 0).any() and (sums > 0).any()
    with torch.no_grad():
        out = hash_embedding(windows, powers, offsets, vocab, byte_table, hash_table)
    assert out.dtype == dtype and out.shape == (2, 3, dim)
    numpy_tables = byte_table.double().cpu().numpy(), hash_table.double().cpu().numpy()
    for place in np.ndindex(2, 3):
        expected = embed(windows[place].tolist(), HASH_PRIMES[:functions], sizes, vocab, *numpy_tables)
        np.testing.assert_allclose(out[place].double().cpu().numpy(), expected, atol=tolerance, rtol=tolerance)


def test_no_tables_and_no_rows() -> None:
    byte_table, none = torch.randn(260, 8), torch.empty(0, dtype=torch.int64)
    windows = torch.tensor([[7], [259]])
    out = hash_embedding(windows, none.view(0, 1), none, 0, byte_table, torch.empty(0, 8))
    assert torch.equal(out, byte_table[[7, 259]])
    powers, offsets = _hash_powers((3,), 1), torch.zeros(1, dtype=torch.int64)
    assert hash_embedding(torch.empty(0, 3).long(), powers, offsets, 5, byte_table, torch.ones(5, 8)).shape == (0, 8)


def test_gradients_reach_both_tables() -> None:
    """While learning the torch path serves everywhere."""
    byte_table, hash_table = torch.randn(260, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    powers, offsets = _hash_powers((2, 3), 1), torch.tensor([0, 5])
    windows = torch.tensor([[4, 5, 6]])
    hash_embedding(windows, powers, offsets, 5, byte_table, hash_table).sum().backward()
    assert byte_table.grad is not None and hash_table.grad is not None
    assert byte_table.grad[6].sum() == 8 and hash_table.grad.sum() == 16
    with torch.no_grad():
        torch.testing.assert_close(
            hash_embedding(windows, powers, offsets, 5, byte_table, hash_table),
            hash_embedding_torch(windows, powers, offsets, 5, byte_table, hash_table),
        )
