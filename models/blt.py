"""The Byte Latent Transformer, as published (arXiv 2412.09871 §3; the numerics of BLT in `transformers`), as modules
without state.

The modules take their attention from outside (see `models.layers`). `Blt.forward` runs whole sequences without a
cache: it is what training and the reference decoders build on, and what parity with `transformers` is tested on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblt.kernels.attention import masked_attention
from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.upstream import StoredPatches
from fastblt.kernels.hash_embedding import hash_embedding, tables_of
from fastblt.kernels.latent_attention import StoredLatents, latent_attention
from fastblt.kernels.paged_attention import PagedAttention
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.models.config import BltConfig, StackConfig
from fastblt.models.layers import CrossAttend, CrossAttention, RMSNorm, Rope, SelfAttend, Stack, rotate
from fastblt.models.patching import PatchRule, entropies
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE

#: One prime per hash function, cycled.
HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


class Table(nn.Embedding):
    """An embedding table whose numbers are yet to come, from a checkpoint or `init_weights`.

    Torch would draw some at once; where a tensor has no memory it imports its compiler for that, which takes seconds.
    """

    def reset_parameters(self) -> None:
        pass


class Patcher(nn.Module):
    """The entropy model: a small causal byte transformer whose uncertainty places the patches. Always fp32."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.embed_tokens = Table(VOCAB_SIZE, config.hidden_size)
        self.layers = Stack(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, VOCAB_SIZE, bias=False)

    def forward(self, ids: Tensor, attend: SelfAttend) -> Tensor:
        """Next-byte logits [..., 260] (fp32) of ids [...]."""
        return self.lm_head(self.norm(self.layers(self.embed_tokens(ids), attend)))

    def stored_entropies(self, ids: RequestIds, attend: PagedAttention) -> Tensor:
        """Entropies of the next byte, fp32 nats [N], at the rows of the attention."""
        return entropies(self(ids.read(attend.at.rows, attend.at.positions), attend))


class LocalEncoder(nn.Module):
    """Byte rows to hidden states, and the states of a patch to its vector."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        stack = config.encoder
        self.k = config.cross_attn_k
        self.embed_tokens = Table(VOCAB_SIZE, stack.hidden_size)
        self.layers = Stack(stack)
        self.patch_embedding_projection = nn.Linear(stack.hidden_size, stack.hidden_size * self.k, bias=False)
        count = stack.num_layers if config.encoder_cross_attn_all_layers else 1
        self.cross_attn_layers = nn.ModuleList(CrossAttention(stack) for _ in range(count))

    def forward(self, x: Tensor, attend: SelfAttend) -> Tensor:
        """States [..., d] of embedded rows x [..., d]."""
        return self.layers(x, attend)

    def pool(self, states: Tensor, inside: Tensor, *, tiled: bool = False) -> Tensor:
        """Patch vectors [P, k*d] from padded byte states [P, L, d] and their mask `inside` bool [P, L].

        The maximum over a patch's last-layer states asks k queries of exactly its own bytes (arXiv 2412.09871 §3.2.2).
        Where every layer has a cross-attention, the published code overwrites all but the last.
        """
        patches, _, size = states.shape
        peak = states.masked_fill(~inside[..., None], float("-inf")).amax(1)
        queries = self.patch_embedding_projection(peak).view(patches * self.k, size)
        cross = cast(CrossAttention, self.cross_attn_layers[-1])
        k, v = cross.keys_values(states)

        def attend(layer: int, q: Tensor) -> Tensor:
            q = q.view(patches, self.k, *q.shape[-2:])
            seen = inside[:, None].expand(-1, self.k, -1)
            return masked_attention(q, k, v, seen, tiled=tiled).flatten(0, 1)

        return cross(queries, attend, 0).view(patches, self.k * size)

    def pool_stored(self, patches: StoredPatches, *, tiled: bool = False) -> Tensor:
        """Patch vectors [P, k*d] of patches whose encoder states are cached in pages."""
        return self.pool(*patches.padded(), tiled=tiled)


class GlobalTransformer(nn.Module):
    """The large causal transformer over patches. No final norm."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        width = config.encoder.hidden_size * config.cross_attn_k
        self.token_embedding_projection: nn.Module = nn.Identity()
        if width != config.global_.hidden_size:
            self.token_embedding_projection = nn.Linear(width, config.global_.hidden_size, bias=False)
        self.layers = Stack(config.global_)

    def forward(self, vectors: Tensor, attend: SelfAttend) -> Tensor:
        """Latents [..., dg] of patch vectors [..., k*d]."""
        return self.layers(self.token_embedding_projection(vectors), attend)


