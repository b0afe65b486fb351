"""From plans to tensors: runs the modules over ragged rows of many requests (design §3).

The runner knows rows, pages and latents; it knows no methods, no HTTP and no scheduling. Every public call takes
sequences in batch order and pads, in deterministic mode, to whole groups of 8 rows: with at least 8 rows a linear map's
result for one row does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from kernels.attention import TILE
from kernels.latent_attention import stored_latent_attention
from kernels.paged_attention import RaggedRows, paged_attention
from models.blt import Blt
from models.config import StackConfig
from models.layers import Rope
from models.patching import entropies
from models.vocabulary import MASK_ID
from server.decoding.method import Outcome, Plan
from server.engine.caches import CacheGroup, Caches
from server.engine.choosing import Chooser, Result
from server.engine.sequence import Patch, Sequence
from server.request import Ledger
from server.settings import EngineSettings


class Runner:
    def __init__(self, model: Blt, caches: Caches, settings: EngineSettings) -> None:
        self._model = model
        self._caches = caches
        self._config = model.config
        self._deterministic = settings.deterministic
        self._device = next(model.parameters()).device
        stacks = {
            "patcher": self._config.patcher,
            "encoder": self._config.encoder,
            "decoder": self._config.decoder,
            "global": self._config.global_,
        }
        self._groups = {
            name: _Group(caches.groups[name], stack, caches.max_length, self._device, settings.deterministic)
            for name, stack in stacks.items()
        }
        # Ids of every running request behind the zeros that its first hash windows read.
        self._pad = model.hash_window - 1
        rows = settings.max_running + 1
        self._tokens = np.zeros((rows, self._pad + caches.max_length + 1), dtype=np.int64)
        self._window = np.arange(model.hash_window)
        self._chooser = Chooser(rows, self._device)
        self.ledger = Ledger()

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence that was given a state row."""
        self.write_ids(sequence, 0, sequence.ids)
        self._chooser.admit(sequence)

    def write_ids(self, sequence: Sequence, position: int, ids: list[int]) -> None:
        """Store known or drafted ids from `position` on."""
        begin = self._pad + position
        if len(ids) == 1:
            self._tokens[sequence.row, begin] = ids[0]
        elif ids:
            self._tokens[sequence.row, begin : begin + len(ids)] = ids

    def commit(self, sequence: Sequence, ids: list[int]) -> None:
        """Count fixed ids for penalties."""
        self._chooser.commit(sequence, ids)

    @torch.inference_mode()
    def scan(self, sequences: list[Sequence], until: list[int]) -> list[list[float]]:
        """Entropy model over rows [scanned, until): the entropies in nats, a list a sequence."""
        rows = self._rows(sequences, [(s.scanned, end - s.scanned) for s, end in zip(sequences, until, strict=True)])
        ids = torch.from_numpy(self._tokens[rows.rows, rows.positions + self._pad]).to(self._device)
        attend = self._groups["patcher"].attend(rows)
        flat = entropies(self._model.patcher(ids, attend)).tolist()
        self.ledger.patcher += 1
        for sequence in sequences:
            sequence.ledger.patcher += 1
        return [flat[first : first + count] for first, count in rows.spans]

    @torch.inference_mode()
    def encode(self, sequences: list[Sequence], until: list[int]) -> None:
        """Encoder over rows [encoded, until); the states go to their store."""
        rows = self._rows(sequences, [(s.encoded, end - s.encoded) for s, end in zip(sequences, until, strict=True)])
        windows = self._tokens[rows.rows[:, None], rows.positions[:, None] + self._window]
        x = self._model.embed(torch.from_numpy(windows).to(self._device))
        states = self._model.local_encoder(x, self._groups["encoder"].attend(rows))
        store = self._caches.groups["states"]
        store.layers[0].index_copy_(0, self._slots(store, rows), states)
        self.ledger.encoder += 1
        for sequence, end in zip(sequences, until, strict=True):
            sequence.ledger.encoder += 1
            sequence.encoded = end

    @torch.inference_mode()
    def upstream(self, sequences: list[Sequence]) -> None:
        """Pooling and global transformer over every pending patch; latents go to fresh slots of their store."""
        work = [(sequence, sequence.pending_patches()) for sequence in sequences]
        patches = [(sequence.row, patch) for sequence, waiting in work for patch in waiting]
        padding = self._padding(len(patches))
        null = Patch(0, 0, 0)
        owners = np.array([row for row, _ in patches] + [0] * padding)
        starts = np.array([p.start for _, p in patches] + [0] * padding)
        ends = np.array([p.end for _, p in patches] + [0] * padding)
        longest = int((ends - starts).max()) + 1
        if self._deterministic:
            longest = -(-longest // TILE) * TILE
        offsets = np.arange(longest)
        positions = np.minimum(starts[:, None] + offsets, ends[:, None])
        store = self._caches.groups["states"]
        slots = torch.from_numpy(store.slots(owners[:, None], positions)).to(self._device)
        inside = torch.from_numpy(offsets <= (ends - starts)[:, None]).to(self._device)
        states = store.layers[0][slots]
        vectors = self._model.local_encoder.pool(states, inside, tiled=self._deterministic)
        rows = self._global_rows(work, padding)
        latents = self._model.global_transformer(vectors, self._groups["global"].attend(rows))
        kv = self._model.local_decoder.latent_keys_values(latents)
        for _, patch in patches:
            patch.slot = self._caches.latent_pool.take()
        targets = torch.tensor([p.slot for _, p in patches] + [null.slot] * padding, device=self._device)
        self._caches.latents.index_copy_(0, targets, kv)
        self.ledger.global_ += 1
        for sequence in sequences:
            sequence.ledger.global_ += 1

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> list[Result]:
        """One decoder pass over the plans of ready sequences, and the choice of their bytes."""
        plans = [sequence.plan for sequence in sequences if sequence.plan is not None]
        rows = self._rows(sequences, [(plan.start, plan.rows) for plan in plans])
        if any(plan.block_ids for plan in plans):
            self._open_blocks(plans, rows)
        x = self._decoder_input(rows)
        slots = torch.from_numpy(self._latent_slots(sequences, rows)).to(self._device)
        read = partial(_read_latents, self._caches.latents, slots)
        hidden = self._model.local_decoder(x, self._groups["decoder"].attend(rows), read)
        self.ledger.decoder += 1
        for sequence in sequences:
            sequence.ledger.decoder += 1
        picks = self._chooser.picks(sequences, rows.spans)
        if picks.count == 0:
            return [Result(Outcome()) for _ in sequences]
        if not np.array_equal(picks.index, np.arange(len(rows.rows))):
            index = np.concatenate((picks.index, np.zeros(self._padding(picks.count), dtype=np.int64)))
            hidden = hidden[torch.from_numpy(index).to(self._device)]
        logits = self._model.lm_head(hidden).float()[: picks.count]
        return self._chooser.select(sequences, picks, logits)

    # Rows

    def _rows(self, sequences: list[Sequence], ranges: list[tuple[int, int]]) -> _Rows:
        """Rows (first position, count) of every sequence, one after another."""
        starts = np.array([start for start, _ in ranges], dtype=np.int32)
        counts = np.array([count for _, count in ranges])
        rows = np.array([sequence.row for sequence in sequences], dtype=np.int32)
        ends = counts.cumsum()
        total = int(ends[-1])
        if total > len(counts):
            rows = rows.repeat(counts)
            starts = (starts + counts - ends).repeat(counts).astype(np.int32) + np.arange(total, dtype=np.int32)
        padding = self._padding(total)
        if padding:
            null = np.zeros(padding, dtype=np.int32)
            rows, starts = np.concatenate((rows, null)), np.concatenate((starts, null))
        spans = list(zip((ends - counts).tolist(), counts.tolist(), strict=True))
        return _Rows(rows, starts, spans, total)

    def _global_rows(self, work: list[tuple[Sequence, list[Patch]]], padding: int) -> _Rows:
        owners: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        for sequence, waiting in work:
            spans.append((len(owners), len(waiting)))
            owners += [sequence.row] * len(waiting)
            positions += [patch.index for patch in waiting]
        total = len(owners)
        return _Rows(
            np.array(owners + [0] * padding, dtype=np.int32),
            np.array(positions + [0] * padding, dtype=np.int32),
            spans,
            total,
        )

    def _padding(self, count: int) -> int:
        return max(8, -(-count // 8) * 8) - count if self._deterministic else 0

    def _slots(self, group: CacheGroup, rows: _Rows) -> Tensor:
        return torch.from_numpy(group.slots(rows.rows, rows.positions)).to(self._device)

    def _open_blocks(self, plans: list[Plan], rows: _Rows) -> None:
        """Give block rows their shared range and their ids."""
        size = len(rows.rows)
        rows.block = np.full(size, -1, dtype=np.int64)
        rows.ranges = np.zeros((size, 2), dtype=np.int32)
        blocks = [
            (first + plan.causal, len(plan.block_ids), plan.end)
            for plan, (first, _) in zip(plans, rows.spans, strict=True)
            if plan.block_ids
        ]
        firsts, counts, starts = np.array(blocks).T
        inside = (firsts - counts.cumsum() + counts).repeat(counts) + np.arange(counts.sum())
        rows.block[inside] = list(chain.from_iterable(plan.block_ids for plan in plans))
        rows.ranges[inside, 0] = starts.repeat(counts)
        rows.ranges[inside, 1] = (starts + counts).repeat(counts)

    def _decoder_input(self, rows: _Rows) -> Tensor:
        decoder = self._model.local_decoder
        if self._config.decoder_input == "encoder":
            store = self._caches.groups["states"]
            x = store.layers[0][self._slots(store, rows)]
            if rows.block is None:
                return x
            inside = rows.block >= 0
            ids = torch.from_numpy(np.where(inside, rows.block, MASK_ID)).to(self._device)
            return torch.where(torch.from_numpy(inside).to(self._device)[:, None], decoder.embed_tokens(ids), x)
        known: np.ndarray = self._tokens[rows.rows, rows.positions + self._pad]
        if rows.block is not None:
            known = np.where(rows.block >= 0, rows.block, known)
        return decoder.embed_tokens(torch.from_numpy(known).to(self._device))

    def _latent_slots(self, sequences: list[Sequence], rows: _Rows) -> np.ndarray:
        """Slot of the latent that every row reads: draft and block rows the newest, clean rows each its own."""
        slots: list[int] = []
        for sequence, (first, _) in zip(sequences, rows.spans, strict=True):
            plan = sequence.plan
            assert plan is not None
            closed = sequence.patches[-1].slot if sequence.patches else 0
            newest = closed
            if plan.provisional and sequence.provisional is not None:
                newest = sequence.provisional.slot
            if plan.draft:
                slots += [newest] * plan.causal
            elif plan.causal == 1:
                slots.append(closed)
            elif plan.causal > 1:
                ends = [patch.end for patch in sequence.patches]
                own = np.searchsorted(ends, rows.positions[first : first + plan.causal], side="right") - 1
                slots += np.array([patch.slot for patch in sequence.patches])[own].tolist()
            slots += [newest] * len(plan.block_ids)
        return np.array(slots + [0] * (len(rows.rows) - len(slots)), dtype=np.int64)


def _read_latents(store: Tensor, slots: Tensor, layer: int, q: Tensor) -> Tensor:
    """The decoder's cross-attention for one pass, every row over the latent at its slot."""
    return stored_latent_attention(q, store, layer, slots)


@dataclass
class _Rows:
    """Rows of a pass, padding last: state rows and positions int32 [N], spans of the sequences, N without padding.

    With blocks: `block` holds the ids of block rows (-1 elsewhere) and `ranges` their block's [start, end).
    """

    rows: np.ndarray
    positions: np.ndarray
    spans: list[tuple[int, int]]
    count: int
    block: np.ndarray | None = None
    ranges: np.ndarray | None = None

    @property
    def padded(self) -> bool:
        return self.count < len(self.rows)

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """State rows and positions, int32 [N], on the host."""
        return torch.from_numpy(self.rows), torch.from_numpy(self.positions)


class _Group:
    """A cache group seen by the layers of its module."""

    def __init__(
        self, cache: CacheGroup, stack: StackConfig, max_length: int, device: torch.device, tiled: bool
    ) -> None:
        self._cache = cache
        self._device = device
        self._tiled = tiled
        self._length = max_length
        self._turns = Rope(stack.head_dim, stack.rope_theta, device).table(max_length)

    def attend(self, rows: _Rows) -> _PagedAttention:
        window = self._cache.window
        highs = rows.positions + 1
        lows = np.zeros_like(highs) if window is None else np.maximum(highs - window, 0)
        if rows.ranges is not None and rows.block is not None:
            inside = rows.block >= 0
            first = np.zeros_like(lows) if window is None else np.maximum(rows.ranges[:, 0] - window + 1, 0)
            lows = np.where(inside, first, lows)
            highs = np.where(inside, rows.ranges[:, 1], highs)
        device = self._device
        owners, positions = rows.tensors
        at = RaggedRows(
            table=self._cache.table_on(device),
            rows=owners.to(device),
            positions=positions.to(device),
            lows=torch.from_numpy(lows).to(device),
            highs=torch.from_numpy(highs).to(device),
            spans=rows.spans + [(i, 1) for i in range(rows.count, len(rows.rows))] if rows.padded else rows.spans,
            length=self._length,
            page_size=self._cache.page_size,
        )
        return _PagedAttention(self._cache.layers, self._turns, at, self._tiled)


class _PagedAttention:
    """The self-attention a module is given for one pass."""

    def __init__(self, layers: list[Tensor], turns: Tensor, at: RaggedRows, tiled: bool) -> None:
        self._layers, self._turns, self._at, self._tiled = layers, turns, at, tiled

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return paged_attention(q, k, v, self._turns, self._layers[layer], self._at, tiled=self._tiled)
