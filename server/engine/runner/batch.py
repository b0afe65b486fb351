"""The rows of a decoder pass: from plans to the integer columns that the device gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fastblt.server.decoding.method import Plan
from fastblt.server.engine.device.staging import Part
from fastblt.server.engine.sequence import Planned, Sequence

#: A position that no request reaches.
_NEVER = 2**31 - 1


@dataclass
class Batch:
    """Rows of one decoder pass, laid out on the host: first each request's causal rows, then its block rows.

    `part` int32 [6, padded] is what the device gets (see `build_batch`); `owners`, `positions` and `block` are views
    of its rows without padding, [total]. `sampled_rows` are the rows of the pass from which causal bytes are sampled;
    the samples of request i are `sample_counts[i]` of them from `first_samples[i]` on. `ahead` lists the requests
    (indexes into the batch) whose new bytes go through the entropy model within the same pass. `in_block` bool [total]
    marks block rows, or is None where there are none; `block` has their ids, -1 elsewhere. `spans` are (first row,
    count) of every request.
    """

    part: Part
    owners: np.ndarray
    positions: np.ndarray
    block: np.ndarray
    sampled_rows: np.ndarray
    first_samples: list[int]
    sample_counts: list[int]
    ahead: list[int]
    in_block: np.ndarray | None
    spans: list[tuple[int, int]]
    total: int
    padded: int

    def needed_rows(self, scored: list[int]) -> np.ndarray | None:
        """Rows whose decoder states somebody reads: sampled, in a block, or `scored`. bool [padded].

        None when at least half of the rows are read: then compute all.
        """
        read = np.zeros(self.padded, dtype=bool)
        if self.in_block is not None:
            read[: self.total] = self.in_block
        read[self.sampled_rows] = read[scored] = True
        return read if 2 * np.count_nonzero(read) < self.total else None


def bucket(count: int) -> int:
    """The number of rows that `count` rows are padded to where a shape costs a compilation or a captured graph."""
    if count <= 8:
        return 8
    step = max(8, 1 << (count - 1).bit_length() - 3)
    return -(-count // step) * step


def latent_slots(sequence: Sequence, plan: Plan) -> tuple[int, list[tuple[int, int]]]:
    """Latent slots a plan cross-attends to: one for its block or draft rows (and the rows that may follow in the same
    call), and (end position, slot) runs for its causal rows, in order."""
    patches, end = sequence.patches, plan.end
    newest = latent = patches[-1].slot if patches else 0
    if plan.provisional and sequence.provisional is not None:
        newest = sequence.provisional.slot
        if plan.draft:
            latent = newest
    if not plan.causal:
        return newest, []
    if plan.draft or plan.causal == 1 or len(patches) < 2:
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


def build_batch(planned: list[Planned], allocate: Callable[[int, int], Part]) -> Batch:
    """Lay out the rows of all plans in the order of the batch.

    The columns are int32 [6, rows]: state index of the owner, position, `high` and `first` (a row attends to
    [max(0, first - window + 1), high)), latent slot, and id of a block row or -1. `allocate(columns, rows)` gives
    the buffer, padded. Counts a decoder pass in each request's ledger.
    """
    # For every run of adjacent rows that read the same latent: state index, position that the pass's row 0 would have
    # in this run, latent, upper bound of `first`, lower bound of `high`, position from which on rows are sampled.
    runs: list[tuple[int, ...]] = []
    sizes: list[int] = []
    spans: list[tuple[int, int]] = []
    block_ids: list[int] = []
    ahead: list[int] = []
    total = samples = 0
    firsts: list[int] = []
    sample_counts: list[int] = []
    for at, (sequence, plan) in enumerate(planned):
        state_index, shift, end = sequence.state_index, plan.start - total, plan.end
        newest, reads = latent_slots(sequence, plan)
        done = plan.start
        for until, latent in reads:
            runs.append((state_index, shift, latent, _NEVER, 0, end - plan.samples))
            sizes.append(until - done)
            done = until
        if plan.block_ids:
            block_ids += plan.block_ids
            runs.append((state_index, shift, newest, end, plan.start + plan.rows, _NEVER))
            sizes.append(len(plan.block_ids))
        spans.append((total, plan.rows))
        firsts.append(samples)
        sample_counts.append(plan.samples)
        if plan.scan_to > sequence.scanned and (plan.unmask is None or plan.unmask.fills):
            ahead.append(at)
        sequence.ledger.decoder += 1
        total += plan.rows
        samples += plan.samples
    part = allocate(6, total)
    columns = part.host
    owner, position, high, first, latents, block = columns[:, :total]
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
    # A padding row attends to the first position of the null request.
    columns[2, total:] = 1
    sampled_rows = np.flatnonzero(position >= selected)
    return Batch(
        part,
        owner,
        position,
        block,
        sampled_rows,
        firsts,
        sample_counts,
        ahead,
        in_block,
        spans,
        total,
        columns.shape[1],
    )


def with_padding(spans: list[tuple[int, int]], total: int, padded: int) -> list[tuple[int, int]]:
    """The spans of the requests, and one for each padding row."""
    return spans + [(i, 1) for i in range(total, padded)] if padded > total else spans


def split(flat: np.ndarray, spans: list[tuple[int, int]]) -> list[list[float]]:
    """The values of each span, as lists."""
    values: list[float] = flat.tolist()
    return [values[first : first + count] for first, count in spans]
