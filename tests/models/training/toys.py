"""A BLT-D small enough to train in a test, and sequences for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fastblt.models.blt import Blt, init_weights
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.training.layout import LayoutConfig
from fastblt.models.training.objective import make_batch

LENGTH = 256
WINDOW = 48
LAYOUT = LayoutConfig(patches=LENGTH, max_patch_length=8)


def toy_config(**changes: object) -> BltConfig:
    def local(layers: int) -> StackConfig:
        return StackConfig(16, layers, 2, 2, 32, 500_000.0, window=WINDOW)

    settings: dict = {
        "patcher": local(1),
        "encoder": local(1),
        "global_": StackConfig(32, 2, 4, 2, 64, 500_000.0),
        "decoder": local(2),
        "hash_group_vocab": 64,
        "max_patch_length": 8,
        "block_sizes": (4, 8, 16),
        **changes,
    }
    return BltConfig(**settings)


def toy_model(seed: int = 0, **changes: object) -> Blt:
    model = Blt(toy_config(**changes))
    init_weights(model, seed)
    # Sharper attention than at initialization, so that what a row sees shows in its logits.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(1.5)
    return model


def toy_sequences(count: int = 2, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids [count, LENGTH] beginning with BOS, and start flags [count, LENGTH + 1] that obey the patch rule."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 260, (count, LENGTH))
    ids[:, 0] = 1
    starts = rng.random((count, LENGTH + 1)) < 0.3
    starts[:, :2] = True
    for row in starts:
        for position in range(8, LENGTH + 1):
            row[position] |= not row[position - 8 + 1 : position].any() and not row[position]
    return ids, starts


def toy_batch(
    ids: NDArray, starts: NDArray, sizes: list[int], seed: int = 0, t: float = 0.5, full_blocks: float = 0.0
) -> dict[str, torch.Tensor]:
    layout = replace(LAYOUT, full_blocks=full_blocks)
    return make_batch(ids, starts, np.full(len(ids), t), np.array(sizes), layout, np.random.default_rng(seed))


def with_ids(batch: dict[str, torch.Tensor], ids: NDArray) -> dict[str, torch.Tensor]:
    """The same batch over other clean ids; blocks show and ask what they did."""
    return {**batch, "ids": torch.from_numpy(ids)}
