"""Hashed n-gram embeddings in Triton: a program a row and up to 256 columns. `hash_embedding` has the mathematics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.rounding import as_stored
from fastblt.kernels.request_ids import RequestIds


@triton.jit
def hash_kernel(
    windows,
    owners,
    positions,
    powers,
    byte_table,
    hash_table,
    out,
    stride,
    vocab,
    dim,
    STORED: tl.constexpr,
    WINDOW: tl.constexpr,
    TABLES: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    TABLE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i embeds window i: the hashes of all tables, then their rows' sum, BLOCK numbers at a time.

    With STORED, `windows` are the ids of requests, and the row's window ends at its position.
    """
    row = tl.program_id(0).to(tl.int64)
    if STORED:
        windows += tl.load(owners + row).to(tl.int64) * stride + tl.load(positions + row)
    else:
        windows += row * WINDOW
    j = tl.arange(0, WINDOW_TILE)
    t = tl.arange(0, TABLE_TILE)
    ids = tl.load(windows + j, mask=j < WINDOW, other=0)
    inside = (t[:, None] < TABLES) & (j[None, :] < WINDOW)
    multipliers = tl.load(powers + t[:, None] * WINDOW + j[None, :], mask=inside, other=0)
    # int64 products and sums wrap. The remainder has the dividend's sign; floor-mod has the divisor's.
    index = tl.sum(ids[None, :] * multipliers, 1) % vocab
    index = tl.where(index < 0, index + vocab, index) + t.to(tl.int64) * vocab
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = (t[:, None] < TABLES) & (d[None, :] < dim)
    values = tl.load(hash_table + index[:, None] * dim + d[None, :], mask=some, other=0.0).to(tl.float32)
    own = tl.load(windows + WINDOW - 1)
    base = tl.load(byte_table + own * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(out + row * dim + d, as_stored(base + tl.sum(values, 0), out), mask=d < dim)


def _embed(
    windows: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    powers: Tensor,
    vocab: int,
    byte_table: Tensor,
    hash_table: Tensor,
    out: Tensor,
) -> Tensor:
    dim = byte_table.shape[1]
    count = out.numel() // dim
    block = min(256, triton.next_power_of_2(dim))
    owners, positions = (windows, windows) if rows is None else rows
    if count:
        hash_kernel[(count, triton.cdiv(dim, block))](
            windows,
            owners,
            positions,
            powers,
            byte_table,
            hash_table,
            out,
            windows.stride(0),
            vocab,
            dim,
            STORED=rows is not None,
            WINDOW=powers.shape[1],
            TABLES=len(powers),
            WINDOW_TILE=triton.next_power_of_2(powers.shape[1]),
            TABLE_TILE=triton.next_power_of_2(len(powers)),
            BLOCK=block,
            num_warps=2,
        )
    return out


def hash_embedding_triton(
    windows: Tensor, powers: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """As `hash_embedding_torch`, summed in fp32 whatever the tables' type."""
    shape = (*windows.shape[:-1], byte_table.shape[1])
    out = torch.empty(shape, dtype=byte_table.dtype, device=byte_table.device)
    return _embed(windows.contiguous(), None, powers, vocab, byte_table, hash_table, out)


def hash_embedding_of_ids(
    ids: RequestIds,
    owners: Tensor,
    positions: Tensor,
    powers: Tensor,
    vocab: int,
    byte_table: Tensor,
    hash_table: Tensor,
) -> Tensor:
    """Embeddings [N, d] of the windows that end at these positions, int32 [N]; `ids` are padded for a window."""
    assert ids.pad + 1 == powers.shape[1], "a window begins where the ids of a request do"
    out = torch.empty((len(owners), byte_table.shape[1]), dtype=byte_table.dtype, device=byte_table.device)
    return _embed(ids.ids, (owners, positions), powers, vocab, byte_table, hash_table, out)
