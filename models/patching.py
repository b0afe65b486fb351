"""The patch rule: where patches start, decided from bytes already known (arXiv 2412.09871 §2.3; design §2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def entropies(logits: Tensor) -> Tensor:
    """Shannon entropies in nats [...] (fp32) of logits [..., V].

    Both factors come from row-wise kernels, so that a row's entropy never depends on the other rows.
    """
    logits = logits.float()
    return -(torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum(-1)


@dataclass(frozen=True)
class PatchRule:
    """Position p+1 opens a patch iff p = 0, the entropy at p is above the threshold (nats) or the run is full."""

    threshold: float
    max_patch_length: int | None = None

    def opens(self, position: int, entropy: float, run: int) -> bool:
        """Whether position + 1 opens a patch. `run` is the length of position's patch so far, its own byte included."""
        return position == 0 or entropy > self.threshold or run == self.max_patch_length

    def ends(self, position: int, entropy: list[float], open_start: int) -> list[int]:
        """Where patches end among the rows at `position`, position + 1, ... with these entropies (nats).

        `open_start` is where the open patch began. The same rule as `opens`, by patches instead of bytes.
        """
        if len(entropy) == 1:
            if entropy[0] > self.threshold or position - open_start + 1 == self.max_patch_length or position == 0:
                return [position]
            return []
        threshold, longest = self.threshold, self.max_patch_length
        over = [at for at, value in enumerate(entropy, position) if value > threshold]
        if position == 0 and (not over or over[0] > 0):
            over.insert(0, 0)
        ends: list[int] = []
        start = open_start
        for end in (*over, position + len(entropy)):
            while longest is not None and end - start >= longest:
                start += longest
                ends.append(start - 1)
            if start <= end < position + len(entropy):
                ends.append(end)
                start = end + 1
        return ends

    def starts(self, entropy: list[float]) -> list[bool]:
        """Start flags for positions 0..T of a sequence whose rows have these T entropies."""
        flags = [True]
        run = 0
        for position, value in enumerate(entropy):
            run = 1 if flags[position] else run + 1
            flags.append(self.opens(position, value, run))
        return flags
