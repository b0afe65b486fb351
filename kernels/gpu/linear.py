"""Products of rows and weights that do not depend on how many rows there are, for deterministic engines.

A library chooses its kernel, and with it the order of a sum, by the number of rows. Here every program makes a tile of
ROWS x COLUMNS sums, always in the same order. It reads weights as often as there are tiles of rows, which costs little
for few rows and much for a prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.backend import interpreted
from fastblt.kernels.gpu.rounding import as_stored

ROWS, COLUMNS, DEPTH = 16, 64, 64
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    weight,
    out,
    rows,
    columns,
    depth,
    x_stride,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of x [rows, depth] times the transpose of weight [columns, depth]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for base in range(0, depth, DEPTH):
        near = base + k < depth
        left = tl.load(
            x + row.to(tl.int64)[:, None] * x_stride + base + k[None, :],
            mask=(row < rows)[:, None] & near[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column.to(tl.int64)[None, :] * depth + base + k[:, None],
            mask=(column < columns)[None, :] & near[:, None],
            other=0.0,
        )
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, as_stored(total, out), mask=(row < rows)[:, None] & (column < columns)[None, :])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, in] times weight [out, in], transposed: [N, out]. A row's result has the same bits whatever N is."""
    rows, columns = len(x), len(weight)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows:
        linear_kernel[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS))](
            x, weight, out, rows, columns, x.shape[1], x.stride(0),
            DOT=tl.float32 if interpreted() else _TYPES[x.dtype],
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
