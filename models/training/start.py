"""From a checkpoint to a model that can be trained: the diffusion head's table, frozen parts, and the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastblt.models.blt import Blt, init_weights
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.training.layout import PARTS
from fastblt.models.vocabulary import MASK_ID


def begin(
    checkpoint: Path, block_sizes: Iterable[int], freeze: Iterable[str], *, seed: int = 0, teach: bool = False
) -> tuple[Blt, Blt | None]:
    """The model of a checkpoint with a diffusion head, and with `teach` a frozen one that stays as the checkpoint is.

    Where the checkpoint has no diffusion head, the table that block rows begin from is new; a decoder with a table of
    its own gets a new [MASK] row. (Beginning with the encoder's embeddings, or with the mean encoder state of each
    byte, was no better or worse: docs/notebook.md.) Frozen parts require no gradient; the entropy model is always
    frozen, and the teacher shares the frozen modules. Raises CheckpointError and ConfigError.
    """
    model = load_checkpoint(checkpoint)
    had_head = model.config.has_diffusion
    teacher = load_checkpoint(checkpoint) if teach else None
    model.config = replace(model.config, block_sizes=tuple(block_sizes), acceptance={})
    if not had_head:
        table = nn.Embedding(MASK_ID + 1, model.config.decoder.hidden_size)
        init_weights(table, seed)
        if model.config.decoder_input == "embedding":
            with torch.no_grad():
                table.weight[:MASK_ID] = model.local_decoder.embed_tokens.weight[:MASK_ID]
        model.local_decoder.embed_tokens = table
    frozen = {"patcher", *(name for part in freeze for name in PARTS[part])}
    for name, module in model.named_children():
        module.requires_grad_(name not in frozen)
        if teacher is not None and name in frozen:
            setattr(teacher, name, module)
    model.train()
    return model, teacher
