"""Between the passes of a round, in Triton: one launch lays out rows, one settles bytes. `rounds` says what they do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.rounds import Chosen, Stepping

_ROWS = 128
_MOST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["size", "width", "requests"])
def place_kernel(
    rows,
    size,
    width,
    requests,
    owners,
    starts,
    causals,
    sizes,
    latents,
    blocks,
    block_stride,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE rows of a pass of `size`."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = at < size
    request = tl.minimum(at // width, requests - 1)
    offset = at - request * width
    causal = tl.load(causals + request)
    count = causal + tl.load(sizes + request)
    start = tl.load(starts + request)
    inside = offset < count
    behind = inside & (offset >= causal)
    position = tl.where(inside, start + offset, 0)
    tl.store(rows + at, tl.where(inside, tl.load(owners + request), 0), mask=there)
    tl.store(rows + size + at, position, mask=there)
    tl.store(rows + 2 * size + at, tl.where(behind, start + count, position + 1), mask=there)
    tl.store(rows + 3 * size + at, tl.where(behind, start + causal, position), mask=there)
    tl.store(rows + 4 * size + at, tl.where(inside, tl.load(latents + request), 0), mask=there)
    own = tl.full((TILE,), -1, tl.int32)
    if BLOCKS:
        own = tl.load(blocks + request * block_stride + offset - causal, mask=behind, other=-1)
    tl.store(rows + 5 * size + at, own, mask=there)


@triton.jit(do_not_specialize=["step"])
def settle_kernel(
    ids,
    confidences,
    entropies,
    bads,
    first_rows,
    owners,
    starts,
    causals,
    selects,
    sizes,
    rules,
    lasts,
    mosts,
    bounds,
    blocks,
    fixed,
    chosen,
    accepted,
    steps,
    bad_out,
    left,
    texts,
    text_stride,
    pad,
    step,
    chosen_stride,
    block_stride,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request."""
    request = tl.program_id(0)
    size = tl.load(sizes + request)
    going = (step == 1) | (tl.load(left + request) > 0)
    causal = tl.load(causals + request)
    end = tl.load(starts + request) + causal
    row = tl.load(first_rows + request)
    text = texts + tl.load(owners + request).to(tl.int64) * text_stride + pad
    i = tl.arange(0, BLOCK)
    flaws = tl.load(bad_out + request)
    opening = tl.full((), -1, tl.int32)
    if step == 1:
        select = tl.load(selects + request)
        inside = i < select
        place = row + causal - select + i
        byte = tl.load(ids + place, mask=inside, other=0)
        at = end - select + 1 + i
        verified = i + 1 < select
        stands = tl.load(text + at, mask=verified, other=-1)
        agreed = tl.min(tl.where(verified & (stands == byte), BLOCK, i), 0)
        tl.debug_barrier()
        tl.store(text + at, byte, mask=inside)
        tl.store(chosen + request * chosen_stride + i, byte.to(tl.int32), mask=inside)
        tl.store(accepted + request, tl.where(select > 0, agreed, 0))
        broken = tl.load(bads + place, mask=inside, other=0).to(tl.int32)
        flaws = flaws | tl.max(broken & 1, 0) | tl.max(broken & 2, 0)
        newest = tl.max(tl.where(i == select - 1, byte, -1), 0).to(tl.int32)
        opening = tl.where(size > 0, newest, opening)
        row += causal
    here = (i < size) & going
    block = tl.load(blocks + request * block_stride + i, mask=here, other=0)
    turns = tl.load(fixed + request * block_stride + i, mask=here, other=0)
    opened = (i == 0) & (opening >= 0)
    block = tl.where(opened, opening, block)
    turns = tl.where(opened, 1, turns)
    masked = here & (block == MASK)
    byte = tl.load(ids + row + i, mask=masked, other=0).to(tl.int32)
    confident = tl.load(confidences + row + i, mask=masked, other=-1.0)
    confident = tl.where(confident != confident, 0.0, confident)
    best = tl.max(confident, 0)
    first = tl.min(tl.where(confident == best, i, BLOCK), 0)
    bound = tl.load(bounds + request)
    by_confidence = (confident > bound) | (i == first)
    # The same numbers down the rows: other[j, i] stands before i when it is less, or equal and j < i.
    j = tl.arange(0, BLOCK)[:, None]
    mine = tl.load(entropies + row + i, mask=masked, other=float("inf"))
    mine = tl.where(mine != mine, _MOST, mine)
    j_here = (j < size) & going
    j_block = tl.load(blocks + request * block_stride + j, mask=j_here, other=0)
    j_masked = j_here & (j_block == MASK) & ((j > 0) | (opening < 0))
    other = tl.load(entropies + row + j, mask=j_masked, other=float("inf"))
    other = tl.where(other != other, _MOST, other)
    before = j_masked & ((other < mine[None, :]) | ((other == mine[None, :]) & (j < i[None, :])))
    spent = tl.sum(tl.where(before, other.to(tl.float64), 0.0), 0)
    rank = tl.sum(before.to(tl.int32), 0)
    rule = tl.load(rules + request)
    inclusive = spent + tl.where(masked, mine, 0.0).to(tl.float64)
    by_entropy = (tl.where(rule == 2, spent, inclusive) <= bound.to(tl.float64)) | (rank == 0)
    everything = (rule == 3) | (tl.load(lasts + request) == step)
    picked = masked & (everything | tl.where(rule == 0, by_confidence, by_entropy))
    block = tl.where(picked, byte, block)
    # All lanes have read the block before it changes.
    tl.debug_barrier()
    tl.store(blocks + request * block_stride + i, block, mask=here)
    tl.store(fixed + request * block_stride + i, tl.where(picked, step, turns), mask=here)
    broken = tl.load(bads + row + i, mask=masked, other=0).to(tl.int32)
    flaws = flaws | tl.max(broken & 1, 0) | tl.max(broken & 2, 0)
    still = (tl.max((masked & (picked == 0)).to(tl.int32), 0) != 0) & (step < tl.load(mosts + request))
    tl.store(bad_out + request, flaws)
    tl.store(left + request, tl.where(still, size, 0))
    if going:
        tl.store(steps + request, step)
    tl.store(text + end + i, block.to(tl.int64), mask=here & (still == 0))


