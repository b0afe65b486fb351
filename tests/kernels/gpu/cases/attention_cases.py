"""Rotate, write and attend in Triton against the oracle, over ragged rows, pages, windows, blocks and parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastblt.kernels.gpu.paged_attention
from fastblt.kernels.paged_attention import paged_attention, paged_attention_torch
from tests.kernels.test_paged_attention import World, test_nan_stays_in_its_row  # noqa: F401

SHAPES = [(4, 4, 16, 16), (4, 2, 32, 64), (6, 2, 64, 64), (2, 1, 128, 32), (3, 3, 24, 48), (20, 1, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("least_part", [512, 128, 64])
def test_chunks_blocks_windows_and_rewrites(
    shape: tuple[int, int, int, int], least_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal, windowed, tentative and block rows in one launch, in one part, in parts of two tiles, and of one."""
    monkeypatch.setattr(fastblt.kernels.gpu.paged_attention, "LEAST_PART", least_part)
    world = World(sum(shape), shape)
    world.check(paged_attention_torch, world.rows([(0, 0, 150), (1, 0, 90), (2, 0, 5)]), 2e-5)
    # A chunk, a first row, a block that sees past itself, a windowed row, and a row with its block.
    spans = [(1, 90, 9), (3, 0, 1), (2, 5, 4), (0, 150, 4)]
    ranges = [*[(0, p + 1) for p in range(90, 99)], (0, 1), *[(2, 9)] * 4, (70, 151), *[(71, 154)] * 3]
    world.check(paged_attention, world.rows(spans, ranges), 2e-5)
    # A slot written again.
    world.check(paged_attention, world.rows([(0, 150, 1), (3, 0, 1)]), 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.004), (torch.bfloat16, 0.03)])
def test_narrow_storage(dtype: torch.dtype, tolerance: float) -> None:
    world = World(3, (4, 2, 32, 16), dtype)
    world.check(paged_attention, world.rows([(0, 0, 40), (1, 0, 1), (2, 0, 5)]), tolerance)
    # The stored keys and values are rounded, not cut off.
    q, k, v = world.random(3)
    at = world.rows([(3, 0, 3)])
    paged_attention(q, k, v, world.turns, world.store, at)
    page = int(world.table[3, 0]) * world.page
    assert torch.equal(world.store[page : page + 3, 1], v)
    wide = torch.full_like(world.store, 0, dtype=torch.float32)
    paged_attention_torch(q.float(), k.float(), v.float(), world.turns, wide, at)
    assert torch.equal(world.store[page : page + 3, 0], wide[page : page + 3, 0].to(dtype))


def test_only_the_rows_own_slots_are_written() -> None:
    world = World(4, (4, 2, 16, 16))
    q, k, v = world.random(5)
    other = world.store.clone()
    at = world.rows([(0, 14, 3), (2, 0, 2)], [(14, 15), (14, 16), (14, 17), (0, 1), (0, 2)])
    out = paged_attention(q, k, v, world.turns, world.store, at)
    plain = paged_attention_torch(q, k, v, world.turns, other, at)
    torch.testing.assert_close(world.store, other, rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(out, plain, rtol=0, atol=2e-6)
    assert int(world.store[:, 0, 0, 0].isfinite().sum()) == 5


@pytest.mark.parametrize("least_part", [512, 64])
def test_a_row_does_not_depend_on_its_batch(least_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests in one chunk, in odd chunks, and row by row near the end, at two page sizes: equal bits."""
    monkeypatch.setattr(fastblt.kernels.gpu.paged_attention, "LEAST_PART", least_part)
    # The interpreter multiplies with BLAS, which may round a row by its place in the tile; matrix instructions do not.
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype))
    outs = []
    for page in (16, 64):
        world = World(7, (2, 1, 16, page))
        q, k, v = world.random(2 * 72)
        # One request is causal, the other has a window: where its rows begin, its tiles of keys do not.
        windowed = [max(0, p - 39) for p in range(72)]
        whole = world.rows(
            [(0, 0, 72), (1, 0, 72)], [(0, p + 1) for p in range(72)] + [(windowed[p], p + 1) for p in range(72)]
        )
        outs.append(paged_attention(q, k, v, world.turns, world.store, whole, tiled=True))
        world.store.fill_(float("nan"))
        parts = torch.empty_like(q)
        for first, count in ((0, 67), (67, 4), (71, 1)):
            index = torch.cat([torch.arange(first, first + count), torch.arange(72 + first, 72 + first + count)])
            some = range(first, first + count)
            ranges = [(0, p + 1) for p in some] + [(windowed[p], p + 1) for p in some]
            at = world.rows([(0, first, count), (1, first, count)], ranges)
            parts[index] = paged_attention(q[index], k[index], v[index], world.turns, world.store, at, tiled=True)
        outs.append(parts)
    for other in outs[1:]:
        assert torch.equal(outs[0], other)


def test_no_rows() -> None:
    world = World(1, (4, 2, 16, 16))
    q, k, v = world.random(0)
    assert paged_attention(q, k, v, world.turns, world.store, world.rows([])).shape == (0, 4, 16)
