"""The shape of the shipped checkpoint, and the stage that trains a BLT-D."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.layers import Stack
from fastblt.models.patching import PatchRule, entropies
from fastblt.models.training.attention import WindowAttention
from fastblt.models.training.data import Sequential, rows
from fastblt.models.training.entropy import patch_starts
from fastblt.models.training.layout import LayoutConfig, draw_noise
from fastblt.models.training.objective import Objective, make_batch

#: Parameters of a stack above which its layers are gathered one by one.
LARGE = 50_000_000
#: Held-out sequences that progress is judged by.
JUDGED = 8


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
    """Trains a BLT-D except its patcher, which is frozen and cuts each batch into patches. `export` is called after
    each save."""

    def __init__(
        self,
        objective: Objective,
        train: Sequential,
        held_out: Sequential,
        layout: LayoutConfig,
        batch: int,
        seed: int,
        export: Callable[[], None] | None = None,
    ) -> None:
        self.module = objective
        self._train, self._held_out = train, held_out
        self._layout, self._batch, self._seed, self._export = layout, batch, seed, export
        model: Blt = objective.model
        model.patcher.requires_grad_(False)
        config = model.config
        self._patcher = model.patcher
        self._attends: dict[torch.device, WindowAttention] = {}
        self._rule = PatchRule(config.patching_threshold, config.max_patch_length)

    def layers(self) -> Iterable[nn.Module]:
        models = [self.module.model, *([self.module.teacher.model] if self.module.teacher else [])]
        stacks = [stack for model in models for stack in model.modules() if isinstance(stack, Stack)]
        frozen = {id(self._patcher.layers)}
        return [
            layer
            for stack in stacks
            if id(stack) not in frozen and sum(one.numel() for one in stack.parameters()) > LARGE
            for layer in stack
        ]

    def ignored(self) -> Iterable[nn.Parameter]:
        return self._patcher.parameters()

    def batch(self, step: int, group: int, groups: int) -> dict[str, Tensor]:
        """Noise and block sizes are stratified over the micro-batches of the step."""
        chosen = rows(len(self._train), step, group, groups, self._batch, self._seed)
        common = np.random.default_rng([self._seed, step])
        total, mine = self._batch * groups, slice(group * self._batch, (group + 1) * self._batch)
        noise = draw_noise(total, common)[mine]
        sizes = common.permutation(np.resize(common.permutation(self._layout.block_sizes), total))[mine]
        rng = np.random.default_rng([self._seed, step, group])
        return self._made(self._train.take(chosen), noise, sizes, self._layout, rng)

    def held_out(self) -> Iterable[dict[str, Tensor]]:
        """Drafts along held-out text: blocks that are masked altogether and start anywhere, as BLT-DV's do."""
        draft = LayoutConfig(
            self._layout.patches, self._layout.max_patch_length, self._layout.block_sizes, 1.0, full_blocks=1.0
        )
        count = min(JUDGED, len(self._held_out))
        for number in range(count):
            ids = self._held_out.take([number * len(self._held_out) // count])
            size = np.array([self._layout.block_sizes[number % len(self._layout.block_sizes)]])
            yield self._made(ids, np.ones(1), size, draft, np.random.default_rng(number))

    def checkpoint(self, step: int, progress: float) -> None:
        if self._export is not None:
            self._export()

    def _made(
        self, ids: np.ndarray, noise: np.ndarray, sizes: np.ndarray, layout: LayoutConfig, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        device = self._patcher.lm_head.weight.device
        if device not in self._attends:
            self._attends[device] = WindowAttention(self.module.model.config.patcher, ids.shape[1], device)
        with torch.inference_mode():
            logits = self._patcher(torch.from_numpy(ids).to(device), self._attends[device])
            entropy = entropies(logits).cpu().numpy()
        return make_batch(ids, patch_starts(entropy, self._rule), noise, sizes, layout, rng)


def recompute(model: Blt) -> None:
    """Let the layers of all stacks compute their activations again in the backward pass instead of keeping them."""
    for stack in model.modules():
        if isinstance(stack, Stack):
            for layer in stack:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
