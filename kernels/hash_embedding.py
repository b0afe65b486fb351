"""Byte embeddings plus hashed n-gram embeddings, all tables in one pass.

A row's window holds its last W ids, its own last (what lies before the start of the text is id 0). With E the byte
table, T the stacked hash tables of V rows each and m_t the multipliers of table t, zero where its n-gram does not
reach,

    h_t = (sum_j window[j] m_t[j])  in wrapping int64,  floor-mod V         out = E[window[-1]] + sum_t T[t V + h_t]

Shapes: windows int64 [..., W], powers int64 [tables, W], offsets int64 [tables] (t V), E [260, d], T [tables V, d].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kernels.backend import use_triton
from kernels.native import library


def hash_embedding_torch(
    windows: Tensor, powers: Tensor, offsets: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """Embeddings [..., d]; see the module for shapes. Differentiable in both tables."""
    embedded = embedding(windows[..., -1], byte_table)
    if len(powers) == 0:
        return embedded
    hashes = (windows.unsqueeze(-2) * powers).sum(-1) % vocab
    return embedded + embedding(hashes + offsets, hash_table).sum(-2)


class _Tables(ctypes.Structure):
    _fields_ = [
        ("powers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("width", "count", "vocab")),
        *((name, ctypes.c_void_p) for name in ("bytes", "hashed")),
        ("size", ctypes.c_int64),
    ]


@cache
def _entries() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The C functions, with their argument types said once."""
    native = library("hash_embedding")
    if native is None:
        return None
    pointer, integer, tables = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Tables)
    functions = native.fastblt_hash_embedding, native.fastblt_stored_hash_embedding
    functions[0].argtypes = [pointer, integer, tables, pointer]
    functions[1].argtypes = [pointer, integer, pointer, pointer, integer, tables, pointer]
    for function in functions:
        function.restype = None
    return functions


def _native(
    windows: Tensor, powers: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> tuple[Callable[..., None], Callable[..., None], _Tables] | None:
    """The C functions and the tables as they take them, where they serve."""
    learning = torch.is_grad_enabled() and (byte_table.requires_grad or hash_table.requires_grad)
    plain = byte_table.device.type == "cpu" and byte_table.dtype == hash_table.dtype == torch.float32
    if not plain or learning or use_triton(windows.device) or (functions := _entries()) is None:
        return None
    sizes = (powers.shape[-1], len(powers), vocab)
    where = (byte_table.data_ptr(), hash_table.data_ptr(), byte_table.shape[1])
    return *functions, _Tables(powers.data_ptr(), *sizes, *where)


def hash_embedding(
    windows: Tensor, powers: Tensor, offsets: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """The launcher: picks the implementation for the tensors' device. See `hash_embedding_torch`."""
    learning = torch.is_grad_enabled() and (byte_table.requires_grad or hash_table.requires_grad)
    if use_triton(windows.device) and not learning and len(powers):
        from kernels.hash_embedding_triton import hash_embedding_triton

        return hash_embedding_triton(windows, powers, vocab, byte_table, hash_table)
    if (native := _native(windows, powers, vocab, byte_table, hash_table)) is not None:
        windows = windows.contiguous()
        out = byte_table.new_empty(*windows.shape[:-1], byte_table.shape[1])
        native[0](windows.data_ptr(), windows.numel() // windows.shape[-1], native[2], out.data_ptr())
        return out
    return hash_embedding_torch(windows, powers, offsets, vocab, byte_table, hash_table)


def stored_hash_embedding(
    ids: Tensor,
    owners: Tensor,
    positions: Tensor,
    powers: Tensor,
    offsets: Tensor,
    vocab: int,
    byte_table: Tensor,
    hash_table: Tensor,
) -> Tensor:
    """[N, d] of the rows at int32 positions [N] of int64 ids [requests, W - 1 + length], which W - 1 zeros begin."""
    if (native := _native(ids, powers, vocab, byte_table, hash_table)) is not None:
        owners, positions = owners.contiguous(), positions.contiguous()
        out = byte_table.new_empty(len(owners), byte_table.shape[1])
        rows = (owners.data_ptr(), positions.data_ptr(), len(owners))
        native[1](ids.data_ptr(), ids.stride(0), *rows, native[2], out.data_ptr())
        return out
    begin = owners.long() * ids.stride(0) + positions
    windows = ids.view(-1)[begin[:, None] + torch.arange(powers.shape[-1], device=ids.device)]
    return hash_embedding(windows, powers, offsets, vocab, byte_table, hash_table)
