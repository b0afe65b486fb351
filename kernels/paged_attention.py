"""Self-attention over paged caches: rotates queries and keys, writes keys and values, attends.

Each of N rows belongs to a request (a row of the page table) and has a position. It sees the keys of one contiguous
range [lo, hi) of its own request's positions. Causal rows, tentative rows and the bidirectional rows of a block differ
only in these two integers (design §3). With a window, lo = max(0, first - window + 1), where `first` is the row's own
position, or its block's start; without one, lo = 0. First, every row's key is rotated and written, with its value, to
the slot of its position. Then every row's rotated query attends over its range: out = softmax(q k^T / sqrt(D)) v.

Shapes: q [N, H, D], k and v [N, Hkv, D] unrotated; turns fp32 [positions, D/2, 2], cosine and sine; store
[slots, 2, Hkv, D], keys then values, slot = page * page_size + position % page_size; table int32 [requests, pages],
entry p // page_size is the page of position p; rows, positions, firsts, highs int32 [N]. Returns [N, H, D].
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastblt.kernels.attention import TILE, masked_attention
from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.structs import Places
from fastblt.kernels.cpu.threads import threads
from fastblt.kernels.types import RaggedRows


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, turns: Tensor, store: Tensor, at: RaggedRows, *, tiled: bool = False
) -> Tensor:
    """Attention output [N, H, D]; see the module. Writes to `store`.

    `tiled` makes a row's result in torch independent of other rows. In C it always is.
    """
    if use_triton(q.device):
        from fastblt.kernels.gpu.paged_attention import paged_attention_triton

        return paged_attention_triton(q, k, v, turns, store, at, tiled=tiled)
    if q.dtype == torch.float32 and has_native(store) and (native := library()) is not None:
        return _attend_native(native, q, k, v, turns, store, at)
    return paged_attention_torch(q, k, v, turns, store, at, tiled=tiled)


class PagedAttention:
    """The self-attention of one pass, as a module calls it: a store for each layer, and the places of the rows."""

    def __init__(
        self,
        stores: list[Tensor],
        turns: Tensor,
        at: RaggedRows,
        *,
        tiled: bool = False,
        native: bool = False,
        pointers: ctypes.Array[ctypes.c_void_p] | None = None,
    ) -> None:
        self.stores, self.turns, self.at = stores, turns, at
        self._tiled = tiled
        #: The addresses of the stores, for the C code.
        self.pointers = pointers_of(stores) if pointers is None else pointers
        #: Whether the C code runs it.
        self.native = native

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paged_attention(q, k, v, self.turns, self.stores[layer], self.at, tiled=self._tiled)


def pointers_of(stores: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """The addresses of stores, which must outlive the result."""
    return (ctypes.c_void_p * len(stores))(*(store.data_ptr() for store in stores))


def has_native(store: Tensor) -> bool:
    """Whether the C code can use a store [slots, 2, Hkv, D]."""
    whole = store.shape[-1] % 8 == 0  # the C code works on vectors of eight
    fits = store.device.type == "cpu" and store.dtype == torch.float32 and whole and not use_triton(store.device)
    return fits and library() is not None


def places_of(turns: Tensor, at: RaggedRows) -> Places:
    """The places of the rows as the C code's struct. The tensors must outlive it."""
    tensors = (turns, at.table, at.rows, at.positions, at.firsts, at.highs)
    sizes = (at.window or 0, at.table.stride(0), at.page_size)
    return Places(*(tensor.data_ptr() for tensor in tensors), *sizes)


def _attend_native(
    native: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, turns: Tensor, store: Tensor, at: RaggedRows
) -> Tensor:
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    n, heads, dim = q.shape
    rows = (pointer.data_ptr() for pointer in (q, k, v))
    sizes = (n, heads, k.shape[1], dim, threads())
    if native.fastblt_paged_attention(*rows, places_of(turns, at), store.data_ptr(), *sizes, out.data_ptr()):
        raise MemoryError("paged attention could not allocate its scratch space")
    return out


def paged_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, turns: Tensor, store: Tensor, at: RaggedRows, *, tiled: bool = False
) -> Tensor:
    """The same in torch, for devices and dtypes without a kernel. Copies the keys and values of each request first."""
    page = at.page_size
    positions = at.positions.long()
    own = turns[positions]
    q, k = _rotate(q, own), _rotate(k, own)
    slots = at.table[at.rows.long(), positions // page].long() * page + positions % page
    store.index_copy_(0, slots, torch.stack((k, v), 1).to(store.dtype))
    out = torch.empty_like(q)
    # All requests with one row share one batch. A request with more rows is a batch of its own, with one copy of keys.
    single = [first for first, count in at.spans if count == 1]
    if single:
        index = torch.tensor(single, device=q.device)
        out[index] = _attend(q[index, None], index, store, at, tiled)[:, 0]
    for first, count in at.spans:
        if count > 1:
            index = torch.arange(first, first + count, device=q.device)
            out[index] = _attend(q[None, index], index[None], store, at, tiled)[0]
    return out


def _attend(q: Tensor, index: Tensor, store: Tensor, at: RaggedRows, tiled: bool) -> Tensor:
    """Attention output for q [R, Q, H, D]. `index` ([R] or [1, Q]) are its rows in the pass; Q is within a request."""
    index = index.view(q.shape[0], q.shape[1])
    lows, highs = at.lows[index], at.highs[index]
    base = lows.amin(1) // TILE * TILE
    span = int((highs.amax(1) - base).max())
    span = -(-span // TILE) * TILE
    keys = base[:, None] + torch.arange(span, device=q.device)
    pages = at.table[at.rows[index[:, 0]].long()[:, None], (keys // at.page_size).clamp_max(at.table.shape[1] - 1)]
    both = store[pages.long() * at.page_size + keys % at.page_size]
    mask = (keys[:, None] >= lows[..., None]) & (keys[:, None] < highs[..., None])
    # Slots outside all ranges may never have been written. A NaN there would reach the sums even with weight 0.
    both = both.masked_fill(~mask.any(1)[..., None, None, None], 0.0)
    return masked_attention(q, both[:, :, 0], both[:, :, 1], mask, tiled=tiled)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.unsqueeze(-3).to(x.dtype).unbind(-1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