class LocalDecoder(nn.Module):
    """Byte rows and one latent each to next-byte (or, in a diffusion block, own-byte) states.

    `embed_tokens` [261, d], row 260 = [MASK], exists where there is a diffusion head or the decoder's input is
    `embedding`; the published checkpoints have none.
    """

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        stack = config.decoder
        self.k = config.cross_attn_k
        if config.has_diffusion or config.decoder_input == "embedding":
            self.embed_tokens: nn.Embedding = Table(MASK_ID + 1, stack.hidden_size)
        self.layers = Stack(stack)
        self.patch_embedding_projection = nn.Linear(config.global_.hidden_size, stack.hidden_size * self.k, bias=False)
        count = stack.num_layers if config.decoder_cross_attn_all_layers else 1
        self.cross_attn_layers = nn.ModuleList(CrossAttention(stack) for _ in range(count))
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)

    def latent_keys_values(self, latents: Tensor) -> Tensor:
        """Keys and values of latents [..., dg] for the decoder: [..., C, 2, k, Hkv, D], for C cross-attentions."""
        source = self.patch_embedding_projection(latents).unflatten(-1, (self.k, -1))
        if latents.dim() == 2:
            # From the engine: fused maps take rows of one leading dimension.
            source = source.flatten(0, 1)
        layers: list[Tensor] = []
        shape = (*latents.shape[:-1], self.k)
        for cross in self.cross_attn_layers:
            both = cast(CrossAttention, cross).keys_values(source)
            layers.append(torch.stack([rows.view(shape + rows.shape[-2:]) for rows in both], dim=-4))
        return torch.stack(layers, dim=-5)

    def store_latents(self, latents: Tensor, store: Tensor, slots: Tensor) -> None:
        """Cache the keys and values of latents [P, dg] at `slots` int32 [P] of `store` [slots, C, 2, k, Hkv, D]."""
        store.index_copy_(0, slots.long(), self.latent_keys_values(latents))

    def stored_states(
        self,
        known: PagedRows | RequestIds,
        block: Tensor | None,
        attend: PagedAttention,
        latents: StoredLatents,
        read: Tensor | None = None,
    ) -> Tensor:
        """Final normed states [N, d] of the attention's rows.

        Rows begin as `known` says, as encoder states or as embeddings of ids; block rows, those with an id >= 0 in
        `block` int32 [N], as embeddings of that id. Where `read` bool [N] is given, the results of other rows are
        undefined; the keys and values that they cache are right.
        """
        owners, positions = attend.at.rows, attend.at.positions
        if isinstance(known, PagedRows):
            x = known.read(owners, positions)
            if block is not None:
                x = torch.where((block >= 0)[:, None], self.embed_tokens(block.clamp_min(0)), x)
        else:
            ids = known.read(owners, positions)
            x = self.embed_tokens(ids if block is None else torch.where(block >= 0, block, ids))
        return self(x, attend, latents)

    def forward(self, x: Tensor, attend: SelfAttend, cross_attend: CrossAttend) -> Tensor:
        """Final normed states [..., d] of input rows x [..., d]."""
        crosses = cast(Sequence[CrossAttention], self.cross_attn_layers)
        return self.norm(self.layers(x, attend, crosses, cross_attend))


