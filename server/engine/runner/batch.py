"""Where the rows of a pass stand: from plans to staged integers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.runner.sampled import Batch
from fastblt.server.engine.sequence import Sequence

#: A position that no request reaches.
_NEVER = 2**31 - 1


def bucket(count: int) -> int:
    """The number of rows that `count` rows are padded to where a shape costs a compilation or a captured graph."""
    if count <= 8:
        return 8
    step = max(8, 1 << (count - 1).bit_length() - 3)
    return -(-count // step) * step


def read_by(sequence: Sequence, plan: Plan) -> tuple[int, list[tuple[int, int]]]:
    """The slot of the latent that a plan's block, its draft, or what goes on behind its rows reads; and those of its
    causal rows, each with the position before which it is read."""
    patches, end = sequence.patches, plan.end
    newest = latent = patches[-1].slot if patches else 0
    if plan.provisional and sequence.provisional is not None:
        newest = sequence.provisional.slot
        if plan.draft:
            latent = newest
    if not plan.causal:
        return newest, []
    if plan.causal == 1 or len(patches) < 2:
        return newest, [(end, latent)]
    # Each row reads the newest patch that is closed at its position.
    runs: list[tuple[int, int]] = []
    done, latent = plan.start, patches[0].slot
    for patch in islice(patches, 1, None):
        if patch.end >= end:
            break
        if done < patch.end:
            done = patch.end
            runs.append((done, latent))
        latent = patch.slot
    runs.append((end, latent))
    return newest, runs


def lay_out(sequences: list[Sequence], allocate: Callable[[str, int, int], np.ndarray]) -> Batch:
    """The rows of the sequences' plans, into columns: owner, position, first, high, latent, and block id or -1."""
    # Of every run of adjacent rows that read the same latent: state row, position of the pass's row 0 if it belonged to
    # the run, latent, what `first` is at most and `high` at least, and the position from which on rows are picked.
    runs: list[tuple[int, ...]] = []
    sizes: list[int] = []
    spans: list[tuple[int, int]] = []
    block_ids: list[int] = []
    ahead: list[int] = []
    total = picks = 0
    firsts: list[int] = []
    selects: list[int] = []
    for at, sequence in enumerate(sequences):
        plan = sequence.plan
        assert plan is not None
        row, shift, end = sequence.row, plan.start - total, plan.end
        newest, reads = read_by(sequence, plan)
        done = plan.start
        for until, latent in reads:
            runs.append((row, shift, latent, _NEVER, 0, end - plan.select))
            sizes.append(until - done)
            done = until
        if plan.block_ids:
            block_ids += plan.block_ids
            runs.append((row, shift, newest, end, plan.start + plan.rows, _NEVER))
            sizes.append(len(plan.block_ids))
        spans.append((total, plan.rows))
        firsts.append(picks)
        selects.append(plan.select)
        if plan.scan_to > sequence.scanned and (plan.unmask is None or plan.unmask.fills):
            ahead.append(at)
        sequence.ledger.decoder += 1
        total += plan.rows
        picks += plan.select
    columns = allocate("decode", 6, total)
    owner, position, first, high, latents, block = columns[:, :total]
    numbers = np.array(runs, dtype=np.int32)
    owner[:], shifts, latents[:], first[:], high[:], selected = (
        numbers if total == len(runs) else numbers.repeat(sizes, axis=0)
    ).T
    np.add(shifts, np.arange(total, dtype=np.int32), out=position)
    in_block = None
    columns[5] = -1
    if block_ids:
        in_block = first != _NEVER
        block[in_block] = block_ids
    np.minimum(first, position, out=first)
    np.maximum(high, position + 1, out=high)
    # Padding sees the null row's first position.
    columns[3, total:] = 1
    picked = np.flatnonzero(position >= selected)
    return Batch(
        columns, owner, position, block, picked, firsts, selects, ahead, in_block, spans, total, columns.shape[1]
    )


def with_padding(spans: list[tuple[int, int]], total: int, padded: int) -> list[tuple[int, int]]:
    """The spans, and those of the rows that pad them, one by one."""
    return spans + [(i, 1) for i in range(total, padded)] if padded > total else spans


def split(flat: np.ndarray, spans: list[tuple[int, int]]) -> list[list[float]]:
    """The values of every span."""
    values: list[float] = flat.tolist()
    return [values[first : first + count] for first, count in spans]