def place_triton(
    rows: Tensor, width: int, owners: Tensor, starts: Tensor, causals: Tensor, sizes: Tensor, latents: Tensor,
    blocks: Tensor | None,
) -> None:  # fmt: skip
    """As `place_torch`."""
    size = rows.shape[1]
    place_kernel[(triton.cdiv(size, _ROWS),)](
        rows, size, width, len(owners), *(each.contiguous() for each in (owners, starts, causals, sizes, latents)),
        owners if blocks is None else blocks, 0 if blocks is None else blocks.stride(0),
        BLOCKS=blocks is not None, TILE=_ROWS,
    )  # fmt: skip


def settle_triton(made: Chosen, first_rows: Tensor, these: Stepping, texts: RequestIds, step: int, mask: int) -> None:
    """As `settle_torch`. What `chosen` has behind a request's selected rows stays as it was."""
    columns = (
        these.owners, these.starts, these.causals, these.selects, these.sizes, these.rules, these.lasts, these.mosts,
        these.bounds,
    )  # fmt: skip
    widest = max(these.blocks.shape[1], these.chosen.shape[1])
    settle_kernel[(len(first_rows),)](
        made.ids, made.confidence, made.entropy, made.bad, first_rows.contiguous(),
        *(column.contiguous() for column in columns),
        these.blocks, these.fixed, these.chosen, these.accepted, these.steps, these.bad, these.left,
        texts.ids, texts.ids.stride(0), texts.pad, step, these.chosen.stride(0), these.blocks.stride(0),
        MASK=mask, BLOCK=max(32, triton.next_power_of_2(widest)), num_warps=4,
    )  # fmt: skip
