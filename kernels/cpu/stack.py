"""A module's pass over N rows in one call, on a CPU, in fp32: `run` makes all layers (`models/layers.py`, `Stack`);
`run_stored` also what the rows begin as (ids, hashed windows, kept states) and what becomes of them (norm, kept
states, entropies).

In torch, or with a call for each part of a layer, a small model's layers cost more in calls than in arithmetic. Here
`threads()` of them share the rows of a pass; every row is computed as if it were alone.

Shapes: x [N, d] fp32; rows and their caches as in `kernels/paged_attention.py`, latents as in
`kernels/latent_attention.py`, ids and states as in `kernels/request_ids.py` and `kernels/paged_rows.py`. Results are
new tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.dense import Norm, Packed
from fastblt.kernels.cpu.native import library, require
from fastblt.kernels.cpu.threads import threads
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention, places_of
from fastblt.kernels.paged_rows import PagedRows
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
        self._layers = (structs.Layer * len(layers))(*map(_as_struct, layers))
        heads, kv_heads = one.queries.outputs // dim, one.keys.outputs // dim
        self.module = structs.Module(
            self._layers, len(layers), one.queries.inputs, one.gate.outputs, heads, kv_heads, dim
        )


@dataclass(frozen=True)
class Source:
    """What rows begin as: kept states; or, of ids, hashed windows or the rows of a table."""

    states: PagedRows | None = None
    ids: RequestIds | None = None
    hashed: structs.Tables | None = None
    table: Tensor | None = None  # fp32 [ids, d]
    block: Tensor | None = None  # int32 [N]: rows that begin as an id's row of `block_table` instead; -1: not this one
    block_table: Tensor | None = None  # fp32 [ids, d]

    def struct(self) -> structs.Source:
        """For the C code; the tensors must outlive it."""
        made = structs.Source(
            block=_pointer(self.block), block_table=_pointer(self.block_table), table=_pointer(self.table)
        )  # fmt: skip
        if self.ids is not None:
            made.ids, made.stride, made.pad = self.ids.ids.data_ptr(), self.ids.ids.stride(0), self.ids.pad
        if self.hashed is not None:
            made.hashed = ctypes.pointer(self.hashed)
        if self.states is not None:
            made.states, made.pages = self.states.store.data_ptr(), self.states.pages()
        return made


@dataclass(frozen=True)
class Sink:
    """What becomes of rows after the last layer."""

    read: Tensor | None = None  # bool [N]: what comes of other rows is undefined; all keys and values are written
    norm: Norm | None = None
    states: PagedRows | None = None  # where rows are kept
    head: Packed | None = None  # its logits' entropies, in nats, are the result

    def struct(self) -> structs.Sink:
        """For the C code; the tensors must outlive it, and where there is a head it wants a place for entropies."""
        made = structs.Sink(read=_pointer(self.read))
        if self.norm is not None:
            made.gain, made.eps = self.norm.pointer, self.norm.eps
        if self.states is not None:
            made.states, made.pages = self.states.store.data_ptr(), self.states.pages()
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
    source: structs.Source | None,
    sink: structs.Sink | None,
    x: Tensor,
) -> None:
    read = None
    if latents is not None:
        read = latents_of(latents.store)
        read.slots = latents.slots.data_ptr()
    places = places_of(attend.turns, attend.at)
    if require().fastblt_stack(
        stack.module, attend.pointers, places, read, source, sink, x.shape[0], threads(), x.data_ptr()
    ):
        raise MemoryError("a module could not allocate its scratch space")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def fits(attend: object, latents: object = None) -> bool:
    """Whether `run` can take this attention and these latents."""
    if not isinstance(attend, PagedAttention) or not attend.native or library() is None:
        return False
    return latents is None or (isinstance(latents, StoredLatents) and latents.native)


def latents_of(store: Tensor) -> structs.Latents:
    """A store of latents as the C code takes it, without slots; it must outlive it."""
    keys, kv_heads, dim = store.shape[3:]
    return structs.Latents(store.data_ptr(), None, store.stride(0), 2 * keys * kv_heads * dim, keys)


def _as_struct(layer: LayerWeights) -> structs.Layer:
    cross = layer.cross
    before = (None, None, None) if cross is None else (cross.norm.pointer, cross.queries.pointer, cross.out.pointer)
    maps = [one.pointer for one in (layer.queries, layer.keys, layer.values, layer.out)]
    inner = [one.pointer for one in (layer.gate, layer.up, layer.down)]
    eps = (0.0 if cross is None else cross.norm.eps, layer.norm.eps, layer.inner_norm.eps)
    return structs.Layer(*before, layer.norm.pointer, *maps, layer.inner_norm.pointer, *inner, *eps)
