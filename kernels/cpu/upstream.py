"""What goes into the global transformer and what comes out of it, in one call each, for fp32 on a CPU:
`LocalEncoder.pool` and the storing of `LocalDecoder.latent_keys_values` (models/blt.py). In torch a single patch
costs more in calls than in arithmetic. Every patch is computed as if it were alone.

Shapes: P patches, int32 [P] owners (rows of the page table), starts and ends (their first and last bytes), states in
a `PagedRows`; vectors fp32 [P, k d], k queries a patch; latents fp32 [P, global d]; their store [slots, C, 2, k,
Hkv, D] as in `kernels/latent_attention.py`, slots int32 [P].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.dense import Norm, Packed
from fastblt.kernels.cpu.native import require
from fastblt.kernels.cpu.threads import threads
from fastblt.kernels.paged_rows import PagedRows


@dataclass(frozen=True)
class PatchRows:
    """The bytes of patches, one patch behind another: owners and positions int32 [B], and for each patch the first of
    them and their number, int32 [P]."""

    owners: Tensor
    positions: Tensor
    firsts: Tensor
    counts: Tensor


@dataclass(frozen=True)
class StoredPatches:
    """Closed patches whose byte states lie in pages; `longest` bounds their bytes. `rows` has the bytes themselves, for
    a GPU."""

    states: PagedRows
    owners: Tensor
    starts: Tensor
    ends: Tensor
    longest: int
    rows: PatchRows | None = None

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
        self.struct = structs.Pooling(
            *maps, value.pointer, out.pointer, query[0].eps, key[0].eps, self.width // self.size, self.size,
            query[1].outputs // dim, key[1].outputs // dim, dim,
        )  # fmt: skip


class PackedReaders:
    """Weights that make keys and values of a latent: its projection to k rows, and norm and two maps a layer."""

    def __init__(self, projection: Packed, size: int, layers: Sequence[tuple[Norm, Packed, Packed]]) -> None:
        self._weights = (projection, layers)
        self.projection, self.size, self.k = projection, size, projection.outputs // size
        self.narrow = layers[0][1].outputs
        readers = [
            structs.Reader(norm.pointer, keys.pointer, values.pointer, norm.eps) for norm, keys, values in layers
        ]
        self.readers = (structs.Reader * len(readers))(*readers)


def pool(weights: PackedPooling, patches: StoredPatches) -> Tensor:
    """Vectors [P, k d]. Raises MemoryError."""
    states = patches.states
    columns = [column.contiguous() for column in (patches.owners, patches.starts, patches.ends)]
    pointers = (column.data_ptr() for column in columns)
    where = structs.Patches(states.store.data_ptr(), states.pages(), *pointers)
    vectors = states.store.new_empty(len(columns[0]), weights.width)
    if require().fastblt_pool(weights.struct, where, len(vectors), threads(), vectors.data_ptr()):
        raise MemoryError("pooling could not allocate its scratch space")
    return vectors


def store_latents(weights: PackedReaders, latents: Tensor, store: Tensor, slots: Tensor) -> None:
    """Write keys and values of latents to their slots. Raises MemoryError."""
    latents, slots = latents.contiguous(), slots.contiguous()
    to = structs.Reading(
        projection=weights.projection.pointer,
        readers=weights.readers,
        k=weights.k,
        size=weights.size,
        count=len(weights.readers),
        narrow=weights.narrow,
        slots=slots.data_ptr(),
        store=store.data_ptr(),
    )
    if require().fastblt_store_latents(to, latents.data_ptr(), *latents.shape, threads()):
        raise MemoryError("the latents' keys and values could not allocate their scratch space")
