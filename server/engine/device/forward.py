"""The modules' forward passes over paged caches: the device's side of a pass.

Inputs are integer columns that the host has staged; ids, caches and latents are read and written in place. Nothing here
reads a result on the host or loops over requests, and shapes depend on the number of (padded) rows alone, so a GPU can
replay a pass from a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.cpu import native
from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.cpu.decoder_steps import Decoded, DecoderSteps, Plans
from fastblt.kernels.cpu.multi_step import MultiStep, Part, Parts, Steps
from fastblt.kernels.cpu.stack import PackedStack, Sink, Source
from fastblt.kernels.cpu.structs import Places
from fastblt.kernels.cpu.upstream import PatchRows, StoredPatches
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention, has_native, pointers_of
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.types import RaggedRows
from fastblt.models.blt import Blt
from fastblt.models.config import StackConfig
from fastblt.models.fused import LocalModules, is_fused, local_modules
from fastblt.models.layers import Rope
from fastblt.models.patching import PatchRule
from fastblt.models.vocabulary import MASK_ID
from fastblt.server.engine.cache.kv_caches import CacheGroup, KvCaches


@dataclass
class Rows:
    """Rows of a pass, padding last, int32 [N] on the device.

    `owners` are the state indexes of their requests. A row attends to positions [max(0, first - window + 1), high): for
    a causal row `first` is its own position and `high` the next, for a block row `first` is where its block starts.
    `spans` are (first row, count) of each request, and of each padding row.
    """

    owners: Tensor
    positions: Tensor
    firsts: Tensor
    highs: Tensor
    spans: list[tuple[int, int]]


@dataclass
class Patches:
    """Closed patches of an upstream pass, padding last: int32 [P], byte positions [start, end] and latent slots.

    `rows` are their rows of the global transformer. `longest` is a bound of their lengths in bytes. `bytes` are their
    bytes, for a GPU.
    """

    rows: Rows
    starts: Tensor
    ends: Tensor
    latents: Tensor
    longest: int
    bytes: PatchRows | None = None


class ModuleForward:
    """The modules over paged caches. `tokens` int64 [states, ids] has every running request's ids, drafted ones too."""

    def __init__(self, model: Blt, caches: KvCaches, state_rows: int, device: torch.device, tiled: bool) -> None:
        self._model = model
        self._caches = caches
        states = caches.groups["states"]
        self._states = PagedRows(states.layers[0], states.device_table, states.page_size)
        self.tiled = tiled
        config = model.config
        self._encoder_input = config.decoder_input == "encoder"
        stacks = {
            "patcher": config.patcher,
            "encoder": config.encoder,
            "decoder": config.decoder,
            "global": config.global_,
        }
        self._groups = {
            name: GroupAttention(caches.groups[name], stack, caches.max_length, device, tiled)
            for name, stack in stacks.items()
        }
        # The first hash windows read zeros before the ids.
        self._pad = model.hash_window - 1
        self.tokens = torch.zeros(state_rows, self._pad + caches.max_length + 1, dtype=torch.int64, device=device)
        #: `tokens` as kernels take them.
        self.ids = RequestIds(self.tokens, self._pad)

    @property
    def row_invariant(self) -> bool:
        """Whether a row's result never depends on the other rows of its pass: then no padding is needed for that."""
        return self._native and is_fused(self._model)

    @property
    def _native(self) -> bool:
        """Whether C code can read all caches in place."""
        latents = StoredLatents(self._caches.latents, self._caches.latents.new_empty(0, dtype=torch.int32))
        return all(group.native for group in self._groups.values()) and self._states.native and latents.native

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def write_prompt(self, state_index: int, ids: list[int]) -> Callable[[], None]:
        """What stores the known ids of a newly admitted request."""
        known = torch.tensor(ids)

        def write() -> None:
            self.tokens[state_index, self._pad : self._pad + len(known)] = known

        return write

    def entropies(self, rows: Rows) -> Tensor:
        """Entropy model over rows: fp32 [N], nats."""
        return self._model.patcher.stored_entropies(self.ids, self._groups["patcher"].attend(rows))

    def encode(self, rows: Rows) -> Tensor:
        """Encoder over rows: the states [N, d], which are also cached."""
        return self._model.encode_stored(self.ids, self._states, self._groups["encoder"].attend(rows))

    def upstream(self, patches: Patches) -> None:
        """Pooling and global transformer over closed patches; caches the decoder's keys and values of their latents."""
        rows = patches.rows
        stored = StoredPatches(self._states, rows.owners, patches.starts, patches.ends, patches.longest, patches.bytes)
        vectors = self._model.local_encoder.pool_stored(stored, tiled=self.tiled)
        latents = self._model.global_transformer(vectors, self._groups["global"].attend(rows))
        self._model.local_decoder.store_latents(latents, self._caches.latents, patches.latents)

    def decode(self, rows: Rows, latents: Tensor, block: Tensor | None, read: Tensor | None = None) -> Tensor:
        """Decoder states [N, d] of rows that cross-attend to the latent slots int32 [N].

        `block` int32 [N] has the ids of block rows, -1 elsewhere; None: there are none. Where `read` bool [N] is given,
        states of the other rows are undefined.
        """
        stored = StoredLatents(self._caches.latents, latents)
        known = self._states if self._encoder_input else self.ids
        return self._model.local_decoder.stored_states(known, block, self._groups["decoder"].attend(rows), stored, read)

    def multi_step(self, draws: Draws) -> MultiStep | None:
        """The C call for several bytes of each request, drawn by `draws`; None where it cannot run."""
        local = local_modules(self._model)
        if local is None or not self._native or native.library() is None:
            return None
        latents = self._caches.latents
        parts = self._parts(local)
        return MultiStep(parts, local.head, self.ids, latents, draws, encoder_input=self._encoder_input)

    def decoder_steps(self, draws: Draws) -> DecoderSteps | None:
        """The C call for a decoder pass with the choice of bytes, and all steps of blocks; None where it cannot run."""
        local = local_modules(self._model)
        if local is None or not self._native or native.library() is None:
            return None
        parts, latents, begins = self._parts(local), self._caches.latents, self._encoder_input
        return DecoderSteps(parts, local.head, self.ids, latents, draws, mask=MASK_ID, encoder_input=begins)

    def _parts(self, local: LocalModules) -> Parts:
        hashed, states = replace(local.encoder[1], ids=self.ids), Sink(states=self._states)
        stack, source, sink = local.decoder
        begin = Source(states=self._states) if self._encoder_input else replace(source, ids=self.ids)
        return (
            self._part("patcher", local.patcher[0], replace(local.patcher[1], ids=self.ids), local.patcher[2]),
            self._part("encoder", local.encoder[0], hashed, states),
            self._part("decoder", stack, replace(begin, block_table=source.table), sink),
        )

    def _part(self, name: str, stack: PackedStack, source: Source, sink: Sink) -> Part:
        group = self._groups[name]
        return Part(stack, source, sink, group.pointers, group.places)

    def steps(
        self, call: Callable[..., Steps], columns: np.ndarray, rule: PatchRule, *, sampled: bool, truncated: bool
    ) -> Steps:
        """Several bytes of each request, as `fastblt.kernels.cpu.multi_step` says."""
        return call(columns, rule.threshold, rule.max_patch_length, sampled=sampled, truncated=truncated)

    def decode_steps(self, call: Callable[..., Decoded], plans: Plans, *, sampled: bool, truncated: bool) -> Decoded:
        """A pass of the decoder with the choice of bytes, and all steps of blocks: see `kernels.cpu.decoder_steps`."""
        return call(plans, sampled=sampled, truncated=truncated)

    @property
    def has_blocks(self) -> bool:
        """Whether the decoder takes block rows."""
        return hasattr(self._model.local_decoder, "embed_tokens")

    @property
    def encoder_input(self) -> bool:
        """Whether decoder rows begin as encoder states (else as embeddings)."""
        return self._encoder_input

    def raw_logits(self, states: Tensor) -> Tensor:
        """Logits [N, 260] of states [N, d], in their dtype."""
        return self._model.lm_head(states)

    def logits(self, states: Tensor, index: Tensor | None) -> Tensor:
        """Logits fp32 [n, 260] of the states at `index` int32 [n], or of all."""
        return self._model.lm_head(states if index is None else states[index]).float()


