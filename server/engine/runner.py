"""From plans to staged integers, and from fetched results to outcomes (design §3).

The runner knows rows, patches and latents of sequences; it knows no methods, no HTTP and no scheduling, and leaves
tensors to `passes`. Every public call takes sequences in batch order. Rows are laid out with array operations over the
whole batch; what loops over requests takes a few integers from each.

Rows are padded where shapes must be few (`bucket`) and, in deterministic mode, to whole groups of 8: with at least 8
rows a linear map's result for one row does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice

import numpy as np
import torch

from kernels.attention import TILE
from kernels.backend import use_triton
from models.blt import Blt
from server.engine.caches import Caches
from server.engine.choosing import Batch, Chooser, Result
from server.engine.passes import Passes, Patches, Rows
from server.engine.sequence import Sequence
from server.engine.staging import Fetch, Staging
from server.request import Ledger
from server.settings import EngineSettings


def bucket(count: int) -> int:
    """The number of rows that `count` rows are padded to where a shape costs a compilation or a captured graph."""
    if count <= 8:
        return 8
    step = max(8, 1 << (count - 1).bit_length() - 3)
    return -(-count // step) * step


class Runner:
    def __init__(self, model: Blt, caches: Caches, settings: EngineSettings) -> None:
        self._caches = caches
        self._deterministic = settings.deterministic
        device = next(model.parameters()).device
        self._static = use_triton(device)
        state_rows = settings.max_running + 1
        self._passes = Passes(model, caches, state_rows, device, settings.deterministic)
        self._staging = {name: Staging(device) for name in ("scan", "encode", "upstream", "decode", "picks", "tail")}
        self._fetch = Fetch()
        self._chooser = Chooser(state_rows, self._passes, self._columns, self._staging["picks"], device)
        self.ledger = Ledger()

    @property
    def copies(self) -> int:
        """Copies from the device to the host so far."""
        return self._fetch.copies

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence that was given a state row."""
        self._passes.write_prompt(sequence.row, sequence.ids)
        self._chooser.admit(sequence)

    def commit(self, sequence: Sequence, ids: list[int]) -> None:
        """Count fixed ids for penalties."""
        self._chooser.commit(sequence, ids)

    @torch.inference_mode()
    def scan(self, sequences: list[Sequence], until: list[int]) -> list[list[float]]:
        """Entropy model over rows [scanned, until): the entropies in nats, a list a sequence."""
        rows = self._rows("scan", sequences, [s.scanned for s in sequences], until)
        (flat,) = self._fetch(self._passes.entropies(rows))
        self.ledger.patcher += 1
        for sequence in sequences:
            sequence.ledger.patcher += 1
        return _split(flat, rows.spans[: len(sequences)])

    @torch.inference_mode()
    def encode(self, sequences: list[Sequence], until: list[int]) -> None:
        """Encoder over rows [encoded, until); the states go to their store."""
        self._passes.encode(self._rows("encode", sequences, [s.encoded for s in sequences], until))
        self.ledger.encoder += 1
        for sequence, end in zip(sequences, until, strict=True):
            sequence.ledger.encoder += 1
            sequence.encoded = end

    @torch.inference_mode()
    def upstream(self, sequences: list[Sequence]) -> None:
        """Pooling and global transformer over every pending patch; latents go to fresh slots of their store."""
        numbers: list[tuple[int, int, int, int, int]] = []
        spans: list[tuple[int, int]] = []
        take = self._caches.latent_pool.take
        for sequence in sequences:
            row, waiting = sequence.row, sequence.pending_patches()
            spans.append((len(numbers), len(waiting)))
            for patch in waiting:
                patch.slot = take()
                numbers.append((row, patch.index, patch.start, patch.end, patch.slot))
            sequence.ledger.global_ += 1
        total = len(numbers)
        columns = self._columns("upstream", 6, total)
        columns[:5, :total] = np.array(numbers, dtype=np.int32).T
        owners, index, starts, ends, latents, highs = columns
        np.add(index, 1, out=highs)
        longest = int((ends - starts).max()) + 1
        if self._deterministic:
            longest = -(-longest // TILE) * TILE
        elif self._static:
            longest = bucket(longest)
        owners, index, starts, ends, latents, highs = self._staging["upstream"].send().unbind()
        rows = Rows(owners, index, index, highs, _with_padding(spans, total, columns.shape[1]))
        self._passes.upstream(Patches(rows, starts, ends, latents, longest))
        self.ledger.global_ += 1

    @torch.inference_mode()
    def decode(self, sequences: list[Sequence]) -> list[Result]:
        """One decoder pass over the plans of ready sequences, and the choice of their bytes.

        At its tail the entropy model runs over those of the new bytes that the next plans are sure to need.
        """
        batch = _lay_out(sequences, self._columns)
        owners, positions, firsts, highs, latents, block = self._staging["decode"].send().unbind()
        rows = Rows(owners, positions, firsts, highs, _with_padding(batch.spans, batch.total, len(owners)))
        states = self._passes.decode(rows, latents, block if batch.in_block is not None else None)
        self.ledger.decoder += 1
        for sequence in sequences:
            sequence.ledger.decoder += 1
        choice = self._chooser.choose(sequences, batch, states)
        ahead = [s for s in sequences if s.plan is not None and s.plan.scan_to > s.scanned]
        if not ahead:
            return choice.results(self._fetch(*choice.tensors)) if choice.tensors else choice.results([])
        tail = self._rows("tail", ahead, [s.scanned for s in ahead], [s.plan.scan_to for s in ahead if s.plan])
        *chosen, flat = self._fetch(*choice.tensors, self._passes.entropies(tail))
        self.ledger.patcher += 1
        results = choice.results(chosen)
        values = iter(_split(flat, tail.spans[: len(ahead)]))
        for sequence, result in zip(sequences, results, strict=True):
            if sequence.plan is not None and sequence.plan.scan_to > sequence.scanned:
                result.entropies = next(values)
        return results

    # Rows

    def _rows(self, kind: str, sequences: list[Sequence], begins: list[int], ends: list[int]) -> Rows:
        """Causal rows [begin, end) of every sequence, one after another."""
        starts = np.array(begins, dtype=np.int32)
        counts = np.array(ends, dtype=np.int32) - starts
        owners = np.array([sequence.row for sequence in sequences], dtype=np.int32)
        after = counts.cumsum()
        firsts = after - counts
        total = int(after[-1])
        columns = self._columns(kind, 3, total)
        owner, position = columns[:2, :total]
        if total == len(counts):
            owner[:], position[:] = owners, starts
        else:
            owner[:] = owners.repeat(counts)
            np.add((starts - firsts).repeat(counts), np.arange(total, dtype=np.int32), out=position, casting="unsafe")
        np.add(columns[1], 1, out=columns[2])
        spans = list(zip(firsts.tolist(), counts.tolist(), strict=True))
        owner_, position_, high_ = self._staging[kind].send().unbind()
        return Rows(owner_, position_, position_, high_, _with_padding(spans, total, columns.shape[1]))

    def _columns(self, kind: str, count: int, size: int) -> np.ndarray:
        """Staged int32 columns [count, size and padding]; what pads them names the null row, page and latent."""
        padded = size
        if self._static:
            padded = bucket(size)
        elif self._deterministic:
            padded = max(8, -(-size // 8) * 8)
        columns = self._staging[kind].columns(count, padded)
        columns[:, size:] = 0
        return columns


def _lay_out(sequences: list[Sequence], allocate: Callable[[str, int, int], np.ndarray]) -> Batch:
    """The rows of the sequences' plans, into columns: owner, position, first, high, latent, and block id or -1."""
    shapes: list[tuple[int, ...]] = []
    own: list[int] = []
    for at, sequence in enumerate(sequences):
        plan, patches = sequence.plan, sequence.patches
        assert plan is not None
        newest = latent = patches[-1].slot if patches else 0
        if plan.provisional and sequence.provisional is not None:
            newest = sequence.provisional.slot
            if plan.draft:
                latent = newest
        if plan.causal > 1 and len(patches) > 1:
            own.append(at)
            latent = patches[0].slot
        shapes.append((sequence.row, plan.start, plan.causal, len(plan.block_ids), plan.select, latent, newest))
    owners, starts, causal, blocks, selects, latents, newest_ = np.array(shapes, dtype=np.int32).T
    counts = causal + blocks
    after = counts.cumsum()
    firsts = after - counts
    total = int(after[-1])
    index = np.arange(total, dtype=np.int32)
    request = np.arange(len(sequences)).repeat(counts)
    inside = index - firsts[request]
    columns = allocate("decode", 6, total)
    # Padding sees the null row's first position, and is no block.
    columns[3, total:], columns[5, total:] = 1, -1
    owner, position, first, high, latent_, block = columns[:, :total]
    owner[:] = owners[request]
    np.add(starts[request], inside, out=position, casting="unsafe")
    in_block = None
    picked = inside >= (causal - selects)[request]
    if blocks.any():
        edge = causal[request]
        in_block = inside >= edge
        begin = starts[request] + edge
        first[:] = np.where(in_block, begin, position)
        high[:] = np.where(in_block, begin + blocks[request], position + 1)
        latent_[:] = np.where(in_block, newest_[request], latents[request])
        block[:] = -1
        block[in_block] = list(chain.from_iterable(s.plan.block_ids for s in sequences if s.plan is not None))
        picked &= ~in_block
    else:
        first[:] = position
        np.add(position, 1, out=high)
        latent_[:] = latents[request]
    spans = list(zip(firsts.tolist(), counts.tolist(), strict=True))
    for at in own:
        _own_latents(sequences[at], latent_[spans[at][0] :])
    return Batch(owner, position, block, np.flatnonzero(picked), selects, in_block, blocks, spans, total)


def _own_latents(sequence: Sequence, latents: np.ndarray) -> None:
    """Causal rows read the newest patch closed at their position: `latents` begins at the sequence's first row."""
    plan = sequence.plan
    assert plan is not None
    for patch in islice(sequence.patches, 1, None):
        if patch.end < plan.end:
            latents[max(patch.end - plan.start, 0) : plan.causal] = patch.slot


def _with_padding(spans: list[tuple[int, int]], total: int, padded: int) -> list[tuple[int, int]]:
    return spans + [(i, 1) for i in range(total, padded)] if padded > total else spans


def _split(flat: np.ndarray, spans: list[tuple[int, int]]) -> list[list[float]]:
    values: list[float] = flat.tolist()
    return [values[first : first + count] for first, count in spans]
