"""Selection and one unmasking step in one launch. `unmasking` has the mathematics.

One program a position: it selects from its row, leaves what it found in scratch memory and counts itself in. The last
program of a block to arrive finds all of them there and chooses the positions; so no second launch is needed, and rows
run in parallel. A position that is not masked reads no logits. A causal row is a block whose first position alone is
masked, under `one_step`: so requests of all methods share one launch.

The choice compares all pairs of a block: position j stands before i when H_j < H_i, or H_j = H_i and j < i; the sum
over those before i is the prefix sum of the ascending order, without a sort.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.selection import TILE, WARPS, columns_of, select_row
from fastblt.kernels.types import SelectionParams, Unmasked

_MOST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _choose(block, size, rule, bound, last_step, masked, confidences, entropies, BLOCK: tl.constexpr):
    """picked int1 [BLOCK] of one block, from what its rows left in scratch memory."""
    i = tl.arange(0, BLOCK)
    here = tl.load(masked + block * size + i, mask=i < size, other=0) != 0
    # Scratch was written by other programs: read it past the first cache, which may hold older lines.
    confident = tl.load(confidences + block * size + i, mask=here, other=-1.0, cache_modifier=".cg")
    confident = tl.where(confident != confident, 0.0, confident)
    best = tl.max(confident, 0)
    first = tl.min(tl.where(confident == best, i, BLOCK), 0)
    by_confidence = (confident > bound) | (i == first)

    rows = tl.arange(0, BLOCK)[:, None]
    row_here = tl.load(masked + block * size + rows, mask=rows < size, other=0) != 0
    mine = tl.load(entropies + block * size + i, mask=here, other=float("inf"), cache_modifier=".cg")
    mine = tl.where(mine != mine, _MOST, mine)
    other = tl.load(entropies + block * size + rows, mask=row_here, other=float("inf"), cache_modifier=".cg")
    other = tl.where(other != other, _MOST, other)
    before = row_here & ((other < mine[None, :]) | ((other == mine[None, :]) & (rows < i[None, :])))
    spent = tl.sum(tl.where(before, other.to(tl.float64), 0.0), 0)
    rank = tl.sum(before.to(tl.int32), 0)
    limit = bound.to(tl.float64)
    inclusive = spent + tl.where(here, mine, 0.0).to(tl.float64)
    by_entropy = (tl.where(rule == 2, spent, inclusive) <= limit) | (rank == 0)
    everything = (rule == 3) | last_step
    return here & (everything | tl.where(rule == 0, by_confidence, by_entropy))


@triton.jit(do_not_specialize=["restricted"])
def unmask_kernel(
    columns,
    restricted,
    size,
    masked,
    ids,
    rules,
    bounds,
    last_steps,
    chosen_ids,
    chosen_logprobs,
    confidences,
    entropies,
    bads,
    arrivals,
    new_ids,
    new_masked,
    fixed,
    done,
    new_logprobs,
    block_bad,
    SAMPLED: tl.constexpr,
    TRUNCATED: tl.constexpr,
    PENALIZED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i selects at position i; the last one of a block picks what is fixed."""
    row = tl.program_id(0).to(tl.int64)
    block = row // size
    if tl.load(masked + row) != 0:
        chosen, logprob, confidence, entropy, bad = select_row(
            columns, restricted, row, SAMPLED, TRUNCATED, PENALIZED, TILE
        )
        tl.store(chosen_ids + row, chosen.to(tl.int64))
        tl.store(chosen_logprobs + row, logprob)
        tl.store(confidences + row, confidence)
        tl.store(entropies + row, entropy)
        tl.store(bads + row, bad)
    # All threads' stores come before the one thread that counts this program in.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel", scope="gpu")
    if arrived == size - 1:
        # Ready for the next launch on this stream.
        tl.atomic_xchg(arrivals + block, 0, sem="relaxed")
        rule = tl.load(rules + block)
        picked = _choose(
            block, size, rule, tl.load(bounds + block), tl.load(last_steps + block) != 0, masked, confidences,
            entropies, BLOCK,
        )  # fmt: skip
        i = tl.arange(0, BLOCK)
        inside = i < size
        at = block * size + i
        hidden = tl.load(masked + at, mask=inside, other=0) != 0
        left = hidden & (picked == 0)
        fresh = tl.load(chosen_ids + at, mask=hidden, other=0, cache_modifier=".cg")
        value = tl.load(chosen_logprobs + at, mask=hidden, other=0.0, cache_modifier=".cg")
        broken = tl.load(bads + at, mask=hidden, other=0, cache_modifier=".cg").to(tl.int32)
        broken = tl.where(hidden, broken, 0)
        tl.store(new_ids + at, tl.where(picked, fresh, tl.load(ids + at, mask=inside, other=0)), mask=inside)
        tl.store(new_masked + at, left, mask=inside)
        tl.store(new_logprobs + at, tl.where(picked, value, float("nan")), mask=inside)
        tl.store(fixed + block, tl.sum(picked.to(tl.int64), 0))
        tl.store(done + block, tl.sum(left.to(tl.int32), 0) == 0)
        tl.store(block_bad + block, tl.max(broken & 1, 0) | tl.max(broken & 2, 0))


@lru_cache(maxsize=16)
def _arrivals(device: torch.device, blocks: int) -> Tensor:
    """Counters that are zero between launches, made once a device and size."""
    with torch.inference_mode(False):
        return torch.zeros(blocks, dtype=torch.int32, device=device)


def unmask_triton(
    logits: Tensor,
    masked: Tensor,
    ids: Tensor,
    params: SelectionParams,
    rule: Tensor,
    bound: Tensor,
    last_step: Tensor,
    *,
    everything: bool = False,
) -> Unmasked:
    """As `unmask_torch`; statistics cost next to nothing here, so `everything` is no shortcut."""
    requests, size = masked.shape
    flat = logits.reshape(-1, logits.shape[-1])
    rows = requests * size
    scratch = [flat.new_empty(rows, dtype=torch.int64), *(flat.new_empty(rows, dtype=torch.float32) for _ in range(3))]
    bads = flat.new_empty(rows, dtype=torch.uint8)
    result = Unmasked(
        ids=torch.empty((requests, size), dtype=torch.int64, device=ids.device),
        masked=torch.empty((requests, size), dtype=torch.bool, device=ids.device),
        count=flat.new_empty(requests, dtype=torch.int64),
        done=flat.new_empty(requests, dtype=torch.bool),
        logprobs=flat.new_empty((requests, size), dtype=torch.float32),
        bad=flat.new_empty(requests, dtype=torch.uint8),
    )
    if rows:
        unmask_kernel[(rows,)](
            *columns_of(params, flat),
            size,
            masked.contiguous(),
            ids.contiguous(),
            rule.contiguous(),
            bound.contiguous(),
            last_step.contiguous(),
            *scratch,
            bads,
            _arrivals(flat.device, triton.next_power_of_2(requests)),
            result.ids,
            result.masked,
            result.count,
            result.done,
            result.logprobs,
            result.bad,
            SAMPLED=params.sampled,
            TRUNCATED=params.truncated and params.sampled,
            PENALIZED=params.penalized,
            TILE=TILE,
            BLOCK=max(32, triton.next_power_of_2(size)),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return result
