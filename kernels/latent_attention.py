"""The decoder's cross-attention: every row attends to the K keys of one patch's latent, without positional encoding
(BLT, arXiv 2412.09871, section 3.3).

    out = softmax(q k^T / sqrt(D)) v  per head

Shapes: K keys in a latent (1 to 4), H query heads of size D, and Hkv key heads, of which H is a multiple.
`latent_attention` takes each row's keys and values: q [..., H, D], k and v [..., K, Hkv, D]. `stored_latent_attention`
reads them from the store: q [N, H, D], store [slots, C, 2, K, Hkv, D] (C cross-attention layers; keys, then values),
slots int32 or int64 [N].
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import threads

#: Keys of a latent that the C code has room for; the same number is in latent_attention.c.
MOST_KEYS = 64


def latent_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output [..., H, D]. Plain products: K is too small for a fused kernel to gain on them."""
    heads, dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    if heads != kv_heads:
        k = k.repeat_interleave(heads // kv_heads, dim=-2)
        v = v.repeat_interleave(heads // kv_heads, dim=-2)
    weights = torch.softmax((q.unsqueeze(-3) * k).sum(-1).float() * dim**-0.5, dim=-2).to(q.dtype)
    return (weights.unsqueeze(-1) * v).sum(-3)


def stored_latent_attention(q: Tensor, store: Tensor, layer: int, slots: Tensor) -> Tensor:
    """Attention output [N, H, D] of cross-attention layer `layer` over the stored latents at `slots`."""
    if use_triton(q.device):
        from fastblt.kernels.gpu.latent_attention import stored_latent_attention_triton

        return stored_latent_attention_triton(q.contiguous(), store, layer, slots)
    if q.device.type == "cpu" and q.dtype == torch.float32 and store.dtype == torch.float32:
        native = library()
        if native is not None:
            return _attend_native(native, q.contiguous(), store, layer, slots.int())
    return stored_latent_attention_torch(q, store, layer, slots)


def stored_latent_attention_torch(q: Tensor, store: Tensor, layer: int, slots: Tensor) -> Tensor:
    """The same in torch. It copies every row's latent first."""
    k, v = store[:, layer].index_select(0, slots).unbind(1)
    return latent_attention(q, k, v)


class StoredLatents:
    """The decoder's cross-attention for one pass: every row over the latent at its slot, int32 or int64 [N]."""

    def __init__(self, store: Tensor, slots: Tensor) -> None:
        self.store, self.slots = store, slots.int()

    @property
    def native(self) -> bool:
        """Whether the C code can read this store."""
        fits = self.store.device.type == "cpu" and self.store.dtype == torch.float32
        return fits and self.store.shape[3] <= MOST_KEYS and library() is not None

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        return stored_latent_attention(q, self.store, layer, self.slots)


def _attend_native(native: ctypes.CDLL, q: Tensor, store: Tensor, layer: int, slots: Tensor) -> Tensor:
    out = torch.empty_like(q)
    _, layers, _, keys, kv_heads, dim = store.shape
    one = 2 * keys * kv_heads * dim
    start = store.data_ptr() + layer * one * store.element_size()
    sizes = (layers * one, q.shape[0], q.shape[1], kv_heads, dim, keys, threads())
    if native.fastblt_latent_attention(q.data_ptr(), start, slots.data_ptr(), *sizes, out.data_ptr()):
        return stored_latent_attention_torch(q, store, layer, slots)
    return out
