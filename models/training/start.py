"""From a checkpoint to a model that can be trained: the diffusion head's table, frozen parts, and the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastblt.models.blt import Blt, CausalAttention
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.training.data import Sequential
from fastblt.models.training.layout import PARTS
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE

#: Sequences that a new table is measured on.
_MEASURED = 8


def begin(
    checkpoint: Path, block_sizes: Iterable[int], freeze: Iterable[str], text: Sequential, *, teach: bool = False
) -> tuple[Blt, Blt | None]:
    """The model of a checkpoint with a diffusion head, and with `teach` a frozen one that stays as the checkpoint is.

    Where the checkpoint has no diffusion head, its table is measured on `text`. Frozen parts require no gradient; the
    entropy model is always frozen, and the teacher shares the frozen modules. Raises CheckpointError and ConfigError.
    """
    model = load_checkpoint(checkpoint)
    had_head = model.config.has_diffusion
    teacher = load_checkpoint(checkpoint) if teach else None
    model.config = replace(model.config, block_sizes=tuple(block_sizes), acceptance={})
    if not had_head:
        model.local_decoder.embed_tokens = nn.Embedding.from_pretrained(block_table(model, text), freeze=False)
    frozen = {"patcher", *(name for part in freeze for name in PARTS[part])}
    for name, module in model.named_children():
        module.requires_grad_(name not in frozen)
        if teacher is not None and name in frozen:
            setattr(teacher, name, module)
    model.train()
    return model, teacher


@torch.no_grad()
def block_table(model: Blt, text: Sequential) -> torch.Tensor:
    """Rows [261, d] that block rows begin as, for a decoder that has seen no blocks.

    The decoder knows encoder states. So the row of a byte is the mean of its states in the text, and that of [MASK]
    the mean of all, which a byte that does not occur gets too. A decoder with a table of its own keeps it, and its
    mean is [MASK].
    """
    if model.config.decoder_input == "embedding":
        table = model.local_decoder.embed_tokens.weight.clone()
        table[MASK_ID] = table[:MASK_ID].mean(0)
        return table
    count = min(_MEASURED, len(text))
    ids = torch.from_numpy(text.take([number * len(text) // count for number in range(count)]))
    sums = torch.zeros(VOCAB_SIZE, model.config.encoder.hidden_size)
    seen = torch.zeros(VOCAB_SIZE)
    for row in ids:
        embedded = model.embed(model.windows(row[None]))
        states = model.local_encoder(embedded, CausalAttention(model.config.encoder, len(row), row.device))[0]
        sums.index_add_(0, row, states)
        seen.index_add_(0, row, torch.ones(len(row)))
    mean = sums.sum(0) / seen.sum()
    means = torch.where(seen[:, None] > 0, sums / seen.clamp_min(1)[:, None], mean)
    return torch.cat([means, mean.expand(MASK_ID + 1 - VOCAB_SIZE, -1)]).clone()
