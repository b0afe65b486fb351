"""Records the passes of an engine on a CPU: module, rows and seconds of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from fastblt.benchmarks.harness import replaced
from fastblt.kernels.cpu.decoder_steps import COLUMNS, SINGLE_ROWS, Decoded, DecoderSteps, Plans
from fastblt.kernels.cpu.multi_step import OPENED, MultiStep, Steps
from fastblt.kernels.cpu.structs import Spent
from fastblt.server.engine.device.cost import DRAFT, STEP
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.runner.filtered_draft import FilteredDraft

#: Functions of `ModuleForward` that each run a pass of a module. `logits` is the output head.
MODULES = ("entropies", "encode", "upstream", "decode", "logits")
#: Kinds of passes inside C calls, beside `STEP` and `DRAFT`.
FILTER, CALL = "filter", "call"
#: Of each pass its rows, and its kind where the number of rows does not say it.
Rows = list[tuple[int, str]]


@dataclass(frozen=True)
class Pass:
    """One pass of a module: entropies, encode, upstream, decode, or logits (the head). `inside`: the kind of a pass
    inside a C call, where others left in the processor's caches what it reads: `STEP` and `DRAFT` have a row of each
    request, `FILTER` are a filtered draft's, and `CALL` all others."""

    module: str
    rows: int
    seconds: float
    inside: str = ""


