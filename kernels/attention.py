"""Attention of queries over keys under a boolean mask: out = softmax(q k^T / sqrt(D)) v, per head, in fp32 sums.

Shapes: q [R, Q, H, D]; k and v [R, S, Hkv, D] with H a multiple of Hkv (query head h reads key head h // (H / Hkv));
mask bool [R, Q, S], True where the key is seen. A row that sees nothing gives zeros (tiled) or an unspecified finite
value (fused); callers never read it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keys are summed in tiles of this many absolute positions in deterministic mode.
TILE = 64


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, tiled: bool = False) -> Tensor:
    """Attention output [R, Q, H, D]; see the module for shapes.

    With `tiled`, a row's result depends neither on R and Q nor on how many masked keys surround its own (design §6.2).
    S must then be a multiple of TILE, with tiles aligned to absolute positions.
    """
    if tiled:
        return _tiled(q, k, v, mask)
    requests, queries, heads, dim = q.shape
    kv_heads = k.shape[2]
    groups = heads // kv_heads
    # Queries that share a key head become further rows of one product, so keys are never repeated.
    grouped = q.view(requests, queries, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(requests, kv_heads, groups * queries, dim)
    seen = mask if queries == 1 else mask.repeat(1, groups, 1)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen.unsqueeze(1))
    out = out.view(requests, kv_heads, groups, queries, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(requests, queries, heads, dim)


def _tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    requests, queries, heads, dim = q.shape
    size, kv_heads = k.shape[1], k.shape[2]
    assert size % TILE == 0, "tiled attention needs whole tiles"
    groups = heads // kv_heads
    wide_q = q.float().view(requests, queries, kv_heads, groups, dim) * dim**-0.5
    wide_k, wide_v = k.float(), v.float()
    # Only elementwise products, and sums along one axis of fixed size, so a row's result cannot depend on other rows.
    scores = []
    for start in range(0, size, TILE):
        tile = wide_k[:, None, start : start + TILE, :, None, :]
        score = (wide_q[:, :, None] * tile).sum(-1)
        scores.append(score.masked_fill(~mask[:, :, start : start + TILE, None, None], float("-inf")))
    best = torch.stack([score.amax(2) for score in scores]).amax(0)
    best = best.masked_fill(best == float("-inf"), 0.0)
    total = torch.zeros_like(best)
    out = torch.zeros_like(wide_q)
    for index, score in enumerate(scores):
        weight = torch.exp(score - best[:, :, None])
        tile = wide_v[:, None, index * TILE : (index + 1) * TILE, :, None, :]
        total = total + weight.sum(2)
        out = out + (weight[..., None] * tile).sum(2)
    out = out / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return out.view(requests, queries, heads, dim).to(q.dtype)
