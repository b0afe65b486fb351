"""How the bytes of a pass's rows are drawn, in Triton: one launch. `row_draws` says what it does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels import rounds
from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.types import SelectionParams

_ROWS = 128
_OWNER = tl.constexpr(rounds.OWNER)
_POSITION = tl.constexpr(rounds.POSITION)
_BLOCK = tl.constexpr(rounds.BLOCK)


@triton.jit(do_not_specialize=["size", "values_stride", "integers_stride"])
def row_draws_kernel(
    rows, size, values, integers, eos_from, values_stride, integers_stride, floats, longs, forbid_eos,
    TILE: tl.constexpr,
):  # fmt: skip
    """TILE rows of a pass of `size`: `floats` [3, size] get temperature, top-p and min-p, `longs` [3, size] top-k, seed
    and position."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = at < size
    owner = tl.load(rows + _OWNER * size + at, mask=there, other=0)
    causal = tl.load(rows + _BLOCK * size + at, mask=there, other=0) < 0
    position = tl.load(rows + _POSITION * size + at, mask=there, other=0) + causal.to(tl.int32)
    for line in tl.static_range(3):
        value = tl.load(values + line * values_stride + owner, mask=there, other=0.0)
        tl.store(floats + line * size + at, value, mask=there)
    for line in tl.static_range(2):
        number = tl.load(integers + line * integers_stride + owner, mask=there, other=0)
        tl.store(longs + line * size + at, number, mask=there)
    tl.store(longs + 2 * size + at, position.to(tl.int64), mask=there)
    tl.store(forbid_eos + at, position < tl.load(eos_from + owner, mask=there, other=0), mask=there)


def row_draws_triton(draws: Draws, rows: Tensor) -> SelectionParams:
    """As `row_draws_torch`; rows are contiguous."""
    size, device = rows.shape[1], rows.device
    floats = torch.empty(3, size, dtype=torch.float32, device=device)
    longs = torch.empty(3, size, dtype=torch.int64, device=device)
    forbid_eos = torch.empty(size, dtype=torch.bool, device=device)
    row_draws_kernel[(triton.cdiv(size, _ROWS),)](
        rows, size, draws.values, draws.integers, draws.eos_from, draws.values.stride(0), draws.integers.stride(0),
        floats, longs, forbid_eos, TILE=_ROWS,
    )  # fmt: skip
    return SelectionParams(
        temperature=floats[0],
        top_p=floats[1],
        min_p=floats[2],
        top_k=longs[0],
        seeds=longs[1],
        positions=longs[2],
        forbid_eos=forbid_eos,
        sampled=True,
        truncated=True,
        penalized=False,
    )
