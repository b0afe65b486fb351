"""What training takes, on paper: bytes of device memory of one process, by the shape and the settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.layers import Stack
from fastblt.models.training.attention import window_of
from fastblt.models.training.layout import BLOCK_ROWS, PARTS, TILE
from fastblt.models.training.recipe import LARGE

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. `weights`: its share in fp32, and the entropy model whole. `optimizer`: one moment of the
    matrices that Muon trains, two of all else. `gathered`: weights in the step's type while they are whole.
    `activations`: what one micro-batch keeps for its backward pass."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """The most at any time, in the backward pass of a step's last micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def memory(
    config: BltConfig,
    *,
    processes: int = 1,
    freeze: Collection[str] = (),
    teach: bool = False,
    muon: bool = True,
    low: bool = False,
    batch: int = 1,
    length: int = 1024,
    patches: int = 288,
    recompute: bool = False,
) -> Memory:
    """The memory of a process. `low`: steps compute in bf16, over fp32 weights; so a single process gathers too."""
    with torch.device("meta"):
        model = Blt(config)
    frozen = {"patcher", *(name for part in freeze for name in PARTS[part])}
    children = dict(model.named_children())
    sizes = {name: _size(module) for name, module in children.items()}
    whole, patcher = sum(sizes.values()), sizes["patcher"]
    trained = sum(size for name, size in sizes.items() if name not in frozen)
    hidden = sum(
        one.weight.numel()
        for name, module in children.items()
        if name not in frozen and name != "lm_head"
        for one in module.modules()
        if isinstance(one, nn.Linear)
    )
    moments = 2 * trained - hidden if muon else 2 * trained
    held = whole - patcher + (trained if teach else 0)
    size = 2 if low else _FP32
    gathered = 0
    if low or processes > 1:
        # All but the layers of large stacks are gathered at once, of those one and the next; gradients likewise.
        large = [stack for name, stack in model.named_modules() if isinstance(stack, Stack) and _size(stack) > LARGE]
        layers = sum(_size(stack) for stack in large)
        root = whole - patcher - layers
        one = max((_size(stack) // len(stack) for stack in large), default=0)
        root_trained = sum(
            _size(module) - sum(_size(stack) for stack in module.modules() if stack in large)
            for name, module in children.items()
            if name not in frozen
        )
        gathered = size * (root + 2 * one) + (size + _FP32 * low) * (root_trained + one)
    return Memory(
        weights=_FP32 * (held // processes + patcher),
        gradients=_FP32 * trained // processes,
        optimizer=_FP32 * moments // processes,
        gathered=gathered,
        activations=batch * _activations(config, frozen, length, patches, size, recompute),
    )


def _size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def _activations(
    config: BltConfig, frozen: Collection[str], length: int, patches: int, size: int, recompute: bool
) -> int:
    """Bytes that the stacks keep of a sequence for its backward pass. A frozen encoder keeps nothing, nor does a frozen
    global transformer behind a frozen encoder."""
    tiles = length // TILE
    rows = tiles * (TILE + BLOCK_ROWS)
    decoder_keys = window_of(config.decoder, length) + TILE + BLOCK_ROWS
    parts = [_stack(config.decoder, rows, decoder_keys, size, recompute, crosses=config.decoder_cross_attn_all_layers)]
    # The logits, their softmax and its gradient.
    parts.append(3 * _FP32 * rows * 260)
    encoder = "local_encoder" not in frozen
    if encoder or "global_transformer" not in frozen:
        parts.append(_stack(config.global_, patches, patches, size, recompute))
    if encoder:
        keys = window_of(config.encoder, length) + TILE
        parts.append(_stack(config.encoder, length, keys, size, recompute))
    return sum(parts)


def _stack(stack: StackConfig, rows: int, keys: int, size: int, recompute: bool, *, crosses: bool = False) -> int:
    """Of every row and layer: about 12 vectors of the width (norms, projections, rotations, residuals, with those of a
    cross-attention 8 more), 4 of the feed-forward width, and of every head and key the score and its softmax."""
    width = stack.hidden_size * (20 if crosses else 12) + stack.intermediate_size * 4
    scores = stack.num_heads * keys * (_FP32 + size)
    layer = rows * (size * width + scores)
    return layer + rows * stack.hidden_size * size * stack.num_layers if recompute else layer * stack.num_layers