@dataclass
class BltOutput:
    """What a whole-sequence pass over ids [B, T] computes.

    logits fp32 [B, T, 260]; entropies fp32 nats [B, T]; starts bool [B, T + 1]: starts[b, p] says that position p opens
    a patch (p = T: whether the next byte will); states [B, T, d] of the encoder; latents [B, P, dg], padded.
    """

    logits: Tensor
    entropies: Tensor
    starts: Tensor
    states: Tensor
    latents: Tensor


class Blt(nn.Module):
    """All modules, under the names of the published checkpoint: `lm_head`, and the others with `model.` in front."""

    _hash_powers: Tensor
    _hash_offsets: Tensor

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.hash_group_sizes
        self.encoder_hash_tok_embedding = Table(
            config.num_hash_tables * config.hash_group_vocab, config.encoder.hidden_size
        )
        self.local_encoder = LocalEncoder(config)
        self.global_transformer = GlobalTransformer(config)
        self.local_decoder = LocalDecoder(config)
        self.patcher = Patcher(config.patcher)
        self.lm_head = nn.Linear(config.decoder.hidden_size, VOCAB_SIZE, bias=False)
        self.register_buffer("_hash_powers", _hash_powers(sizes, config.hash_functions), persistent=False)
        self.register_buffer("_hash_offsets", _hash_offsets(config), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and caches, the entropy model's aside."""
        return self.local_encoder.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.local_encoder.embed_tokens.weight.device

    @property
    def hash_window(self) -> int:
        """Ids that the embedding of one row reads: its own and those before it."""
        return max(self.config.hash_group_sizes, default=1)

    def windows(self, ids: Tensor) -> Tensor:
        """Hash windows [B, T, hash_window] of whole sequences [B, T]; what lies before the start is id 0."""
        return F.pad(ids, (self.hash_window - 1, 0)).unfold(-1, self.hash_window, 1)

    def hash_tables(self) -> structs.Tables:
        """The embedding tables of `embed`, for C code."""
        tables = self.local_encoder.embed_tokens.weight, self.encoder_hash_tok_embedding.weight
        return tables_of(self._hash_powers, self.config.hash_group_vocab, *tables)

    def embed(self, windows: Tensor) -> Tensor:
        """Byte plus hash n-gram embeddings [..., d] of int64 windows [..., hash_window], the row's own id last.

        hash = sum of id * prime^j over the n-gram, oldest first, in wrapping int64, floor-mod table: as in the
        published weights.
        """
        return hash_embedding(
            windows,
            self._hash_powers,
            self._hash_offsets,
            self.config.hash_group_vocab,
            self.local_encoder.embed_tokens.weight,
            self.encoder_hash_tok_embedding.weight,
        )

    def encode_stored(self, ids: RequestIds, states: PagedRows, attend: PagedAttention) -> Tensor:
        """Encoder states [N, d] of the attention's rows, which are also cached in `states`. `ids` are padded for
        `hash_window`."""
        owners, positions = attend.at.rows, attend.at.positions
        rows = self.local_encoder(self.embed(ids.windows(owners, positions)), attend)
        states.write(owners, positions, rows)
        return rows

    def decoder_rows(self, ids: Tensor, states: Tensor) -> Tensor:
        """What clean decoder rows start from: encoder states, or a lookup of ids [...] (design §2.4)."""
        return states if self.config.decoder_input == "encoder" else self.local_decoder.embed_tokens(ids)

    def forward(self, ids: Tensor, starts: Tensor | None = None) -> BltOutput:
        """Run sequences ids [B, T] whole. `starts` bool [B, T + 1] overrides the patch rule."""
        config = self.config
        attend = CausalAttention(config.patcher, ids.shape[1], ids.device)
        entropy = entropies(self.patcher(ids, attend))
        if starts is None:
            rule = PatchRule(config.patching_threshold, config.max_patch_length)
            starts = torch.tensor([rule.starts(row) for row in entropy.tolist()], device=ids.device)
        states = self.local_encoder(
            self.embed(self.windows(ids)), CausalAttention(config.encoder, ids.shape[1], ids.device)
        )
        latents = self.latents(states, starts)
        # Row p reads the newest patch that is closed once byte p is known (design §2.3).
        newest = starts.long().cumsum(-1)[:, 1:] - 2
        kv = self.local_decoder.latent_keys_values(latents)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        hidden = self.local_decoder(
            self.decoder_rows(ids, states),
            CausalAttention(config.decoder, ids.shape[1], ids.device),
            LatentRows(kv[rows, newest]),
        )
        return BltOutput(self.lm_head(hidden).float(), entropy, starts, states, latents)

    def latents(self, states: Tensor, starts: Tensor) -> Tensor:
        """Latents [B, P, dg] of every patch, the open one included, from byte states [B, T, d]."""
        batch, length, _ = states.shape
        ids = starts[:, :length].long().cumsum(-1) - 1
        count = int(ids.max()) + 1
        lengths = torch.zeros(batch, count, dtype=torch.long, device=states.device)
        lengths.scatter_add_(1, ids, torch.ones_like(ids))
        offsets = torch.arange(int(lengths.max()), device=states.device)
        first = lengths.cumsum(-1) - lengths
        index = (first[..., None] + offsets).clamp_max(length - 1)
        inside = offsets < lengths[..., None]
        inside[..., 0] = True  # padded patches read one byte; nothing reads them
        padded = states[torch.arange(batch, device=states.device)[:, None, None], index]
        vectors = self.local_encoder.pool(padded.flatten(0, 1), inside.flatten(0, 1)).view(batch, count, -1)
        return self.global_transformer(vectors, CausalAttention(self.config.global_, count, states.device))


class CausalAttention:
    """Whole-sequence self-attention under a stack's window, for q [B, T, H, D]."""

    def __init__(self, config: StackConfig, length: int, device: torch.device) -> None:
        positions = torch.arange(length, device=device)
        behind = positions[:, None] - positions
        self._mask = (behind >= 0) if config.window is None else (behind >= 0) & (behind < config.window)
        self._turns = Rope(config.head_dim, config.rope_theta, device).at(positions, length)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self._mask.expand(q.shape[0], -1, -1)
        return masked_attention(rotate(q, self._turns), rotate(k, self._turns), v, mask)


class LatentRows:
    """The decoder's cross-attention, each row over the one latent it reads: kv [..., C, 2, k, Hkv, D]."""

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        k, v = self._kv.select(-5, layer).unbind(-4)
        return latent_attention(q, k, v)


def init_weights(model: nn.Module, seed: int = 0) -> None:
    """Truncated normal, standard deviation 1/sqrt(fan in), gains 1: the published initialization."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = module.weight.shape[1] ** -0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def _hash_offsets(config: BltConfig) -> Tensor:
    """Where every table begins among the stacked ones: int64 [tables]."""
    # Counted in Python: for sums of tensors without memory torch imports its compiler (see `Table`).
    return torch.tensor([table * config.hash_group_vocab for table in range(config.num_hash_tables)])


def _hash_powers(sizes: tuple[int, ...], functions: int) -> Tensor:
    """Multipliers int64 [tables, window] of a window's ids, oldest first; zero for ids before the n-gram."""
    window = max(sizes, default=1)
    table = torch.zeros(functions * len(sizes), window, dtype=torch.int64)
    for f in range(functions):
        prime = HASH_PRIMES[f % len(HASH_PRIMES)]
        for index, size in enumerate(sizes):
            powers = [_wrap(prime**j) for j in range(size)]
            table[f * len(sizes) + index, window - size :] = torch.tensor(powers, dtype=torch.int64)
    return table


def _wrap(value: int) -> int:
    """A Python integer as two's complement int64."""
    return (value + 2**63) % 2**64 - 2**63
