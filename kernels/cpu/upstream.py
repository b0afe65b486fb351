"""What goes into the global transformer and what comes out of it: `LocalEncoder.pool` and the storing of
`LocalDecoder.latent_keys_values` (models/blt.py) for fp32 on a CPU, in one call each.

In torch, a single patch costs more in calls than in arithmetic. Every patch is computed as if it were alone.

Shapes: patches int32 [P] owners, starts and ends (their last bytes), states in a `PagedRows`; vectors [P, k d]; latents
[P, dg]; their store [slots, C, 2, k, Hkv, D] as in `fastblt.kernels.latent_attention`, slots int32 [P].
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
from fastblt.kernels.paged_rows import PagedRows, Pages


@dataclass(frozen=True)
class StoredPatches:
    """Closed patches whose byte states lie in pages; `longest` bounds their bytes."""

    states: PagedRows
    owners: Tensor
    starts: Tensor
    ends: Tensor
    longest: int

    def padded(self) -> tuple[Tensor, Tensor]:
        """Their states [P, longest, d], repeating the last of a shorter patch, and which belong to it, bool."""
        offsets = torch.arange(self.longest, device=self.starts.device)
        last = (self.ends - self.starts)[:, None]
        positions = self.starts[:, None] + torch.minimum(offsets, last)
        return self.states.store[self.states.slots(self.owners[:, None], positions)], offsets <= last


class PackedPooling:
    """Weights that pool: the projection of the maximum to k queries, and a cross-attention with heads of `dim`."""

    def __init__(
        self,
        projection: Packed,
        query: tuple[Norm, Packed],
        key: tuple[Norm, Packed],
        value: Packed,
        out: Packed,
        dim: int,
    ) -> None:
        # What the pointers point to must live.
        self._weights = (projection, query, key, value, out)
        self.size, self.width = projection.inputs, projection.outputs
        maps = (projection.pointer, query[0].pointer, query[1].pointer, key[0].pointer, key[1].pointer)
        self.struct = _Pooling(
            *maps, value.pointer, out.pointer, query[0].eps, key[0].eps, self.width // self.size, self.size,
            query[1].outputs // dim, key[1].outputs // dim, dim,
        )  # fmt: skip


class PackedReaders:
    """Weights that make keys and values of a latent: its projection to k rows, and norm and two maps a layer."""

    def __init__(self, projection: Packed, size: int, layers: Sequence[tuple[Norm, Packed, Packed]]) -> None:
        self._weights = (projection, layers)
        self.projection, self.size, self.k = projection, size, projection.outputs // size
        self.narrow = layers[0][1].outputs
        readers = [_Reader(norm.pointer, keys.pointer, values.pointer, norm.eps) for norm, keys, values in layers]
        self.readers = (_Reader * len(readers))(*readers)


def available() -> bool:
    """Whether the C code is there."""
    return _entries() is not None


def pool(weights: PackedPooling, patches: StoredPatches) -> Tensor:
    """Vectors [P, k d]. Raises MemoryError."""
    states = patches.states
    columns = [column.contiguous() for column in (patches.owners, patches.starts, patches.ends)]
    pointers = (column.data_ptr() for column in columns)
    where = _Patches(states.store.data_ptr(), Pages.of(states.table, states.page_size), *pointers)
    vectors = states.store.new_empty(len(columns[0]), weights.width)
    if _native()[0](weights.struct, where, len(vectors), threads(), vectors.data_ptr()):
        raise MemoryError("pooling could not allocate its scratch space")
    return vectors


def store_latents(weights: PackedReaders, latents: Tensor, store: Tensor, slots: Tensor) -> None:
    """Write keys and values of latents to their slots. Raises MemoryError."""
    latents, slots = latents.contiguous(), slots.contiguous()
    failed = _native()[1](
        latents.data_ptr(), *latents.shape, weights.projection.pointer, weights.k, weights.size, weights.readers,
        len(weights.readers), weights.narrow, slots.data_ptr(), threads(), store.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("the latents' keys and values could not allocate their scratch space")


_POINTERS = ("projection", "query_gain", "queries", "key_gain", "keys", "values", "out")


class _Pooling(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in ("query_eps", "key_eps")),
        *((name, ctypes.c_int64) for name in ("k", "size", "heads", "kv_heads", "dim")),
    ]


class _Patches(ctypes.Structure):
    _fields_ = [
        ("states", ctypes.c_void_p),
        ("pages", Pages),
        *((name, ctypes.c_void_p) for name in ("owners", "starts", "ends")),
    ]


class _Reader(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("gain", "keys", "values")), ("eps", ctypes.c_float)]


@cache
def _entries() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """The C functions, with their argument types said once."""
    native = library("upstream")
    if native is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    structs = [ctypes.POINTER(kind) for kind in (_Pooling, _Patches, _Reader)]
    native.fastblt_pool.argtypes = [structs[0], structs[1], integer, integer, pointer]
    native.fastblt_store_latents.argtypes = [
        pointer, integer, integer, pointer, integer, integer, structs[2], integer, integer, pointer, integer, pointer
    ]  # fmt: skip
    native.fastblt_pool.restype = native.fastblt_store_latents.restype = ctypes.c_int
    return native.fastblt_pool, native.fastblt_store_latents


def _native() -> tuple[Callable[..., int], Callable[..., int]]:
    entries = _entries()
    if entries is None:
        raise RuntimeError("this machine has no C compiler for the upstream pass; ask `available` first")
    return entries
