"""The shape of the shipped checkpoint and the second stage's task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastblt.models.blt import Blt, init_weights
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.patching import PatchRule, entropies
from fastblt.models.training.attention import WindowAttention
from fastblt.models.training.data import load_array, rows
from fastblt.models.training.entropy import patch_starts
from fastblt.models.training.layout import LayoutConfig, draw_noise
from fastblt.models.training.objective import Objective, make_batch


def shape(*, max_patch_length: int = 8, block_sizes: tuple[int, ...] = (4, 8, 16)) -> BltConfig:
    """The shipped shape: 11 million parameters, 6.3 million of them hash tables, with the ratios of the paper's 1B."""

    def local(layers: int, theta: float) -> StackConfig:
        return StackConfig(128, layers, 4, 4, 352, theta, window=256)

    return BltConfig(
        patcher=local(2, 10_000.0),
        encoder=local(1, 500_000.0),
        # Two key heads for eight query heads, because only this cache grows with the context.
        global_=StackConfig(256, 4, 8, 2, 704, 500_000.0),
        decoder=local(4, 500_000.0),
        hash_group_vocab=8192,
        max_patch_length=max_patch_length,
        block_sizes=block_sizes,
    )


class BltTask:
    """Trains a BLT-D except its patcher, which is frozen and cuts each batch into patches.

    Starts from new weights, or from those of the checkpoint folder `start`.
    """

    model: Blt

    def __init__(
        self,
        config: BltConfig,
        patcher: dict[str, Tensor],
        data: Path,
        layout: LayoutConfig,
        batch: int,
        masked_weight: float,
        seed: int,
        snapshots: Path | None = None,
        start: Path | None = None,
        distill: float = 0.0,
    ) -> None:
        self.model = Blt(config)
        init_weights(self.model, seed)
        if start is not None:
            self.model.load_state_dict(load_checkpoint(start).state_dict())
        self.model.patcher.load_state_dict(patcher)
        self.model.patcher.requires_grad_(False)
        self._rows = load_array(data / "train.npy")
        self._layout, self._batch, self._seed, self._snapshots = layout, batch, seed, snapshots
        length = self._rows.shape[1]
        self._objective = Objective(self.model, length, masked_weight, distill)
        self._patcher_attend = WindowAttention(config.patcher, length)
        self._rule = PatchRule(config.patching_threshold, config.max_patch_length)

    def batch(self, step: int, rank: int, processes: int) -> dict[str, Tensor]:
        """A batch that depends on the arguments alone. Noise and block sizes are stratified over all processes."""
        chosen = rows(len(self._rows), step, rank, processes, self._batch, self._seed)
        common = np.random.default_rng([self._seed, step])
        total, mine = self._batch * processes, slice(rank * self._batch, (rank + 1) * self._batch)
        noise = draw_noise(total, common)[mine]
        sizes = common.permutation(np.resize(common.permutation(self._layout.block_sizes), total))[mine]
        ids = self._rows[chosen].astype(np.int64)
        with torch.inference_mode():
            entropy = entropies(self.model.patcher(torch.from_numpy(ids), self._patcher_attend)).numpy()
        starts = patch_starts(entropy, self._rule)
        return make_batch(ids, starts, noise, sizes, self._layout, np.random.default_rng([self._seed, step, rank]))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._objective.loss(batch)

    def checkpoint(self, step: int, progress: float) -> None:
        if self._snapshots is not None:
            save_checkpoint(self.model, self._snapshots, torch.bfloat16)