class GroupAttention:
    """The self-attention of one module's layers over its cache group."""

    def __init__(
        self, cache: CacheGroup, stack: StackConfig, max_length: int, device: torch.device, tiled: bool
    ) -> None:
        self._cache = cache
        self._tiled = tiled
        self.native = has_native(cache.layers[0])
        self.pointers = pointers_of(cache.layers)
        self._length = max_length
        self._turns = Rope(stack.head_dim, stack.rope_theta, device).table(max_length)

    @property
    def places(self) -> Places:
        """Page table and window, for C code that lays out its rows itself."""
        table, cache = self._cache.device_table, self._cache
        return Places(
            turns=self._turns.data_ptr(),
            table=table.data_ptr(),
            window=cache.window or 0,
            table_stride=table.stride(0),
            page=cache.page_size,
        )

    def attend(self, rows: Rows) -> PagedAttention:
        at = RaggedRows(
            table=self._cache.device_table,
            rows=rows.owners,
            positions=rows.positions,
            firsts=rows.firsts,
            highs=rows.highs,
            spans=rows.spans,
            length=self._length,
            page_size=self._cache.page_size,
            window=self._cache.window,
        )
        return PagedAttention(
            self._cache.layers, self._turns, at, tiled=self._tiled, native=self.native, pointers=self.pointers
        )
