"""What a pass of each module costs on this machine, by its rows: measured, not modeled."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.attention import TILE
from fastblt.kernels.cpu.multi_step import COLUMNS, LIMITS, OPENED, SCANS, STARTS
from fastblt.models.patching import PatchRule
from fastblt.server.engine.device.forward import ModuleForward, Patches, Rows

#: Called before an upstream pass, with its rows: int32 [3, rows], owners, positions and highs; and their spans.
Announce = Callable[[np.ndarray, list[tuple[int, int]]], None]

#: Modules, as the runner names their passes.
MODULES = ("patcher", "encoder", "global", "decoder")
#: Kinds of fused steps: of drafts, and of bytes that stay.
DRAFT, STEP = "draft", "step"


def filter_of(block: int) -> str:
    """The kind of an inner round of BLT-DSV, a block of so many bytes and its filter."""
    return f"filter {block}"


#: Bytes of the patches that a measured upstream pass pools.
_PATCH = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a pass by its rows: straight lines between the measured points, and on beyond the last."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: float) -> float:
        if rows <= 0:
            return 0.0
        if rows <= self.rows[0] or len(self.rows) == 1:
            return self.seconds[0] * max(1.0, rows / self.rows[0])
        at = min(bisect_right(self.rows, rows), len(self.rows) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        share = (rows - low) / (high - low)
        return self.seconds[at - 1] + share * (self.seconds[at] - self.seconds[at - 1])


Costs = dict[str, CostCurve]


def measure(
    forward: ModuleForward,
    context: int,
    patches: int,
    counts: Sequence[int],
    *,
    announce: Announce | None = None,
    repeats: int = 3,
    limit: float = 0.1,
) -> Costs:
    """The cost curve of every module at the row counts `counts` (ascending, each at least once).

    The passes are those of `make_calls`; on a GPU each is run once before, since a first one compiles. The fastest of
    `repeats` counts. Modules take turns, as in a beat, so that each finds in the processor's caches what
    the others left; and so do row counts, so that no point of a curve is of another moment than the rest. A module is
    measured no further once a pass took `limit` seconds.
    """
    calls = [make_calls(forward, count, context, patches, announce) for count in counts]
    seconds: dict[str, list[float]] = {module: [] for module in MODULES}
    for turn in range(repeats):
        for at, own in enumerate(calls):
            for module, known in seconds.items():
                if at < len(known):
                    known[at] = min(known[at], _seconds(own[module], forward.device))
                elif not turn and (not known or known[-1] <= limit):
                    if forward.device.type != "cpu":
                        _seconds(own[module], forward.device)
                    known.append(_seconds(own[module], forward.device))
    return {module: _curve(counts, curve) for module, curve in seconds.items()}


def _curve(counts: Sequence[int], seconds: list[float]) -> CostCurve:
    """A curve through the seconds of the first row counts."""
    # A pass of more rows that came out faster was noise in the smaller one.
    for at in range(len(seconds) - 2, -1, -1):
        seconds[at] = min(seconds[at], seconds[at + 1])
    return CostCurve(tuple(counts[: len(seconds)]), tuple(seconds))


def measure_steps(
    run: Callable[[np.ndarray, PatchRule], object], context: int, counts: Sequence[int], length: int = 8
) -> Costs:
    """Seconds of one fused step by the number of requests, for drafts and for bytes that stay.

    `run` makes `length` steps from the columns of `kernels.cpu.multi_step`. All requests are the null request, at
    position `context`.
    """
    calls: dict[str, list[Callable[[], object]]] = {DRAFT: [], STEP: []}
    rule = PatchRule(math.inf)
    for name, opened in ((DRAFT, -1), (STEP, 0)):
        for count in counts:
            columns = np.zeros((len(COLUMNS), count), dtype=np.int32)
            columns[STARTS], columns[OPENED], columns[LIMITS] = context, opened, length
            if name == STEP:
                columns[SCANS] = length
            calls[name].append(partial(run, columns, rule))
    turns = [{name: [_seconds(call, _CPU) / length for call in own] for name, own in calls.items()} for _ in range(3)]
    return {
        name: _curve(counts, [min(point) for point in zip(*(turn[name] for turn in turns), strict=True)])
        for name in calls
    }


@torch.inference_mode()
def measure_filters(
    run: Callable[[int, int, int], int],
    context: int,
    counts: Sequence[int],
    blocks: Sequence[int],
    behind: Callable[[int], float],
) -> Costs:
    """Seconds of one inner round of filtered drafts by the number of requests, for every block size in `blocks`.

    `run(count, context, block)` makes a draft for each of `count` null requests at position `context`, and returns how
    many inner rounds that took; 0 where the model, asked for nothing in particular, gave no finite number. Its last
    passes, which take `behind(count)` seconds, are of no round.
    """
    found: Costs = {}
    for block in blocks:
        points = [math.inf] * len(counts)
        for _ in range(2):
            for at, count in enumerate(counts):
                began = time.perf_counter()
                if rounds := run(count, context, block):
                    taken = time.perf_counter() - began
                    points[at] = min(points[at], max(taken - behind(count), taken / 2) / rounds)
        if all(map(math.isfinite, points)):
            found[filter_of(block)] = _curve(counts, points)
    return found


@torch.inference_mode()
def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_calls(
    forward: ModuleForward,
    count: int,
    context: int,
    patches: int,
    announce: Announce | None = None,
    owners: Sequence[int] = (),
) -> dict[str, Callable[[], object]]:
    """A pass of every module over `count` single rows, at position `context` and patch `patches`.

    They are rows of the null request, and what they write goes to null pages, which nothing reads; or of the requests
    with the state indexes `owners`, one row each. `announce` is called before upstream passes.
    """

    def column(value: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=forward.device)

    def single(position: int) -> Rows:
        positions = column(position)
        return Rows(own, positions, positions, column(position + 1), [(at, 1) for at in range(count)])

    null = column(0)
    own = torch.tensor(owners, dtype=torch.int32, device=forward.device) if owners else null
    rows = single(context)
    closed = Patches(single(patches), null, column(_PATCH - 1), null, TILE if forward.tiled else _PATCH)

    def upstream() -> None:
        if announce is not None:
            where = np.zeros((3, count), np.int32)
            where[1], where[2] = patches, patches + 1
            announce(where, rows.spans)
        forward.upstream(closed)

    return {
        "patcher": lambda: forward.entropies(rows),
        "encoder": lambda: forward.encode(rows),
        "global": upstream,
        "decoder": lambda: forward.decode(rows, null, None),
    }
