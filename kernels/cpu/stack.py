"""A module over the rows of a pass, in one call, on a CPU, in fp32: all layers (`models.layers.Stack`), and with
`run_stored` also what the rows begin as and what becomes of them.

In torch, or with a call for each part of a layer, a small model's layers cost more in calls than in arithmetic. Here
`threads()` of them share the rows of the pass; every row is computed as if it were alone.

Shapes: x [N, d] fp32; the rows and their caches as in `fastblt.kernels.paged_attention`, the latents as in
`fastblt.kernels.latent_attention`, ids and states as in `fastblt.kernels.paged_rows`. Results are new tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastblt.kernels.cpu.dense import Norm, Packed
from fastblt.kernels.cpu.native import library, threads
from fastblt.kernels.hash_embedding import Tables
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention, Places
from fastblt.kernels.paged_rows import PagedRows, Pages
from fastblt.kernels.request_ids import RequestIds


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
        self.module = ModuleStruct(
            self._layers, len(layers), one.queries.inputs, one.gate.outputs, heads, kv_heads, dim
        )


@dataclass(frozen=True)
class Source:
    """What rows begin as: states, or of ids the hashed windows or rows of a table. Where `block`, int32 [N], is not
    negative it is an id, whose row of `block_table` goes before these."""

    states: PagedRows | None = None
    ids: RequestIds | None = None
    hashed: Tables | None = None
    table: Tensor | None = None
    block: Tensor | None = None
    block_table: Tensor | None = None

    def struct(self) -> SourceStruct:
        """For the C code; the tensors must outlive it."""
        made = SourceStruct(
            block=_pointer(self.block), block_table=_pointer(self.block_table), table=_pointer(self.table)
        )  # fmt: skip
        if self.ids is not None:
            made.ids, made.stride, made.pad = self.ids.ids.data_ptr(), self.ids.ids.stride(0), self.ids.pad
        if self.hashed is not None:
            made.hashed = ctypes.pointer(self.hashed)
        if self.states is not None:
            made.states, made.pages = self.states.store.data_ptr(), _pages(self.states)
        return made


@dataclass(frozen=True)
class Sink:
    """What becomes of rows: they are normed, and stored; of a head's logits of them there are entropies, in nats.

    Where `read`, bool [N], is given, what comes of the other rows is undefined; their keys and values are not."""

    read: Tensor | None = None
    norm: Norm | None = None
    states: PagedRows | None = None
    head: Packed | None = None

    def struct(self) -> SinkStruct:
        """For the C code; the tensors must outlive it, and where there is a head it wants a place for entropies."""
        made = SinkStruct(read=_pointer(self.read))
        if self.norm is not None:
            made.gain, made.eps = self.norm.pointer, self.norm.eps
        if self.states is not None:
            made.states, made.pages = self.states.store.data_ptr(), _pages(self.states)
        if self.head is not None:
            made.head, made.vocabulary = self.head.pointer, self.head.outputs
        return made


def run(stack: PackedStack, x: Tensor, attend: PagedAttention, latents: StoredLatents | None = None) -> Tensor:
    """Rows x after the last layer, [N, d]. Raises MemoryError."""
    x = x.clone(memory_format=torch.contiguous_format)
    _call(stack, attend, latents, None, None, x)
    return x


def run_stored(
    stack: PackedStack, source: Source, sink: Sink, attend: PagedAttention, latents: StoredLatents | None = None
) -> Tensor:
    """Rows from their source, whose block is contiguous, to the sink: [N, d], or the entropies [N] where it has a head.

    Raises MemoryError.
    """
    x = torch.empty(len(attend.at.rows), stack.module.size)
    start, end, entropies = source.struct(), sink.struct(), None
    if sink.head is not None:
        entropies = torch.empty(len(x))
        end.entropies = entropies.data_ptr()
    _call(stack, attend, latents, start, end, x)
    return x if entropies is None else entropies


def _call(
    stack: PackedStack,
    attend: PagedAttention,
    latents: StoredLatents | None,
    source: SourceStruct | None,
    sink: SinkStruct | None,
    x: Tensor,
) -> None:
    function = _entry()
    assert function is not None
    read = None
    if latents is not None:
        read = LatentsStruct.of(latents.store)
        read.slots = latents.slots.data_ptr()
    places = Places.of(attend.turns, attend.at)
    if function(stack.module, attend.pointers, places, read, source, sink, x.shape[0], threads(), x.data_ptr()):
        raise MemoryError("a module could not allocate its scratch space")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pages(rows: PagedRows) -> Pages:
    return Pages.of(rows.table, rows.page_size)


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


class ModuleStruct(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer))] + [
        (name, ctypes.c_int64) for name in ("count", "size", "inner", "heads", "kv_heads", "dim")
    ]


class LatentsStruct(ctypes.Structure):
    _fields_ = [("store", ctypes.c_void_p), ("slots", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("slot_size", "layer_size", "keys")
    ]

    @classmethod
    def of(cls, store: Tensor) -> LatentsStruct:
        """A store of latents, without slots."""
        _, _, _, keys, kv_heads, dim = store.shape
        return cls(store.data_ptr(), None, store.stride(0), 2 * keys * kv_heads * dim, keys)


class SourceStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("block", "block_table", "ids")),
        *((name, ctypes.c_int64) for name in ("stride", "pad")),
        ("hashed", ctypes.POINTER(Tables)),
        *((name, ctypes.c_void_p) for name in ("table", "states")),
        ("pages", Pages),
    ]


class SinkStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("read", "gain", "head", "entropies", "states")),
        ("pages", Pages),
        ("vocabulary", ctypes.c_int64),
        ("eps", ctypes.c_float),
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
    module, *structs = (
        ctypes.POINTER(kind) for kind in (ModuleStruct, Places, LatentsStruct, SourceStruct, SinkStruct)
    )
    caches = ctypes.POINTER(ctypes.c_void_p)
    function.argtypes = [module, caches, *structs, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
