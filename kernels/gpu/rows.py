"""What rows of the local modules begin as, and where their states go: one launch each.

A row has an owner and a position; ids int64 [states, pad + length] are those of `kernels/request_ids.py`, stored states
and their page table those of `kernels/paged_rows.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.rounding import as_stored
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds


@triton.jit
def begin_kernel(
    source,
    ids,
    pages,
    owners,
    positions,
    block,
    block_table,
    out,
    ids_stride,
    pad,
    pages_stride,
    size,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its stored state (STORED), or the lookup of its id in the table `source`; of a block, of its own id."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    owner = tl.load(owners + row).to(tl.int64)
    position = tl.load(positions + row)
    if STORED:
        page = tl.load(pages + owner * pages_stride + position // PAGE).to(tl.int64)
        place = source + (page * PAGE + position % PAGE) * size
    else:
        place = source + tl.load(ids + owner * ids_stride + pad + position) * size
    if BLOCKS:
        own = tl.load(block + row)
        if own >= 0:
            place = block_table + own.to(tl.int64) * size
    tl.store(out + row.to(tl.int64) * size + at, tl.load(place + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def finish_kernel(
    x, delta, out, store, pages, owners, positions, pages_stride, size, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: delta + x into `out`, and into the slot of its position."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < size
    owner = tl.load(owners + row).to(tl.int64)
    position = tl.load(positions + row)
    page = tl.load(pages + owner * pages_stride + position // PAGE).to(tl.int64)
    here = row.to(tl.int64) * size + at
    total = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    total = as_stored(tl.load(delta + here, mask=inside, other=0.0).to(tl.float32) + total, out)
    tl.store(out + here, total, mask=inside)
    tl.store(store + (page * PAGE + position % PAGE) * size + at, total, mask=inside)


def _begin(
    source: Tensor,
    ids: RequestIds | None,
    states: PagedRows | None,
    owners: Tensor,
    positions: Tensor,
    block: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    size = source.shape[1]
    out = torch.empty((len(owners), size), dtype=source.dtype, device=source.device)
    tile = triton.next_power_of_2(size)
    begin_kernel[(len(owners),)](
        source,
        owners if ids is None else ids.ids,
        owners if states is None else states.table,
        owners,
        positions,
        owners if block is None else block,
        source if block_table is None else block_table,
        out,
        0 if ids is None else ids.ids.stride(0),
        0 if ids is None else ids.pad,
        0 if states is None else states.table.stride(0),
        size,
        PAGE=1 if states is None else states.page_size,
        STORED=states is not None,
        BLOCKS=block is not None,
        BLOCK=tile,
        num_warps=4,
    )
    return out


def stored_rows(
    states: PagedRows, owners: Tensor, positions: Tensor, block: Tensor | None = None, table: Tensor | None = None
) -> Tensor:
    """Stored states [N, d]; of rows with an id >= 0 in `block` int32 [N], its row of `table` [ids, d]."""
    return _begin(states.store, None, states, owners, positions, block, table)


def looked_up_rows(
    table: Tensor, ids: RequestIds, owners: Tensor, positions: Tensor, block: Tensor | None = None
) -> Tensor:
    """Rows [N, d] of `table` [ids, d]: of the ids at these positions, or of those >= 0 in `block` int32 [N]."""
    return _begin(table, ids, None, owners, positions, block, table)


def finish_rows(x: Tensor, delta: Tensor, states: PagedRows, owners: Tensor, positions: Tensor) -> Tensor:
    """delta + x [N, d], which is stored too."""
    size = x.shape[1]
    out = torch.empty_like(x)
    finish_kernel[(len(x),)](
        x, delta, out, states.store, states.table, owners, positions, states.table.stride(0), size,
        PAGE=states.page_size, BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out
