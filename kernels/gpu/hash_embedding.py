"""Hashed n-gram embeddings in Triton: a program a row and up to 256 columns. `hash_embedding` has the mathematics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.paged_attention import as_stored


@triton.jit
def hash_kernel(
    windows,
    powers,
    byte_table,
    hash_table,
    out,
    vocab,
    dim,
    WINDOW: tl.constexpr,
    TABLES: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    TABLE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i embeds window i: the hashes of all tables, then their rows' sum, BLOCK numbers at a time."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, WINDOW_TILE)
    t = tl.arange(0, TABLE_TILE)
    ids = tl.load(windows + row * WINDOW + j, mask=j < WINDOW, other=0)
    inside = (t[:, None] < TABLES) & (j[None, :] < WINDOW)
    multipliers = tl.load(powers + t[:, None] * WINDOW + j[None, :], mask=inside, other=0)
    # int64 products and sums wrap. The remainder has the dividend's sign; floor-mod has the divisor's.
    index = tl.sum(ids[None, :] * multipliers, 1) % vocab
    index = tl.where(index < 0, index + vocab, index) + t.to(tl.int64) * vocab
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    some = (t[:, None] < TABLES) & (d[None, :] < dim)
    values = tl.load(hash_table + index[:, None] * dim + d[None, :], mask=some, other=0.0).to(tl.float32)
    own = tl.load(windows + row * WINDOW + WINDOW - 1)
    base = tl.load(byte_table + own * dim + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(out + row * dim + d, as_stored(base + tl.sum(values, 0), out), mask=d < dim)


def hash_embedding_triton(
    windows: Tensor, powers: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """As `hash_embedding_torch`, summed in fp32 whatever the tables' type."""
    windows = windows.contiguous()
    shape, width, dim = windows.shape[:-1], windows.shape[-1], byte_table.shape[1]
    out = torch.empty((*shape, dim), dtype=byte_table.dtype, device=byte_table.device)
    rows = out.numel() // dim
    if rows:
        block = min(256, triton.next_power_of_2(dim))
        hash_kernel[(rows, triton.cdiv(dim, block))](
            windows,
            powers,
            byte_table,
            hash_table,
            out,
            vocab,
            dim,
            WINDOW=width,
            TABLES=len(powers),
            WINDOW_TILE=triton.next_power_of_2(width),
            TABLE_TILE=triton.next_power_of_2(len(powers)),
            BLOCK=block,
            num_warps=2,
        )
    return out