class Recorder:
    """Times every pass of an engine on a CPU, inside `with recorder.on()`.

    Call `clear` when a measurement starts. Calls that make several passes are divided into passes by `take`, and not
    during the measurement, which this would slow down.
    """

    def __init__(self, engine: Engine) -> None:
        self._calls: list[Callable[[], list[Pass]]] = []
        self._device = engine._runner._forward

    def clear(self) -> None:
        """Forget what was timed."""
        self._calls.clear()

    def take(self) -> list[Pass]:
        """The passes since the last `clear` or `take`."""
        passes = [done for call in self._calls for done in call()]
        self.clear()
        return passes

    def on(self) -> AbstractContextManager[None]:
        """A context in which passes are timed."""
        each = [(self._device, module, partial(self._timed, module)) for module in MODULES]
        steps, decoded = (self._device, "steps", self._taken_apart), (self._device, "decode_steps", self._decoded)
        return replaced(*each, steps, decoded)

    def _taken_apart(self, call: Callable[..., Steps]) -> Callable[..., Steps]:
        """Time a call of many steps, to be divided into the passes of each step and module. The time of sampling counts
        as the head's."""

        def timed(step: MultiStep, columns: np.ndarray, *args: Any, **kwargs: Any) -> Steps:
            clock = time.perf_counter()
            result = call(step, columns, *args, **kwargs)
            taken = time.perf_counter() - clock
            self._calls.append(lambda: _passes_of_steps(columns, result, taken, step.encoder_input))
            return result

        return timed

    def _decoded(self, call: Callable[..., Decoded]) -> Callable[..., Decoded]:
        """Time a call of many decoder passes, divided by the rows of each step and by those that were sampled."""

        def timed(step: DecoderSteps, plans: Plans, **kwargs: Any) -> Decoded:
            clock = time.perf_counter()
            result = call(step, plans, **kwargs)
            taken = time.perf_counter() - clock
            # Copied, because the next call overwrites these arrays.
            fixed = result.made.fixed.copy(), result.drafts.fixed.copy()
            self._calls.append(lambda: _passes_of_plans(plans, result, fixed, taken, step.encoder_input))
            return result

        return timed

    def _timed(self, module: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            clock = time.perf_counter()
            result = call(*args)
            taken = time.perf_counter() - clock
            done = Pass(module, _rows_of(module, args), taken)
            self._calls.append(lambda: [done])
            return result

        return timed


def _passes_of_steps(columns: np.ndarray, result: Steps, taken: float, fed: bool) -> list[Pass]:
    """The passes of a call of many steps that took `taken` seconds. `fed`: whether decoder rows need the encoder."""
    stays = columns[OPENED] >= 0
    encoded = result.made - 1 if fed else np.where(stays, result.made - 1, 0)
    each = {"entropies": result.scanned[stays], "encode": encoded, "decode": result.made, "logits": result.made}
    steps = {name: [int((own > at).sum()) for at in range(int(own.max(initial=0)))] for name, own in each.items()}
    told: dict[str, Rows] = {name: [(rows, "") for rows in own] for name, own in steps.items()}
    return _share(result.spent, taken, told, len(stays), STEP if stays.any() else DRAFT)


def _passes_of_plans(
    plans: Plans, result: Decoded, fixed: tuple[np.ndarray, np.ndarray], taken: float, fed: bool
) -> list[Pass]:
    """The passes of a call. `fixed` has the steps in which the bytes of blocks and of drafts were fixed."""
    asked = {name: np.array(plans.column(name)) for name in COLUMNS}
    lines, drafted = np.array(result.lines), np.array(result.drafts.steps)
    behind, encoded = lines >= 0, list[int]()
    inner, inner_encoded = list[int](), list[int]()
    steps_of = np.array(result.made.steps)
    rows, chosen = _of_blocks(asked["causals"], asked["selects"], asked["sizes"], fixed[0], steps_of)
    if behind.any():
        own, singles, filtered = (np.zeros(len(drafted), dtype=np.int32) for _ in range(3))
        accepted = np.array(result.accepted)[behind]
        own[lines[behind]] = np.minimum(asked["follows"][behind], asked["lefts"][behind] - accepted - 2)
        singles[lines[behind]] = asked["rules"][behind] == SINGLE_ROWS
        filtered[lines[behind]] = asked["filtered"][behind]
        blocks = (own > 0) & (singles == 0) & (filtered == 0)
        if blocks.any():
            ones, sizes = blocks.astype(np.int32), np.where(blocks, own, 0)
            further = _of_blocks(ones, ones, sizes, fixed[1], np.where(blocks, drafted, 0))
            rows, chosen = rows + further[0], chosen + further[1]
        each = np.where(singles, drafted, 0)
        steps = [int((each > at).sum()) for at in range(int(each.max(initial=0)))]
        rows, chosen, encoded = rows + steps, chosen + steps, steps[1:]
        whole = [
            FilteredDraft(_kept(fixed[1][line, : own[line]]), int(filtered[line]), int(drafted[line]), int(own[line]))
            for line in np.flatnonzero(filtered)
        ]
        inner = _together([draft.rows_of_passes() for draft in whole])
        # Before each such pass its new rows are encoded: a block's first one alone, those of its filter together.
        inner_encoded = _together([_encoded(draft) for draft in whole])[1:] if fed else []
    each_of = {"decode": (rows, inner), "logits": (chosen, inner), "encode": (encoded if fed else [], inner_encoded)}
    steps_of_all = {
        name: [(count, "") for count in own] + [(count, FILTER) for count in filters]
        for name, (own, filters) in each_of.items()
    }
    return _share(result.spent, taken, steps_of_all, len(plans.rows), DRAFT)


def _share(spent: Spent, taken: float, steps: dict[str, Rows], requests: int, kind: str) -> list[Pass]:
    """Divide the seconds of a call among its passes, in proportion to their rows. `steps` has the rows of each step by
    module; where it does not say their kind, those with a row of each request at most are of `kind`, others of `CALL`.
    Further passes are counted in `spent`."""
    passes = {name: [(rows, told) for rows, told in own if rows] for name, own in steps.items()}
    for name, beside in zip(("encode", "entropies", "encode"), spent.rows, strict=True):
        passes.setdefault(name, []).extend([(beside, "")] if beside else [])
    patcher, encoder, decoder, altogether = spent.seconds
    inside = {"entropies": patcher, "encode": encoder, "decode": decoder}
    inside["logits"] = max(altogether - sum(inside.values()), 0.0)
    shared: list[Pass] = []
    for name, own in passes.items():
        each = taken * inside[name] / altogether / max(sum(rows for rows, _ in own), 1)
        shared += [Pass(name, rows, each * rows, told or (kind if rows <= requests else CALL)) for rows, told in own]
    return shared


def _kept(origins: np.ndarray) -> list[int]:
    """How each byte of a filtered draft was made, without those that it does not have."""
    return [origin for origin in origins.tolist() if origin]


def _encoded(draft: FilteredDraft) -> list[int]:
    """Rows of the encoder's passes of a filtered draft."""
    return [rows for size in draft.blocks for rows in (1, size)] + [1] * draft.singles


def _together(passes: list[list[int]]) -> list[int]:
    """Rows of passes that requests make together, each for itself as many as it needs."""
    return [sum(rows) for rows in zip_longest(*passes, fillvalue=0)]


def _of_blocks(
    causals: np.ndarray, selects: np.ndarray, sizes: np.ndarray, fixed: np.ndarray, taken: np.ndarray
) -> tuple[list[int], list[int]]:
    """For each step of the blocks, the number of rows and of rows that were sampled. Causal rows are in the first."""
    steps = range(1, int(taken.max()) + 1)
    rows = [int(sizes[taken >= at].sum()) for at in steps]
    rows[0] += int(causals.sum())
    inside = np.arange(fixed.shape[1]) < sizes[:, None]
    masked = inside & ((fixed == 0) | (fixed >= np.array(steps)[:, None, None]))
    chosen = (masked & (taken >= np.array(steps)[:, None])[..., None]).sum((1, 2)).tolist()
    # The first byte of such a block comes from a selected causal row, so its own row is not sampled.
    chosen[0] += int(selects.sum()) - int((selects[sizes > 0] > 0).sum())
    return rows, chosen


def _rows_of(module: str, args: tuple[Any, ...]) -> int:
    if module == "upstream":
        return len(args[0].starts)
    if module == "logits":
        states, index = args
        return len(states) if index is None else len(index)
    return len(args[0].owners)
