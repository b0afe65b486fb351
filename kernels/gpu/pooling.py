"""From the bytes of patches to their queries' attention over them, without padding (BLT, arXiv 2412.09871 §3.2.2).

P patches have B bytes together, one patch behind another: patch p has rows firsts[p] to firsts[p] + counts[p] - 1
(at least one) of the states x [B, d], and of their keys and values [B, 2 Hkv D], keys first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.rounding import as_stored

#: Bytes of a patch that are read together.
_ROWS = 16


@triton.jit
def peak_kernel(x, firsts, counts, out, size, BLOCK: tl.constexpr):
    """The maximum over a patch's rows, BLOCK numbers of it."""
    patch = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    first = tl.load(firsts + patch).to(tl.int64)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for row in range(tl.load(counts + patch)):
        peak = tl.maximum(peak, tl.load(x + (first + row) * size + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + patch * size + at, as_stored(peak, out), mask=inside)


@triton.jit
def pool_kernel(
    q,
    both,
    firsts,
    counts,
    out,
    scale,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One head of one query of a patch over all bytes of it."""
    patch = tl.program_id(0) // QUERIES
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    near = d < DIM
    here = (tl.program_id(0).to(tl.int64) * HEADS + head) * DIM
    query = tl.load(q + here + d, mask=near, other=0.0).to(tl.float32)
    first = tl.load(firsts + patch).to(tl.int64)
    count = tl.load(counts + patch)
    STRIDE: tl.constexpr = 2 * KV_HEADS * DIM
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mixed = tl.zeros((WIDTH,), tl.float32)
    for base in range(0, count, ROWS):
        row = base + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & near[None, :]
        place = both + (first + row)[:, None] * STRIDE + head // (HEADS // KV_HEADS) * DIM + d[None, :]
        keys = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(place + KV_HEADS * DIM, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(row < count, tl.sum(keys * query[None, :], 1) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        weight = tl.exp(score - higher)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * values, 0)
        peak = higher
    tl.store(out + here + d, as_stored(mixed / total, out), mask=near)


def peaks(x: Tensor, firsts: Tensor, counts: Tensor) -> Tensor:
    """The maxima [P, d] over the states [B, d] of each patch; firsts and counts int32 [P]."""
    size = x.shape[1]
    out = torch.empty((len(firsts), size), dtype=x.dtype, device=x.device)
    block = min(256, triton.next_power_of_2(size))
    peak_kernel[(len(firsts), triton.cdiv(size, block))](x, firsts, counts, out, size, BLOCK=block)
    return out


def pool(q: Tensor, both: Tensor, firsts: Tensor, counts: Tensor, kv_heads: int) -> Tensor:
    """Attention [P k, H, D] of k queries a patch [P k, H, D] over the keys and values [B, 2 Hkv D] of its bytes."""
    out = torch.empty_like(q)
    rows, heads, dim = q.shape
    pool_kernel[(rows, heads)](
        q, both, firsts, counts, out, dim**-0.5, QUERIES=rows // len(firsts), HEADS=heads, KV_HEADS=kv_heads,
        DIM=dim, WIDTH=triton.next_power_of_2(dim), ROWS=_ROWS, num_warps=2,
    )  # fmt: skip
    return out
