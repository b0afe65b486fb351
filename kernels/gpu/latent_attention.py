"""The decoder's cross-attention in Triton: one launch a layer, and one that stores what it reads. `latent_attention`
has the mathematics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.gpu.rounding import as_stored


@triton.jit
def cross_kernel(
    q,
    store,
    slots,
    out,
    q_stride,
    slot_stride,
    layer_offset,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All heads of one row over the KEYS keys of its latent."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_TILE)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (head < HEADS) & (d < DIM)
    query = tl.load(q + row * q_stride + head * DIM + d, mask=inside, other=0.0).to(tl.float32)
    first = store + tl.load(slots + row).to(tl.int64) * slot_stride + layer_offset
    own = head // (HEADS // KV_HEADS) * DIM + d
    peak = tl.full((HEAD_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((HEAD_TILE,), tl.float32)
    mixed = tl.zeros((HEAD_TILE, WIDTH), tl.float32)
    for key in range(KEYS):
        keys = tl.load(first + key * KV_HEADS * DIM + own, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(first + (KEYS + key) * KV_HEADS * DIM + own, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(query * keys, 1) * scale
        higher = tl.maximum(peak, score)
        shrink, weight = tl.exp(peak - higher), tl.exp(score - higher)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * values
        peak = higher
    tl.store(out + row * HEADS * DIM + head * DIM + d, as_stored(mixed / total[:, None], out), mask=inside)


@triton.jit
def store_kernel(
    both, slots, store, patches, KEYS: tl.constexpr, LAYERS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr
):
    """Keys and values of one row of one latent in one layer: both [LAYERS, patches, KEYS, 2, HALF]."""
    patch = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    key = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, TILE)
    inside = at < HALF
    source = both + ((layer * patches + patch) * KEYS + key) * 2 * HALF
    target = store + (tl.load(slots + patch).to(tl.int64) * LAYERS + layer) * 2 * KEYS * HALF + key * HALF
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)
    tl.store(target + KEYS * HALF + at, tl.load(source + HALF + at, mask=inside), mask=inside)


def stored_latent_attention_triton(q: Tensor, store: Tensor, layer: int, slots: Tensor) -> Tensor:
    """As `stored_latent_attention_torch`, with sums in fp32."""
    rows, heads, dim = q.shape
    keys, kv_heads = store.shape[3:5]
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    if rows:
        cross_kernel[(rows,)](
            q, store, slots, out, q.stride(0), store.stride(0), layer * store.stride(1), dim**-0.5,
            HEADS=heads, KV_HEADS=kv_heads, DIM=dim, KEYS=keys,
            HEAD_TILE=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out


def store_latents(both: Tensor, store: Tensor, slots: Tensor) -> None:
    """Store keys and values [C, P k, 2 Hkv D] of P latents at `slots` int32 [P] of `store` [slots, C, 2, k, Hkv, D]."""
    layers, keys, half = store.shape[1], store.shape[3], store.shape[4] * store.shape[5]
    patches = len(slots)
    store_kernel[(patches, layers, keys)](
        both, slots, store, patches, KEYS=keys, LAYERS=layers, HALF=half, TILE=triton.next_power_of_2(half)
    )
