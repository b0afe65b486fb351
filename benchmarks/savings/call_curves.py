"""What passes take inside the engine's C calls: by the kind of pass and by module, seconds of a pass by its rows.

A call of C makes several passes, and each finds in the processor's caches what the one before it left, and no Python
between them. So they take less than the same passes one by one. Every call is measured behind a pass of the global
transformer and one of the entropy model, as in a beat: its first pass finds little in the caches.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastblt.benchmarks.savings.passes import Recorder
from fastblt.kernels.cpu.decoder_steps import Plans
from fastblt.kernels.cpu.multi_step import COLUMNS, LIMITS, OPENED, OWNERS, SCANS, STARTS
from fastblt.kernels.unmasking import ONE_STEP
from fastblt.models.patching import PatchRule
from fastblt.models.vocabulary import MASK_ID
from fastblt.server.engine.device.cost import DRAFT, STEP
from fastblt.server.engine.engine import Engine
from fastblt.server.request import MAX_DRAFT_LENGTH

#: By module, numbers of rows and seconds of a pass of as many.
Curves = dict[str, tuple[tuple[int, ...], tuple[float, ...]]]
#: Positions behind the context that measured calls write to, at most.
BEYOND = 2 * MAX_DRAFT_LENGTH + 4

#: Bytes of a call of single rows: up to the end of a patch, and a draft.
_LENGTHS = {STEP: 5, DRAFT: 16}
#: Rows of a request in a verification.
_VERIFIED = (2, 3, 5, 9, 17, 33)
#: A point is the median of so many calls.
_TURNS = 7


def measure_inside(
    engine: Engine, context: int, owners: Sequence[int], before: Mapping[str, Callable[[], Any]]
) -> dict[str, Curves]:
    """The curves of each kind of pass (`passes.Pass`), for up to as many requests as `owners`, at position `context`.
    `before` has calls by module, of which those that come before a call in a beat are made. Empty where the engine has
    no such calls."""
    if engine._runner.fused_steps is None:
        return {}
    recorder = Recorder(engine)
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for call in _calls(engine, context, owners):
        for _ in range(_TURNS):
            before["upstream"]()
            before["entropies"]()
            with recorder.on():
                call()
            own: dict[tuple[str, str, int], list[float]] = defaultdict(list)
            for done in recorder.take():
                own[done.inside, done.module, done.rows].append(done.seconds)
            for (kind, module, rows), seconds in own.items():
                found[kind, module][rows].append(statistics.mean(seconds))
    curves: dict[str, Curves] = defaultdict(dict)
    for (kind, module), points in found.items():
        counts = sorted(points)
        curves[kind][module] = tuple(counts), tuple(statistics.median(points[count]) for count in counts)
    return dict(curves)


def _calls(engine: Engine, context: int, owners: Sequence[int]) -> Iterator[Callable[[], Any]]:
    """Calls of every kind, by up to as many requests as there are."""
    forward, fused = engine._runner._forward, engine._runner.fused_steps
    assert fused is not None
    all_of_them = len(owners)
    counts = sorted({count for count in (1, 2, 4, 8, 16, 32) if count < all_of_them} | {all_of_them})
    blocks = [size for size in engine._runner._block_sizes if 1 < size <= MAX_DRAFT_LENGTH // 2]

    def plans(count: int, own: tuple[int, ...], causal: int, block: int) -> Callable[[], Any]:
        reads = [(context + causal, 0)] * (count if causal else 0)
        rows = [(owner, *own) for owner in owners[:count]]
        asked = Plans(rows, [0.0] * count, reads, [MASK_ID] * (block * count))
        # Looked up as it is called: the recorder takes its place.
        return lambda: forward.decode_steps(fused._decoder_steps, asked, sampled=False, truncated=False)

    for count in counts:
        for kind, length in _LENGTHS.items():
            columns = np.zeros((len(COLUMNS), count), dtype=np.int32)
            columns[OWNERS], columns[STARTS], columns[LIMITS] = owners[:count], context, length
            columns[OPENED], columns[SCANS] = (0, length) if kind == STEP else (-1, 0)
            yield partial(fused.time, columns, PatchRule(math.inf))
        # As in `decoder_steps.COLUMNS`, from `starts` on. Rows that verify a draft:
        for each in _VERIFIED:
            end = context + each
            yield plans(count, (context, each, each, 0, 0, 1, ONE_STEP, 0, 0, end, end, 0, 0, 0, 0), each, 0)
        # A row, a block behind it, and what the block made through encoder and entropy model:
        for size in blocks:
            end = context + size + 1
            own = (context, 1, 1, size, 0, 1, ONE_STEP, 0, 1, context, context, end, 0, 0, 0)
            yield plans(count, own, 1, size)
        # And a filtered draft:
        for size in blocks:
            left = MAX_DRAFT_LENGTH + 2
            draft = (0, 0, 0, 0, 0, ONE_STEP, 0, left, context, context, 0, MAX_DRAFT_LENGTH, left, size)
            yield plans(count, (context, *draft), 0, 0)
