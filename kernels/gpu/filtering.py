"""Between the passes of drafts, in Triton: one launch each. `filtering` says what they do."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels import filtering
from fastblt.kernels.cpu import decoder_steps
from fastblt.kernels.filtering import Filtering
from fastblt.kernels.rounds import Stepping

_ROWS = 128
_FEW = tl.constexpr(filtering.FEW)
_ALONE = tl.constexpr(decoder_steps.ALONE)
_PASSED = tl.constexpr(decoder_steps.PASSED)
_CORRECTED = tl.constexpr(decoder_steps.CORRECTED)


@triton.jit(do_not_specialize=["width", "block_width"])
def turn_kernel(
    starts,
    wanted,
    longest,
    done,
    steps,
    bad,
    origins,
    block_starts,
    block_causals,
    block_sizes,
    block_steps,
    block_bad,
    blocks,
    fixed,
    row_starts,
    row_accepted,
    row_bad,
    width,
    block_width,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One request; lines of `origins` have `width` places, those of `blocks` and `fixed` `block_width`."""
    request = tl.program_id(0)
    at = tl.arange(0, TILE)
    so_far = tl.load(done + request)
    flaws = tl.load(bad + request)
    if tl.load(block_causals + request) > 0:
        end = so_far + 1 + tl.load(row_accepted + request)
        origin = tl.where(at == so_far, _ALONE, tl.where(at < end, _PASSED, _CORRECTED))
        new = (at >= so_far) & (at <= end) & (at < width)
        tl.store(origins + request * width + at, origin, mask=new)
        so_far = end + 1
        flaws = flaws | tl.load(block_bad + request) | tl.load(row_bad + request)
        taken = tl.load(steps + request) + tl.load(block_steps + request) + 1
        tl.store(done + request, so_far)
        tl.store(steps + request, taken)
        tl.store(bad + request, flaws)
    missing = tl.load(wanted + request) - so_far
    active = (missing > _FEW) & (flaws == 0)
    begin = tl.load(starts + request) + so_far
    tl.store(block_starts + request, begin)
    tl.store(row_starts + request, begin + 1)
    tl.store(block_causals + request, active.to(tl.int32))
    tl.store(block_sizes + request, tl.where(active, tl.minimum(tl.load(longest + request), missing - 1), 0))
    tl.store(block_bad + request, 0)
    tl.store(row_bad + request, 0)
    inside = at < block_width
    tl.store(blocks + request * block_width + at, tl.full((TILE,), MASK, tl.int32), mask=inside)
    tl.store(fixed + request * block_width + at, tl.zeros((TILE,), tl.int32), mask=inside)


@triton.jit(do_not_specialize=["requests"])
def next_rows_kernel(starts, limits, done, row_starts, row_causals, row_bad, requests, TILE: tl.constexpr):
    """TILE requests."""
    request = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = request < requests
    so_far = tl.load(done + request, mask=there, other=0) + tl.load(row_causals + request, mask=there, other=0)
    live = (so_far < tl.load(limits + request, mask=there, other=0)) & (
        tl.load(row_bad + request, mask=there, other=0) == 0
    )
    tl.store(done + request, so_far, mask=there)
    tl.store(row_starts + request, tl.load(starts + request, mask=there, other=0) + so_far, mask=there)
    tl.store(row_causals + request, live.to(tl.int32), mask=there)


def turn_triton(these: Filtering, mask: int) -> None:
    """As `turn_torch`."""
    block, rows = these.block, these.filter
    width, block_width = these.origins.shape[1], block.blocks.shape[1]
    turn_kernel[(len(these.done),)](
        these.starts, these.wanted, these.longest, these.done, these.steps, these.bad, these.origins, block.starts,
        block.causals, block.sizes, block.steps, block.bad, block.blocks, block.fixed, rows.starts, rows.accepted,
        rows.bad, width, block_width, MASK=mask, TILE=triton.next_power_of_2(max(width, block_width)), num_warps=1,
    )  # fmt: skip


def next_rows_triton(rows: Stepping, starts: Tensor, limits: Tensor, done: Tensor) -> None:
    """As `next_rows_torch`."""
    count = len(done)
    next_rows_kernel[(triton.cdiv(count, _ROWS),)](
        starts, limits, done, rows.starts, rows.causals, rows.bad, count, TILE=_ROWS
    )
