"""Paged attention of ragged rows in Triton. `paged_attention` has the mathematics and the shapes.

Two launches a layer, or three. First a program a row rotates its key and writes key and value; only when that launch is
over do rows attend, since a row of a block reads keys of other programs.

Then a program takes a few adjacent rows of one request, one key head with its group of query heads, and one part of the
positions; (row, head of the group) pairs are the rows of its matrix product. It walks over tiles of 64 keys that begin
at multiples of 64, whatever the page size and the other rows: for a row that sees none of a tile's keys the tile is
exactly neutral. Where there is no window, parts are fixed ranges of absolute positions, merged in order by the third
launch where there is more than one; so a row's result depends on its own range and on `length` alone. Sums are fp32;
products are in the storage's type, fp32 ones without TF32.

The ranges of the rows of a span must together be one range of written positions: gaps would be read, with weight 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.attention import TILE
from fastblt.kernels.backend import interpreted
from fastblt.kernels.gpu.rounding import as_stored
from fastblt.kernels.types import RaggedRows

#: Contexts are cut into at most this many parts, none shorter than LEAST_PART positions.
MOST_PARTS = 8
LEAST_PART = 512

_LOG2_E = 1.4426950408889634
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def write_kernel(
    k,
    v,
    turns,
    store,
    table,
    rows,
    positions,
    k_stride,
    v_stride,
    table_stride,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One row's key, rotated, and value into their slot. WIDTH = Hkv D numbers, as PAIRS >= WIDTH / 2 pairs."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    request = tl.load(rows + row).to(tl.int64)
    page = tl.load(table + request * table_stride + position // PAGE).to(tl.int64)
    slot = store + (page * PAGE + position % PAGE) * (2 * WIDTH)
    pair = tl.arange(0, PAIRS)[:, None]
    side = tl.arange(0, 2)[None, :]
    at = pair * 2 + side
    inside = at < WIDTH
    a, b = tl.split(tl.load(k + row * k_stride + at, mask=inside, other=0.0).to(tl.float32))
    turn = turns + position.to(tl.int64) * DIM + at % DIM
    c, s = tl.split(tl.load(turn, mask=inside, other=0.0))
    tl.store(slot + at, as_stored(tl.join(a * c - b * s, a * s + b * c), store), mask=inside)
    value = tl.load(v + row * v_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(slot + WIDTH + at, as_stored(value, store), mask=inside)


@triton.jit(do_not_specialize=["total_rows"])
def attend_kernel(
    q,
    turns,
    store,
    table,
    rows,
    positions,
    firsts,
    highs,
    out,
    part_out,
    part_peak,
    part_total,
    total_rows,
    q_stride,
    table_stride,
    span,
    scale,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of rows and one key head over one part of the positions. WIDTH >= DIM and BLOCK are powers of 2.

    Tiles begin at multiples of MOST and where another request's rows begin, and end before the next; the program of a
    row within one has nothing to do. So the grid depends on the number of rows alone.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    MOST: tl.constexpr = BLOCK // GROUP
    STRIDE: tl.constexpr = 2 * KV_HEADS * DIM
    first = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    request = tl.load(rows + first)
    if (first % MOST != 0) & (tl.load(rows + tl.maximum(first - 1, 0)) == request):
        return
    r = tl.arange(0, BLOCK)
    reach = (r < MOST - first % MOST) & (first + r < total_rows)
    count = tl.sum((tl.load(rows + first + r, mask=reach, other=-1) == request).to(tl.int32), 0)
    m = tl.arange(0, BLOCK)
    valid = m // GROUP < count
    row = first + tl.minimum(m // GROUP, count - 1)
    low = tl.maximum(tl.load(firsts + row) + 1 - WINDOW, 0) if WINDOW else tl.zeros_like(row)
    high = tl.load(highs + row)
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    begin = tl.maximum(lowest // KEYS * KEYS, part * span)
    end = tl.minimum(highest, (part + 1) * span)
    if begin < end:
        where = row.to(tl.int64) * HEADS + head * GROUP + m % GROUP
        pair = tl.arange(0, WIDTH // 2)[None, :, None]
        at = pair * 2 + tl.arange(0, 2)[None, None, :]
        # Masks that always hold cost registers, so the common widths have none.
        near = at < DIM if DIM < WIDTH else None
        zero = 0.0 if DIM < WIDTH else None
        query_at = q + row.to(tl.int64) * q_stride + (head * GROUP + m % GROUP) * DIM
        a, b = tl.split(tl.load(query_at[:, None, None] + at, mask=near, other=zero).to(tl.float32))
        position = tl.load(positions + row).to(tl.int64)
        c, s = tl.split(tl.load(turns + position[:, None, None] * DIM + at, mask=near, other=zero))
        query = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (BLOCK, WIDTH)).to(DOT)

        pages = table + request.to(tl.int64) * table_stride
        d = tl.arange(0, WIDTH)
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK, WIDTH), tl.float32)
        for base in range(begin, end, KEYS):
            key = base + tl.arange(0, KEYS)
            # Slots that no row sees may hold anything.
            live = (key >= lowest) & (key < highest)
            page = tl.load(pages + key // PAGE, mask=live, other=0).to(tl.int64)
            slot = (page * PAGE + key % PAGE) * STRIDE + head * DIM
            key_mask = live[None, :] & (d[:, None] < DIM) if DIM < WIDTH else live[None, :]
            keys = tl.load(store + slot[None, :] + d[:, None], mask=key_mask, other=0.0)
            score = tl.dot(query, keys.to(DOT), input_precision="ieee") * scale
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            # A row that has seen nothing yet has no peak to subtract.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(score - level[:, None])
            shrink = tl.exp2(peak - level)
            value_mask = live[:, None] & (d[None, :] < DIM) if DIM < WIDTH else live[:, None]
            values = tl.load(store + slot[:, None] + KV_HEADS * DIM + d[None, :], mask=value_mask, other=0.0)
            total = total * shrink + tl.sum(weight, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(DOT), values.to(DOT), input_precision="ieee")
            peak = higher
        inside = valid[:, None] & (d[None, :] < DIM)
        if PARTS == 1:
            mixed = tl.div_rn(mixed, tl.zeros_like(mixed) + tl.where(total == 0.0, 1.0, total)[:, None])
            tl.store(out + where[:, None] * DIM + d[None, :], as_stored(mixed, out), mask=inside)
        else:
            here = where * PARTS + part
            tl.store(part_out + here[:, None] * DIM + d[None, :], mixed, mask=inside)
            tl.store(part_peak + here, peak, mask=valid)
            tl.store(part_total + here, total, mask=valid)


@triton.jit
def merge_kernel(
    part_out,
    part_peak,
    part_total,
    highs,
    out,
    span,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """All heads of one row: its parts, in order. BLOCK >= HEADS. Rows see the positions from 0 on: no window."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (head[:, None] < HEADS) & (d[None, :] < DIM)
    where = row * HEADS + head
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, WIDTH), tl.float32)
    for part in range(tl.cdiv(tl.load(highs + row), span)):
        here = where * PARTS + part
        other = tl.load(part_peak + here, mask=head < HEADS, other=float("-inf"))
        higher = tl.maximum(peak, other)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(peak - level), tl.exp2(other - level)
        total = total * shrink + tl.load(part_total + here, mask=head < HEADS, other=0.0) * weight
        values = tl.load(part_out + here[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        mixed = mixed * shrink[:, None] + values * weight[:, None]
        peak = higher
    mixed = tl.div_rn(mixed, tl.zeros_like(mixed) + tl.where(total == 0.0, 1.0, total)[:, None])
    tl.store(out + where[:, None] * DIM + d[None, :], as_stored(mixed, out), mask=inside)


def attention_shape(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, longest: int, amd: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """BLOCK, WIDTH and launch options for rows whose longest span is `longest`: as large as goes without spills."""
    group = heads // kv_heads
    width = max(16, triton.next_power_of_2(dim))
    wide = dtype != torch.float32 and longest * group > 32 and not amd
    if dtype == torch.float32:
        # At 64 wide four warps spill on NVIDIA's.
        warps, stages = (8, 1) if width > 64 else (4, 1) if amd else (8 if width == 64 else 4, 2)
    elif wide:
        warps, stages = 8, 3
    else:
        warps, stages = 4, 2 if amd else 3
    block = max(64 if wide else 16, triton.next_power_of_2(group))
    return {"BLOCK": block, "WIDTH": width, "num_warps": warps, "num_stages": stages}


def parts_of(length: int, window: int | None) -> tuple[int, int]:
    """(parts, positions a part) of contexts up to `length`. Behind a window of few tiles a merge costs more than it
    saves."""
    if window is not None:
        return 1, length
    span = max(LEAST_PART, -(-length // (MOST_PARTS * TILE)) * TILE)
    return -(-length // span), span


def paged_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, turns: Tensor, store: Tensor, at: RaggedRows, *, tiled: bool = False
) -> Tensor:
    """As `paged_attention_torch`. With `tiled` all rows go through tiles of one shape, which fixes their sums."""
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    # Rows may be parts of longer ones, as those of merged projections are.
    q, k, v = (each if each.stride()[1:] == (dim, 1) else each.contiguous() for each in (q, k, v))
    out = torch.empty((n, heads, dim), dtype=q.dtype, device=q.device)
    if n == 0:
        return out
    width = kv_heads * dim
    write_kernel[(n,)](
        k,
        v,
        turns,
        store,
        at.table,
        at.rows,
        at.positions,
        k.stride(0),
        v.stride(0),
        at.table.stride(0),
        PAGE=at.page_size,
        WIDTH=width,
        DIM=dim,
        PAIRS=triton.next_power_of_2(max(width // 2, 1)),
        num_warps=1 if width <= 512 else 4,
    )
    longest = 1 if tiled else max(count for _, count in at.spans)
    shape = attention_shape(heads, kv_heads, dim, store.dtype, longest)
    parts, span = parts_of(at.length, at.window)
    scratch = [out, out, out]
    if parts > 1:
        scratch = [torch.empty((n, heads, parts, dim), dtype=torch.float32, device=q.device)]
        scratch += [torch.empty((n, heads, parts), dtype=torch.float32, device=q.device) for _ in range(2)]
    attend_kernel[(n, kv_heads, parts)](
        q,
        turns,
        store,
        at.table,
        at.rows,
        at.positions,
        at.firsts,
        at.highs,
        out,
        *scratch,
        n,
        q.stride(0),
        at.table.stride(0),
        span,
        dim**-0.5 * _LOG2_E,
        WINDOW=at.window or 0,
        PAGE=at.page_size,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        KEYS=TILE,
        PARTS=parts,
        DOT=tl.float32 if interpreted() else _TYPES[store.dtype],
        **shape,
    )
    if parts > 1:
        merge_kernel[(n,)](
            *scratch,
            at.highs,
            out,
            span,
            HEADS=heads,
            DIM=dim,
            WIDTH=shape["WIDTH"],
            BLOCK=triton.next_power_of_2(heads),
            PARTS=parts,
            num_warps=4,
        )
    return out
