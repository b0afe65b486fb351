"""What passes read: parameters by module, and the gigabytes of weights that a decoding's passes touch.

`gb_paper` is the measure of the Fast-BLT paper (arXiv 2605.08044 §4.2, Eq. 8); `gb` counts all four modules. Only
weights are counted, once a pass however many rows it carries: no caches, no activations, no lookups in the hash tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig


class Passes(Protocol):
    """Forward passes by module."""

    patcher: int
    encoder: int
    global_: int
    decoder: int


@dataclass(frozen=True)
class ModuleParameters:
    """Weights that one pass of each module reads, counted as the paper counts them.

    The encoder has its table of 260 bytes and no hash tables. The decoder has its projection of latents, its
    cross-attentions and the head, and no table: lookups of its own are not in the paper's model.
    """

    patcher: int
    encoder: int
    global_: int
    decoder: int

    @classmethod
    def of(cls, config: BltConfig) -> ModuleParameters:
        """The counts of a model of that configuration, however its weights are kept."""
        with torch.device("meta"):
            model = Blt(config)
        table = getattr(model.local_decoder, "embed_tokens", None)
        decoder = _count(model.local_decoder) + _count(model.lm_head)
        return cls(
            patcher=_count(model.patcher),
            encoder=_count(model.local_encoder),
            global_=_count(model.global_transformer),
            decoder=decoder - (0 if table is None else _count(table)),
        )


def gb_paper(parameters: ModuleParameters, decoder_nfe: int, upstream_nfe: int) -> float:
    """The paper's estimate (Eq. 8) at 2 bytes a weight; encoder and global transformer run together there."""
    upstream = parameters.encoder + parameters.global_
    return 2 * (decoder_nfe * parameters.decoder + upstream_nfe * upstream) / 1e9


def gb(parameters: ModuleParameters, passes: Passes, bytes_per_weight: float, patcher_bytes: float = 4) -> float:
    """What the passes that ran read, the entropy model's among them (at its own `patcher_bytes` a weight)."""
    main = (
        passes.encoder * parameters.encoder + passes.global_ * parameters.global_ + passes.decoder * parameters.decoder
    )
    return (bytes_per_weight * main + patcher_bytes * passes.patcher * parameters.patcher) / 1e9


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
