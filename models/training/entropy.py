"""The first training stage: the entropy model, the threshold for a mean patch size, and the patches themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastblt.models.blt import Patcher, init_weights
from fastblt.models.config import StackConfig
from fastblt.models.patching import PatchRule, entropies
from fastblt.models.training.attention import WindowAttention
from fastblt.models.training.data import Sequential, rows
from fastblt.models.vocabulary import VOCAB_SIZE


class NextByte(nn.Module):
    """The entropy model's objective: next-byte prediction over sequences of `length` ids."""

    def __init__(self, config: StackConfig, length: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.model = Patcher(config)
        init_weights(self.model, seed)
        self._attend = WindowAttention(config, length, device)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(batch)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean next-byte loss (nats), and bits a byte to log."""
        ids = batch["ids"]
        logits = self.model(ids, self._attend)[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, VOCAB_SIZE), ids[:, 1:].reshape(-1))
        return loss, {"bits": loss.detach() / math.log(2)}


class EntropyTask:
    """Trains the entropy model (`Patcher`)."""

    def __init__(self, module: NextByte, train: Sequential, held_out: Sequential, batch: int, seed: int) -> None:
        self.module = module
        self._train, self._held_out, self._batch, self._seed = train, held_out, batch, seed

    def layers(self) -> Iterable[nn.Module]:
        return []

    def ignored(self) -> Iterable[nn.Parameter]:
        return []

    def batch(self, step: int, group: int, groups: int) -> dict[str, Tensor]:
        chosen = rows(len(self._train), step, group, groups, self._batch, self._seed)
        return {"ids": torch.from_numpy(self._train.take(chosen))}

    def held_out(self) -> Iterable[dict[str, Tensor]]:
        return [{"ids": torch.from_numpy(self._held_out.take([0]))}]

    def checkpoint(self, step: int, progress: float) -> None:
        pass


@torch.inference_mode()
def measure(patcher: Patcher, config: StackConfig, chunks: NDArray, batch: int = 16) -> tuple[NDArray, float]:
    """Entropies (nats, fp32 [N, length]) of chunks [N, length], and the model's cross-entropy in bits per byte."""
    attend = WindowAttention(config, chunks.shape[1])
    result = np.empty(chunks.shape, np.float32)
    bits = 0.0
    for first in range(0, len(chunks), batch):
        ids = torch.from_numpy(chunks[first : first + batch].astype(np.int64))
        logits = patcher(ids, attend)
        result[first : first + batch] = entropies(logits).numpy()
        bits += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return result, bits / math.log(2) / (len(chunks) * (chunks.shape[1] - 1))


def patch_starts(entropy: NDArray, rule: PatchRule) -> NDArray[np.bool_]:
    """`PatchRule.starts` for many sequences at once: entropies (nats) [N, T] give bool [N, T + 1]."""
    starts = np.zeros((entropy.shape[0], entropy.shape[1] + 1), bool)
    starts[:, 0] = True
    run = np.zeros(entropy.shape[0], np.int64)
    limit = rule.max_patch_length or entropy.shape[1] + 1
    for position in range(entropy.shape[1]):
        run = np.where(starts[:, position], 1, run + 1)
        starts[:, position + 1] = (position == 0) | (entropy[:, position] > rule.threshold) | (run == limit)
    return starts


def choose_threshold(entropy: NDArray, bytes_per_patch: float, max_patch_length: int | None) -> float:
    """The threshold in nats, to three decimals, for a mean patch size of `bytes_per_patch`. Found by bisection."""
    low, high = 0.0, math.log(VOCAB_SIZE)
    for _ in range(24):
        middle = (low + high) / 2
        starts = patch_starts(entropy, PatchRule(middle, max_patch_length))[:, :-1]
        low, high = (middle, high) if starts.size / starts.sum() < bytes_per_patch else (low, middle)
    return round(low, 3)
