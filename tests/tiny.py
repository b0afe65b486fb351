"""Tiny random BLTs for tests: every shape the published checkpoints have, and ours, at widths that run in milliseconds.

Widths are multiples of 16 and feed-forward widths of 32, so that the Triton kernels' tiles fit them too.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from fastblt.models.blt import Blt, CausalAttention, init_weights
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.patching import entropies

HEAD_DIM = 16


def tiny_config(rng: random.Random | int, **overrides: Any) -> BltConfig:
    """A random tiny shape. `overrides` replace fields of BltConfig, or of all local stacks: `window` (encoder and
    decoder), `patcher_window`. The threshold is nominal: only `tiny_model` knows the weights it must fit.

    Published: half of the shapes have no diffusion head. Ours: block sizes (4, 8), either decoder input.
    """
    rng = random.Random(rng) if isinstance(rng, int) else rng
    k = rng.choice((1, 2, 2, 4))
    local = rng.choice((32, 48))
    wide = rng.choice((local * k, 64, 96))
    window = rng.choice((6, 9, 16, None))
    fields: dict[str, Any] = {
        "cross_attn_k": k,
        "encoder_cross_attn_all_layers": rng.random() < 0.3,
        "decoder_cross_attn_all_layers": rng.random() < 0.7,
        "hash_group_sizes": rng.choice(((3, 4, 5, 6, 7, 8), (3, 5), (2, 3, 4))),
        "hash_group_vocab": rng.choice((61, 128, 509)),
        "hash_functions": rng.choice((1, 1, 2, 3)),
        "patching_threshold": 4.0,
        "max_patch_length": rng.choice((None, None, 4, 8)),
        "decoder_input": "encoder",
        "block_sizes": (),
    }
    if rng.random() < 0.5:
        fields |= {"decoder_input": rng.choice(("encoder", "embedding")), "block_sizes": (4, 8)}
    window = overrides.pop("window", window)
    patcher_window = overrides.pop("patcher_window", rng.choice((5, 12, None)))
    layers = [rng.randint(1, 2) for _ in range(4)]
    fields["patcher"] = _stack(rng, 32, layers[0], 10000.0, patcher_window)
    fields["encoder"] = _stack(rng, local, layers[1], 500000.0, window)
    fields["global_"] = _stack(rng, wide, layers[2], 500000.0, None)
    fields["decoder"] = _stack(rng, local, layers[3] + 1, 500000.0, window)
    return BltConfig(**(fields | overrides))


def tiny_model(seed: int, *, bytes_per_patch: float = 3.2, **overrides: Any) -> Blt:
    """A frozen random model of `tiny_config(seed, **overrides)`.

    Its heads are scaled so that some rows are confident and others are not, and its threshold is set (unless
    overridden) mid-gap between two entropies of random text, so that patches have about `bytes_per_patch` bytes.
    """
    config = tiny_config(seed, **overrides)
    model = Blt(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.lm_head.weight *= 3.0
        model.patcher.lm_head.weight *= 2.0
        for name, weight in model.named_parameters():
            if "norm" in name:
                # Gains of exactly 1 would hide a norm that is left out or taken from the wrong place.
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.eval().requires_grad_(False)
    if "patching_threshold" not in overrides:
        model.config = replace(config, patching_threshold=_mid_gap(model, generator, 1.0 / bytes_per_patch))
    return model


def shallow_model(seed: int, **overrides: Any) -> Blt:
    """A `tiny_model` with one layer in each stack, for Triton's interpreter, under which a pass takes seconds."""
    config = tiny_config(seed, block_sizes=(4, 8), **overrides)
    fields = {name: getattr(config, name) for name in vars(config)}
    shallow = {name: replace(stack, num_layers=1) for name, stack in fields.items() if isinstance(stack, StackConfig)}
    return tiny_model(seed, **(fields | shallow))


def random_ids(seed: int, length: int) -> list[int]:
    """BOS and length - 1 random byte ids."""
    rng = random.Random(seed)
    return [1, *(rng.randint(4, 259) for _ in range(length - 1))]


def _stack(rng: random.Random, hidden: int, layers: int, theta: float, window: int | None) -> StackConfig:
    heads = hidden // HEAD_DIM
    kv_heads = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    return StackConfig(hidden, layers, heads, kv_heads, 32 * rng.randint(2, 3), theta, window)


@torch.no_grad()
def _mid_gap(model: Blt, generator: torch.Generator, share: float) -> float:
    """A threshold that about `share` of the entropies exceed, in the widest gap near that quantile."""
    ids = torch.randint(4, 260, (4, 128), generator=generator)
    ids[:, 0] = 1
    values = entropies(patcher_logits(model, ids))[:, 1:].flatten().sort().values
    middle = int(len(values) * (1.0 - share))
    near = values[middle - 8 : middle + 9]
    widest = int((near[1:] - near[:-1]).argmax())
    return float((near[widest] + near[widest + 1]) / 2)


def patcher_logits(model: Blt, ids: torch.Tensor) -> torch.Tensor:
    """Whole-sequence logits [B, T, 260] of the entropy model."""
    return model.patcher(ids, CausalAttention(model.config.patcher, ids.shape[1], ids.device))
