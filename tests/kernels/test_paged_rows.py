"""Rows in pages against a plain dictionary."""

from __future__ import annotations

import pytest
import torch

from fastblt.kernels.paged_rows import PagedRows

PAGE, PAGES, REQUESTS = 4, 5, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    table = torch.randperm(REQUESTS * PAGES, generator=generator).view(REQUESTS, PAGES).int()
    store = torch.full((REQUESTS * PAGES * PAGE, 7), float("nan"), dtype=dtype)
    rows = PagedRows(store, table, PAGE)
    assert rows.native == (dtype == torch.float32)
    known: dict[tuple[int, int], torch.Tensor] = {}
    for _ in range(20):
        places = torch.randperm(REQUESTS * PAGES * PAGE, generator=generator)[:9]
        # Every second of a longer column: such views reach the C code too.
        owners = torch.stack((places // (PAGES * PAGE), places), 1).int()[:, 0]
        positions = (places % (PAGES * PAGE)).int()
        values = torch.randn(9, 7, generator=generator).to(dtype)
        rows.write(owners, positions, values)
        known |= {(int(o), int(p)): value for o, p, value in zip(owners, positions, values, strict=True)}
        asked = list(known)
        index = torch.tensor(asked, dtype=torch.int32)
        read = rows.read(index[:, 0], index[:, 1])
        assert torch.equal(read, torch.stack([known[place] for place in asked]))
    for owner, position in known:
        slot = int(table[owner, position // PAGE]) * PAGE + position % PAGE
        assert torch.equal(store[slot], known[owner, position])
    assert int(store.isnan().all(1).sum()) == len(store) - len(known)
