"""Sliding-window attention over whole training sequences, in tiles. Its cost grows linearly with the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.models.config import StackConfig
from fastblt.models.layers import Rope, rotate
from fastblt.models.training.layout import TILE


def tiles(x: Tensor, window: int) -> Tensor:
    """Keys or values [B, T, H, D] cut for each tile: [B, T / TILE, window + TILE, H, D], zeros before the start.

    A tile reads those of its own positions and of the window before it.
    """
    padded = F.pad(x, (0, 0, 0, 0, window, 0))
    return padded.unfold(1, window + TILE, TILE).movedim(-1, 2)


def tile_positions(length: int, window: int) -> tuple[Tensor, Tensor]:
    """Absolute positions of each tile's rows [S, TILE] and of its keys [S, window + TILE]; negative for padding."""
    first = torch.arange(0, length, TILE)[:, None]
    return first + torch.arange(TILE), first - window + torch.arange(window + TILE)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q [N, Q, H, D], k and v [N, S, Hkv, D], mask bool [N, Q, S]: [N, Q, H, D]."""
    if q.shape[2] != k.shape[2]:
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    scores = (scores * q.shape[-1] ** -0.5).masked_fill(~mask[:, None], -1e30)
    return (torch.softmax(scores.float(), -1).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def window_of(config: StackConfig, length: int) -> int:
    """The rows that a row of a sequence of `length` sees at most."""
    return min(config.window or length, length)


class WindowAttention:
    """Causal self-attention under a stack's window for sequences of one fixed length, a multiple of TILE."""

    def __init__(self, config: StackConfig, length: int, device: torch.device | None = None) -> None:
        assert length % TILE == 0
        self.window = window_of(config, length)
        rows, keys = tile_positions(length, self.window)
        behind = rows[:, :, None] - keys[:, None]
        self.mask = ((behind >= 0) & (behind < self.window) & (keys[:, None] >= 0)).to(device)
        self.turns = Rope(config.head_dim, config.rope_theta).at(torch.arange(length), length).clone().to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, self.turns), rotate(k, self.turns)
        batch, length = q.shape[:2]
        mask = self.mask.expand(batch, -1, -1, -1).flatten(0, 1)
        queries = q.unflatten(1, (-1, TILE)).flatten(0, 1)
        out = dense(queries, tiles(k, self.window).flatten(0, 1), tiles(v, self.window).flatten(0, 1), mask)
        return out.reshape(batch, length, *q.shape[2:])
