"""Byte embeddings plus hashed n-gram embeddings, all tables in one pass (BLT, arXiv 2412.09871, section 3.2.1).

A row's window holds the last W ids up to and including its own; before the start of the text they are 0. E is the byte
table, T the stacked hash tables of V rows each, and m_t the multipliers of table t, zero for ids outside its n-gram.

    h_t = (sum_j window[j] m_t[j])  in wrapping int64,  floor-mod V         out = E[window[-1]] + sum_t T[t V + h_t]

Shapes: windows int64 [..., W], powers int64 [tables, W], offsets int64 [tables] (t V), E [260, d], T [tables V, d].
On a CPU T may be of a narrower dtype than E: its numbers are widened, which is exact, before they are added.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.linear import NUMBERS
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.structs import Tables


def hash_embedding_torch(
    windows: Tensor, powers: Tensor, offsets: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """Embeddings [..., d]; see the module for shapes. Differentiable in both tables."""
    embedded = embedding(windows[..., -1], byte_table)
    if len(powers) == 0:
        return embedded
    hashes = (windows.unsqueeze(-2) * powers).sum(-1) % vocab
    return embedded + embedding(hashes + offsets, hash_table).to(byte_table.dtype).sum(-2)


def tables_of(powers: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor) -> Tables:
    """The multipliers and tables as the C code takes them; the tensors must outlive it."""
    sizes = (powers.shape[-1], len(powers), vocab)
    tables = byte_table.data_ptr(), hash_table.data_ptr(), NUMBERS[hash_table.dtype]
    return Tables(powers.data_ptr(), *sizes, *tables, byte_table.shape[1])


def _hash_embedding_native(native: ctypes.CDLL, windows: Tensor, tables: Tables) -> Tensor:
    windows = windows.contiguous()
    out = torch.empty(*windows.shape[:-1], tables.size)
    native.fastblt_hash_embedding(windows.data_ptr(), windows.numel() // windows.shape[-1], tables, out.data_ptr())
    return out


def hash_embedding(
    windows: Tensor, powers: Tensor, offsets: Tensor, vocab: int, byte_table: Tensor, hash_table: Tensor
) -> Tensor:
    """Like `hash_embedding_torch`, by the implementation for the tensors' device."""
    learning = torch.is_grad_enabled() and (byte_table.requires_grad or hash_table.requires_grad)
    if use_triton(windows.device) and not learning and len(powers):
        from fastblt.kernels.gpu.hash_embedding import hash_embedding_triton

        return hash_embedding_triton(windows, powers, vocab, byte_table, hash_table)
    plain = byte_table.device.type == "cpu" and byte_table.dtype == torch.float32 and hash_table.dtype in NUMBERS
    if plain and not learning and (native := library()) is not None:
        return _hash_embedding_native(native, windows, tables_of(powers, vocab, byte_table, hash_table))
    return hash_embedding_torch(windows, powers, offsets, vocab, byte_table, hash_table)
