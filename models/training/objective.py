"""The BLT-D objective (arXiv 2605.08044 §3.2, Eq. 5-7): the next-byte loss of clean rows plus the loss of masked block
rows, weighted by 1/t.

It runs the same modules as inference, over fixed shapes so that one compiled graph fits all batches.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastblt.kernels.latent_attention import latent_attention
from fastblt.models.blt import Blt
from fastblt.models.config import StackConfig
from fastblt.models.layers import CrossAttention, Rope, rotate
from fastblt.models.training.attention import TILE, WindowAttention, dense, tile_positions, tiles, window_of
from fastblt.models.training.layout import LayoutConfig, block_arrays, patch_arrays
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE


@torch.library.custom_op("fastblt_training::gather", mutates_args=())
def gather(table: Tensor, index: Tensor) -> Tensor:
    """Rows [M, d] of a table [N, d]. An operator of our own, since the compiler's gradient of a lookup is slow: it adds
    single elements atomically."""
    return table.index_select(0, index)


@gather.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(index.shape[0], table.shape[1])


@torch.library.custom_op("fastblt_training::scatter", mutates_args=())
def scatter(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """The sums [size, d] of the rows [M, d] with the same index."""
    return rows.new_zeros(size, rows.shape[1]).index_add_(0, index, rows)


@scatter.register_fake
def _(rows: Tensor, index: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, rows.shape[1])


def _keep(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.size = inputs[0].shape[0]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return scatter(gradient.contiguous(), index, ctx.size), None


gather.register_autograd(_backward, setup_context=_keep)


def make_batch(
    ids: NDArray,
    starts: NDArray[np.bool_],
    noise: NDArray,
    sizes: NDArray,
    config: LayoutConfig,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """The tensors that `Objective` needs, from ids [N, T], start flags [N, T + 1], noise t [N] and block sizes [N]."""
    arrays = {"ids": ids, **patch_arrays(starts, config), **block_arrays(ids, starts, noise, sizes, config, rng)}
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


class Objective(nn.Module):
    """Logits and losses of a model on batches of `make_batch`, with sequences of `length` ids.

    `distill` applies to blocks that are masked entirely: this share of their loss has the causal head's distribution as
    its target in place of the text's byte, since verification compares drafts with the causal head. `keep` applies to
    clean rows: this share of their loss has the distribution of `teacher` as its target, the frozen model that training
    began with, so that the causal head keeps what it knew.
    """

    def __init__(
        self,
        model: Blt,
        length: int,
        masked_weight: float = 1.0,
        distill: float = 0.0,
        keep: float = 0.0,
        teacher: Blt | None = None,
    ) -> None:
        super().__init__()
        config, device = model.config, model.lm_head.weight.device
        self.model, self.masked_weight, self.distill = model, masked_weight, distill
        self.keep = keep
        self.teacher = Objective(teacher, length) if teacher is not None else None
        self._encoder_attend = WindowAttention(config.encoder, length, device)

        def turns(stack: StackConfig, positions: int) -> Tensor:
            return Rope(stack.head_dim, stack.rope_theta).at(torch.arange(positions), positions).clone().to(device)

        self._global_turns = turns(config.global_, length)
        self._decoder_turns = turns(config.decoder, length + 64)  # the last blocks extend past the end
        self._window = window_of(config.decoder, length)
        self._positions, self._key_positions = (at.to(device) for at in tile_positions(length, self._window))

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of clean rows [N, T, 260] and of block rows [N, S, BLOCK_ROWS, 260]."""
        states = self.states(batch["ids"])
        latents = self.latents(states, batch)
        if "block_shown" in batch:
            self._refine(states.detach(), latents.detach(), batch)
        return self.project(self.decode(states, latents, batch), len(batch["ids"]))

    @torch.no_grad()
    def _refine(self, states: Tensor, latents: Tensor, batch: dict[str, Tensor]) -> None:
        """Let the refined blocks show the bytes of the text at the places where the model, shown none, is surest.

        Changes `block_input` and `block_masked` of the batch.
        """
        shown, valid = batch["block_shown"], batch["block_valid"]
        refined = shown > 0
        masks = {**batch, "block_input": batch["block_input"].masked_fill(refined, MASK_ID)}
        hidden = self.decode(states, latents, masks)[:, TILE:]
        sure = torch.softmax(self.model.lm_head(hidden), -1).amax(-1).view(shown.shape)
        sure = sure.masked_fill(~valid, -1.0)
        number = batch["block_number"]
        rows = torch.arange(shown.shape[-1], device=shown.device)
        own = number[..., :, None] == number[..., None, :]
        # Of two rows that are equally sure, the first one comes first.
        before = sure[..., None, :] > sure[..., :, None]
        before = before | (sure[..., None, :] == sure[..., :, None]) & (rows < rows[:, None])
        place = (own & before).sum(-1)
        fill = refined & valid & (place < shown)
        batch["block_input"] = torch.where(
            fill, batch["block_target"], batch["block_input"].masked_fill(refined, MASK_ID)
        )
        batch["block_masked"] = torch.where(refined, valid & ~fill, batch["block_masked"])

    @torch.no_grad()
    def causal(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of clean rows alone [N, T, 260], without a gradient. The model needs no diffusion head."""
        states = self.states(batch["ids"])
        hidden = self.decode(states, self.latents(states, batch), batch, blocks=False)
        return self.model.lm_head(hidden).reshape(*batch["ids"].shape, VOCAB_SIZE)

    def project(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Logits of clean and of block rows of `count` sequences from final decoder states."""
        logits = self.model.lm_head(hidden)
        return logits[:, :TILE].reshape(count, -1, VOCAB_SIZE), logits[:, TILE:].unflatten(0, (count, -1))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss`; in eval mode with the share of drafted bytes that the causal head accepts, `accepted`."""
        if self.training:
            return self.loss(batch)
        loss, figures = Objective.loss(self, batch)
        return loss, figures | {"accepted": self._accepted(*self.logits(batch), batch)}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean next-byte loss plus the weighted masked loss (nats), and figures of both to log."""
        clean, block = (logits.float() for logits in self.logits(batch))
        seen = batch["clean_valid"][:, :-1].float()
        losses = F.cross_entropy(clean[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
        clean_loss = (losses * seen.flatten()).sum() / seen.sum()
        figures = {"bits": clean_loss.detach() / math.log(2)}
        if self.teacher is not None:
            taught = torch.softmax(self.teacher.causal(batch)[:, :-1].float(), -1)
            losses = -(taught * torch.log_softmax(clean[:, :-1], -1)).sum(-1)
            kept = (losses * seen).sum() / seen.sum()
            entropy = -(taught * taught.clamp_min(1e-30).log()).sum(-1)
            figures["drift"] = kept.detach() - (entropy * seen).sum() / seen.sum()
            clean_loss = clean_loss + self.keep * (kept - clean_loss)
        losses = F.cross_entropy(block.flatten(0, 2), batch["block_target"].flatten(), reduction="none")
        masked = batch["block_masked"].float()
        losses = losses.view_as(masked) * masked
        cells = batch["block_valid"].float().sum()
        aimed = losses
        if self.distill:
            share = self.distill * batch["block_full"].float()
            aimed = losses + share * (self._distilled(clean, block, batch) * masked - losses)
        masked_loss = (aimed * batch["block_weight"]).sum() / cells
        figures |= {
            "masked": masked_loss.detach(),
            "masked_nats": losses.detach().sum() / masked.sum().clamp_min(1.0),
        }
        return clean_loss + self.masked_weight * masked_loss, figures

    def _accepted(self, clean: Tensor, block: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Of the bytes of blocks that are masked altogether, the share that the causal head would choose too, given
        the text, at their position and all before it in the block."""
        index = self._rows_before(batch)
        wanted = clean.argmax(-1).flatten().index_select(0, index).view(batch["block_start"].shape)
        drafted = batch["block_full"] & batch["block_valid"]
        wrong = (block.argmax(-1) != wanted) & drafted
        number = batch["block_number"]
        rows = torch.arange(number.shape[-1], device=number.device)
        up_to = (number[..., :, None] == number[..., None, :]) & (rows <= rows[:, None])
        accepted = drafted & ~(up_to & wrong[..., None, :]).any(-1)
        return accepted.sum() / drafted.sum().clamp_min(1)

    def _rows_before(self, batch: dict[str, Tensor]) -> Tensor:
        """Of every block row the number of the clean row, over all sequences, that predicts the same byte."""
        count, length = batch["ids"].shape
        before = (batch["block_position"] - 1).clamp(0, length - 1)
        return (before + torch.arange(count, device=before.device)[:, None, None] * length).flatten()

    def _distilled(self, clean: Tensor, block: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy (nats) [N, S, BLOCK_ROWS] of block rows to the causal head's distributions for their bytes."""
        index = self._rows_before(batch)
        taught = torch.softmax(clean.detach(), -1).flatten(0, 1).index_select(0, index)
        return -(taught * torch.log_softmax(block.flatten(0, 2), -1)).sum(-1).view_as(batch["block_weight"])

    def states(self, ids: Tensor) -> Tensor:
        """Encoder states [N, T, d]."""
        model = self.model
        embedded = gather(model.local_encoder.embed_tokens.weight, ids.flatten())
        if model.config.num_hash_tables:
            hashes = (model.windows(ids).unsqueeze(-2) * model._hash_powers).sum(-1) % model.config.hash_group_vocab
            index = (hashes + model._hash_offsets).flatten()
            rows = gather(model.encoder_hash_tok_embedding.weight, index)
            embedded = embedded + rows.view(-1, model.config.num_hash_tables, rows.shape[-1]).sum(1)
        return model.local_encoder(embedded.view(*ids.shape, -1), self._encoder_attend)

    def latents(self, states: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Latents [N, P + F, dg] of the P kept patches and of the F patches closed by force (F may be 0)."""
        encoder = self.model.local_encoder
        count, length, size = states.shape
        pool_index, inside = batch["pool_index"], batch["pool_inside"]
        device = states.device
        places = torch.arange(inside.shape[1], device=device).expand(count, -1)
        if "forced_place" in batch:
            pool_index = torch.cat([pool_index, batch["forced_index"]], 1)
            inside = torch.cat([inside, batch["forced_inside"]], 1)
            places = torch.cat([places, batch["forced_place"]], 1)
        # A patch sees itself and the kept ones before it.
        kept = batch["pool_inside"].shape[1]
        rows = torch.arange(places.shape[1], device=device)
        sees = (places[:, :, None] > places[:, None]) & (rows < kept) | (rows[:, None] == rows)
        inside = inside.flatten(0, 1)
        offset = torch.arange(count, device=device)[:, None, None] * length
        cross: CrossAttention = encoder.cross_attn_layers[-1]  # type: ignore[assignment]
        k, v = cross.keys_values(states)
        table = torch.cat([states, k.flatten(-2), v.flatten(-2)], -1).flatten(0, 1)
        # States, keys and values are computed once for each byte and then gathered for each patch, padded to L.
        padded = gather(table, (pool_index + offset).flatten()).view(*inside.shape, -1)
        peak = padded[..., :size].masked_fill(~inside[..., None], float("-inf")).amax(1)
        queries = encoder.patch_embedding_projection(peak).view(-1, encoder.k, size)
        heads = padded[..., size:].unflatten(-1, (2, *k.shape[-2:]))

        def attend(layer: int, q: Tensor) -> Tensor:
            return dense(q, heads[:, :, 0], heads[:, :, 1], inside[:, None].expand(-1, encoder.k, -1))

        vectors = cross(queries, attend, 0).reshape(count, -1, encoder.k * size)
        turns = self._global_turns[places]

        def global_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            patches, heads = q.shape[1:3]
            q, k = rotate(q, turns), rotate(k, turns)
            groups = heads // k.shape[2]
            # Queries that share a key head become rows of one product.
            q = q.unflatten(2, (-1, groups)).transpose(2, 3).flatten(1, 2)
            out = dense(q, k, v, sees.repeat_interleave(groups, 1)).unflatten(1, (patches, groups))
            return out.transpose(2, 3).flatten(2, 3)

        return self.model.global_transformer(vectors, global_attend)

    def decode(self, states: Tensor, latents: Tensor, batch: dict[str, Tensor], *, blocks: bool = True) -> Tensor:
        """Final decoder states [N * S, TILE + BLOCK_ROWS, d] of every tile's clean rows and block rows, or
        [N * S, TILE, d] of its clean rows alone."""
        decoder = self.model.local_decoder
        count, length = states.shape[:2]
        patches = latents.shape[1]
        clean = states
        if self.model.config.decoder_input == "embedding":
            clean = gather(decoder.embed_tokens.weight, batch["ids"].flatten()).view(count, length, -1)
        x = clean.reshape(-1, TILE, clean.shape[-1])
        positions = self._positions.expand(count, -1, -1).flatten(0, 1)
        latent = batch["clean_latent"].view(count, -1, TILE)
        mask = self.mask(batch)
        if blocks:
            shown = batch["block_input"].flatten(0, 1)
            filled = gather(decoder.embed_tokens.weight, shown.flatten()).view(*shown.shape, -1)
            x = torch.cat([x, filled], 1)
            positions = torch.cat([positions, batch["block_position"].flatten(0, 1)], 1)
            latent = torch.cat([latent, batch["block_latent"]], 2)
        else:
            mask = mask[:, :TILE, : self._window + TILE]
        turns = self._decoder_turns[positions]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, turns), rotate(k, turns)

            def keys(rows: Tensor) -> Tensor:
                prefix = tiles(rows[:, :TILE].reshape(count, length, *rows.shape[2:]), self._window).flatten(0, 1)
                return torch.cat([prefix, rows[:, TILE:]], 1)

            return dense(q, keys(k), keys(v), mask)

        index = (latent + torch.arange(count, device=latent.device)[:, None, None] * patches).flatten()
        source = decoder.patch_embedding_projection(latents.flatten(0, 1)).unflatten(-1, (decoder.k, -1))

        def cross_attend(layer: int, q: Tensor) -> Tensor:
            cross: CrossAttention = decoder.cross_attn_layers[layer]  # type: ignore[assignment]
            k, v = cross.keys_values(source)
            rows = gather(torch.cat([k.flatten(1), v.flatten(1)], 1), index)
            k, v = rows.view(*q.shape[:2], 2, decoder.k, *k.shape[-2:]).unbind(2)
            return latent_attention(q, k, v)

        return decoder(x, attend, cross_attend)

    def mask(self, batch: dict[str, Tensor]) -> Tensor:
        """The attention mask, bool [N * S, TILE + BLOCK_ROWS, window + TILE + BLOCK_ROWS].

        A clean row at p sees clean positions [p-W+1, p+1); a block row of a block at s sees clean positions
        [max(0, s-W+1), s) and every row of its own block (arXiv 2605.08044 §3.2.2; design §2.6).
        """
        window = self._window
        start = batch["block_start"].flatten(0, 1)
        count = batch["ids"].shape[0]
        position = self._positions.expand(count, -1, -1).flatten(0, 1)
        low = torch.cat([position, start], 1) - window + 1
        high = torch.cat([position + 1, start], 1)
        keys = self._key_positions.expand(count, -1, -1).flatten(0, 1)[:, None]
        clean = (keys >= low[..., None].clamp_min(0)) & (keys < high[..., None])
        number = batch["block_number"].flatten(0, 1)
        number = torch.cat([torch.full_like(position, -1), number], 1)
        own = number[:, :, None] == number[:, None, TILE:]
        return torch.cat([clean, own], 2)
