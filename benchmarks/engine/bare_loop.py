"""The engine's baseline: a plain decoding loop over `models/` with dense preallocated caches.

It decodes a fixed batch greedily in lockstep, without scheduler, pages, sampling parameters, stop conditions or
streams. The difference to the engine's speed is the cost of serving.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.models.blt import Blt, LatentRows
from fastblt.models.config import StackConfig
from fastblt.models.layers import Rope, rotate
from fastblt.models.patching import PatchRule, entropies

#: (layer, queries, keys, values) -> attention output.
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Dense:
    """Keys and values of one stack: a preallocated tensor [batch, heads, length, D] for each layer."""

    def __init__(self, stack: StackConfig, batch: int, length: int) -> None:
        shape = (batch, stack.num_kv_heads, length, stack.head_dim)
        self.k = [torch.zeros(shape) for _ in range(stack.num_layers)]
        self.v = [torch.zeros(shape) for _ in range(stack.num_layers)]
        self.window = stack.window
        self.groups = stack.num_heads // stack.num_kv_heads
        self.turns = Rope(stack.head_dim, stack.rope_theta).table(length)

    def at(self, position: int) -> Attention:
        """Attention for one row of each sequence, all at the same position."""
        low = 0 if self.window is None else max(0, position + 1 - self.window)
        turns = self.turns[position]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][:, :, position] = rotate(k, turns)
            self.v[layer][:, :, position] = v
            keys, values = self.k[layer][:, :, low : position + 1], self.v[layer][:, :, low : position + 1]
            grouped = rotate(q, turns).unflatten(1, (-1, self.groups))
            return F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)

        return attend

    def ragged(self, rows: Tensor, positions: Tensor) -> Attention:
        """Attention for one row of each of the sequences `rows`, each at its own position."""
        longest = int(positions.max()) + 1
        mask = (torch.arange(longest) <= positions[:, None])[:, None, None]
        turns = self.turns[positions]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][rows, :, positions] = rotate(k, turns)
            self.v[layer][rows, :, positions] = v
            grouped = rotate(q, turns).unflatten(1, (-1, self.groups))
            keys, values = self.k[layer][rows, :, :longest], self.v[layer][rows, :, :longest]
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)

        return attend


class BareLoop:
    """Greedy BLT over `prompts` (ids, all of one length). `step` decodes the next byte of every sequence."""

    def __init__(self, model: Blt, prompts: list[list[int]], length: int) -> None:
        config = model.config
        self._model = model
        self._batch = len(prompts)
        self._rule = PatchRule(config.patching_threshold, config.max_patch_length)
        stacks = (config.patcher, config.encoder, config.global_, config.decoder)
        self._patcher, self._encoder, self._global, self._decoder = (_Dense(s, self._batch, length) for s in stacks)
        self._states = torch.zeros(self._batch, length, config.encoder.hidden_size)
        self._ids = torch.zeros(self._batch, length + model.hash_window, dtype=torch.long)
        self._open = [0] * self._batch
        self._patches = [0] * self._batch
        self._latents: Tensor | None = None
        self._forbidden = torch.zeros(260)
        self._forbidden[:4] = float("-inf")
        self.position = 0
        with torch.inference_mode():
            for column in zip(*prompts, strict=True):
                self._ids[:, self.position + model.hash_window - 1] = torch.tensor(column)
                self._next = self._step()

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The id of the next byte of every sequence, int64 [batch]."""
        self._ids[:, self.position + self._model.hash_window - 1] = self._next
        self._next = self._step()
        return self._next

    def _step(self) -> Tensor:
        model, at = self._model, self.position
        window = self._ids[:, at : at + model.hash_window]
        entropy = entropies(model.patcher(window[:, -1], self._patcher.at(at))).tolist()
        states = model.local_encoder(model.embed(window), self._encoder.at(at))
        self._states[:, at] = states
        closing = [row for row in range(self._batch) if self._rule.opens(at, entropy[row], at - self._open[row] + 1)]
        if closing:
            self._close(closing)
        assert self._latents is not None
        x = model.decoder_rows(window[:, -1], states)
        hidden = model.local_decoder(x, self._decoder.at(at), LatentRows(self._latents))
        self.position += 1
        return (model.lm_head(hidden) + self._forbidden).argmax(-1)

    def _close(self, closing: list[int]) -> None:
        model, at = self._model, self.position
        lengths = torch.tensor([at + 1 - self._open[row] for row in closing])
        offsets = torch.arange(int(lengths.max()))
        rows = torch.tensor(closing)
        index = (at + 1 - lengths)[:, None] + offsets
        states = self._states[rows[:, None], index.clamp_max(at)]
        vectors = model.local_encoder.pool(states, offsets < lengths[:, None])
        positions = torch.tensor([self._patches[row] for row in closing])
        latents = model.global_transformer(vectors, self._global.ragged(rows, positions))
        kv = model.local_decoder.latent_keys_values(latents)
        if self._latents is None:
            self._latents = kv.clone()
        else:
            self._latents[rows] = kv
        for row in closing:
            self._open[row] = at + 1
            self._patches[row] += 1
