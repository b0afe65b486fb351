"""What stands between the products of a layer, in one launch each: sums and norms, SwiGLU, entropies.

`models/merged.py` calls them. Sums are fp32; what a layer of torch's would round to the storage's type between two
operations is rounded here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.rounding import as_stored
from fastblt.kernels.noise import VOCABULARY

_LOGITS = 512


@triton.jit
def add_norm_kernel(
    x,
    delta,
    gain,
    total,
    normed,
    size,
    eps,
    TIMES: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: delta + TIMES x (TIMES 0: x alone) into `total`, and its RMS norm into `normed`."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    wide = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    if TIMES > 0:
        added = tl.load(delta + row + at, mask=inside, other=0.0).to(tl.float32) + wide
        if TIMES == 2:
            added = as_stored(added, total).to(tl.float32) + wide
        stored = as_stored(added, total)
        tl.store(total + row + at, stored, mask=inside)
        wide = stored.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
        plain = as_stored(wide * scale, normed).to(tl.float32)
        gains = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + row + at, as_stored(plain * gains, normed), mask=inside)


@triton.jit
def norm_many_kernel(x, gains, out, size, eps, BLOCK: tl.constexpr):
    """One row under the gains of one layer: x [rows, size], gains [layers, size], out [layers, rows, size]."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    wide = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    plain = as_stored(wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps), out).to(tl.float32)
    gain = tl.load(gains + layer * size + at, mask=inside, other=0.0).to(tl.float32)
    place = (layer * tl.num_programs(0) + row) * size
    tl.store(out + place + at, as_stored(plain * gain, out), mask=inside)


@triton.jit
def swiglu_kernel(both, out, size, BLOCK: tl.constexpr):
    """silu(gate) * up of one row, BLOCK numbers: `both` has gate and up behind one another."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(both + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    bent = as_stored(gate / (1.0 + tl.exp(-gate)), out).to(tl.float32)
    tl.store(out + row * size + at, as_stored(bent * up, out), mask=inside)


@triton.jit
def entropy_kernel(logits, out, VOCABULARY: tl.constexpr, TILE: tl.constexpr):
    """The entropy of one row of logits, in nats."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    inside = lanes < VOCABULARY
    scores = tl.load(logits + row * VOCABULARY + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    x = scores - tl.max(scores, 0)
    e = tl.where(inside, tl.exp(x), 0.0)
    total = tl.sum(e, 0)
    log_p = tl.where(inside, x - tl.log(total), 0.0)
    tl.store(out + row, -tl.sum(e / total * log_p, 0))


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8


def add_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor | None, eps: float, *, times: int = 1
) -> tuple[Tensor, Tensor]:
    """delta + times x of rows [N, d] (x itself without `delta`), and its RMS norm under `gain` [d], if one is given."""
    size = x.shape[1]
    block = triton.next_power_of_2(size)
    total = x if delta is None else torch.empty_like(x)
    normed = x if gain is None else torch.empty_like(x)
    add_norm_kernel[(len(x),)](
        x, x if delta is None else delta, x if gain is None else gain, total, normed, size, eps,
        TIMES=0 if delta is None else times, NORM=gain is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, normed


def norm_many(x: Tensor, gains: Tensor, eps: float) -> Tensor:
    """RMS norms [C, N, d] of rows [N, d] under each of the gains [C, d]."""
    out = torch.empty((len(gains), *x.shape), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    norm_many_kernel[(len(x), len(gains))](x, gains, out, x.shape[1], eps, BLOCK=block, num_warps=_warps(block))
    return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up [N, F] of [N, 2 F], gate first."""
    size = both.shape[1] // 2
    out = torch.empty((len(both), size), dtype=both.dtype, device=both.device)
    block = min(1024, triton.next_power_of_2(size))
    swiglu_kernel[(len(both), triton.cdiv(size, block))](both, out, size, BLOCK=block)
    return out


def entropies(logits: Tensor) -> Tensor:
    """Entropies fp32 [N] (nats) of logits [N, 260], as `models.patching.entropies`."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    entropy_kernel[(len(logits),)](logits, out, VOCABULARY=VOCABULARY, TILE=_LOGITS)
    return out
