"""All layers of a module over the rows of a pass, in one call: `models.layers.Stack` on a CPU, in fp32.

In torch, or with a call for each part of a layer, a small model's layers cost more in calls than in arithmetic. Here
`threads()` of them share the rows of the pass; every row is computed as if it were alone.

Shapes: x [N, d] fp32; the rows and their caches as in `kernels.paged_attention`, the latents as in
`kernels.latent_attention`. Returns a new tensor [N, d].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.dense import Norm, Packed
from kernels.latent_attention import StoredLatents
from kernels.native import library, threads
from kernels.paged_attention import PagedAttention, Places


@dataclass(frozen=True)
class CrossWeights:
    """Of a cross-attention: the norm before its queries, and two maps."""

    norm: Norm
    queries: Packed
    out: Packed


@dataclass(frozen=True)
class LayerWeights:
    """Of a layer, and of the cross-attention that goes before it."""

    norm: Norm
    queries: Packed
    keys: Packed
    values: Packed
    out: Packed
    inner_norm: Norm
    gate: Packed
    up: Packed
    down: Packed
    cross: CrossWeights | None = None


class PackedStack:
    """Weights of layers with heads of `dim`, as the C code takes them."""

    def __init__(self, layers: Sequence[LayerWeights], dim: int) -> None:
        one = layers[0]
        # What the pointers point to must live.
        self._weights = layers
        self._layers = (_Layer * len(layers))(*map(_as_struct, layers))
        heads, kv_heads = one.queries.outputs // dim, one.keys.outputs // dim
        self.module = _Module(self._layers, len(layers), one.queries.inputs, one.gate.outputs, heads, kv_heads, dim)


def run(stack: PackedStack, x: Tensor, attend: PagedAttention, latents: StoredLatents | None = None) -> Tensor:
    """See the module. Raises MemoryError."""
    function = _entry()
    assert function is not None
    x = x.clone(memory_format=torch.contiguous_format)
    caches = (ctypes.c_void_p * len(attend.stores))(*(store.data_ptr() for store in attend.stores))
    read = None
    if latents is not None:
        _, _, _, keys, kv_heads, dim = latents.store.shape
        whole, one = latents.store.stride(0), 2 * keys * kv_heads * dim
        read = _Latents(latents.store.data_ptr(), latents.slots.data_ptr(), whole, one, keys)
    places = Places.of(attend.turns, attend.at)
    if function(stack.module, caches, places, read, x.shape[0], threads(), x.data_ptr()):
        raise MemoryError("a module could not allocate its scratch space")
    return x


def fits(attend: object, latents: object = None) -> bool:
    """Whether `run` can take this attention and these latents."""
    if not isinstance(attend, PagedAttention) or not attend.native or _entry() is None:
        return False
    return latents is None or (isinstance(latents, StoredLatents) and latents.native)


_POINTERS = (
    *("cross_gain", "cross_queries", "cross_out", "gain", "queries", "keys", "values", "out"),
    *("inner_gain", "gate", "up", "down"),
)


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [
        (name, ctypes.c_float) for name in ("cross_eps", "eps", "inner_eps")
    ]


class _Module(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer))] + [
        (name, ctypes.c_int64) for name in ("count", "size", "inner", "heads", "kv_heads", "dim")
    ]


class _Latents(ctypes.Structure):
    _fields_ = [("store", ctypes.c_void_p), ("slots", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("slot_size", "layer_size", "keys")
    ]


def _as_struct(layer: LayerWeights) -> _Layer:
    cross = layer.cross
    before = (None, None, None) if cross is None else (cross.norm.pointer, cross.queries.pointer, cross.out.pointer)
    maps = [one.pointer for one in (layer.queries, layer.keys, layer.values, layer.out)]
    inner = [one.pointer for one in (layer.gate, layer.up, layer.down)]
    eps = (0.0 if cross is None else cross.norm.eps, layer.norm.eps, layer.inner_norm.eps)
    return _Layer(*before, layer.norm.pointer, *maps, layer.inner_norm.pointer, *inner, *eps)


@cache
def _entry() -> Callable[..., int] | None:
    """The C function, with its argument types said once."""
    native = library("stack")
    if native is None:
        return None
    function = native.fastblt_stack
    module, places, latents = (ctypes.POINTER(kind) for kind in (_Module, Places, _Latents))
    caches = ctypes.POINTER(ctypes.c_void_p)
    function.argtypes = [module, caches, places, latents, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
