"""The cost of a pass on this machine by module and number of rows, and the predicted time of a run's passes.

Predicted time is the sum over passes of the curve's time for the module and the rows (design §6.6). The curve is
measured on the engine's own passes, with the modules in turns as in a beat, so that the processor's caches are as in a
real run; passes inside C calls are measured in such calls (`call_curves.py`). Without a context, all rows are at
position 0: all weights are read and each row attends to one key. A real pass takes longer because of attention over a
context and cache misses, and a step takes longer than its passes because of the engine. With a context, rows read the
keys and values of as many requests as will run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastblt.benchmarks.machine import finish
from fastblt.benchmarks.savings.call_curves import BEYOND, Curves, measure_inside
from fastblt.benchmarks.savings.passes import MODULES as PASSES
from fastblt.benchmarks.savings.passes import Pass
from fastblt.models.accounting import ModuleParameters
from fastblt.models.config import BltConfig
from fastblt.models.vocabulary import VOCAB_SIZE
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.device.cost import MODULES, make_calls
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.engine import Engine

#: Numbers of rows at which the curve is measured, including those of verified drafts. Between them it is interpolated.
_GRID = (1, 2, 4, 5, 8, 9, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Up to _FEW rows, passes are measured at least _TURNS times, even if they are long: drafts have so many rows.
_FEW, _TURNS = 32, 7
#: Assumed bytes per patch, to guess the patch index of a position.
_PATCH = 4


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a pass, by module, for each number of `rows`.

    The rows were at position `context`, in a batch of `requests` requests. `common`: seconds of a pass with a usual
    number of rows, from which `drift` is computed. `inside`: the curves of passes inside C calls, by their kind.
    """

    rows: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]
    context: int = 0
    requests: int = 1
    common: dict[str, float] = field(default_factory=dict)
    inside: dict[str, Curves] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode()
    def measure(cls, engine: Engine, most: int, budget: float = 0.5, context: int = 0, requests: int = 1) -> CostCurve:
        """Measure the curve up to `most` rows.

        A point is the median of as many passes as fit into `budget` seconds, and of a few at least.

        Passes of each number of rows alternate with passes of one row, and the curve is made from their ratios: the
        speed of a shared machine changes over time.

        Rows are at position `context` and attend to the keys before it, within their windows; each row belongs to one
        of `requests` requests. The engine must be idle, and its prefix cache empty.
        """
        passes = engine._runner._forward
        rows = [count for count in _GRID if count < most] + [most]
        ratios: dict[str, list[float]] = {module: [] for module in PASSES}
        singles: dict[str, list[float]] = {module: [] for module in PASSES}
        common: dict[str, list[float]] = {module: [] for module in PASSES}
        with _occupied(engine._caches, context + BEYOND, requests if context else 0) as owners:
            for count in rows:
                own = _spread(owners, count)
                single = _calls(passes, rows[0], context, own[:1])
                both = {f"{module} alone": call for module, call in single.items()}
                taken = _medians(
                    both | _calls(passes, count, context, own), 2 * budget, least=_TURNS if count <= _FEW else 3
                )
                for module in PASSES:
                    singles[module].append(taken[f"{module} alone"])
                    ratios[module].append(taken[module] / taken[f"{module} alone"])
                for module, value in _common(passes, context, owners, requests).items():
                    common[module].append(value)
            before = _calls(passes, requests, context, _spread(owners, requests))
            inside = measure_inside(engine, context, owners or [0] * requests, before)
        seconds = {
            module: tuple(statistics.median(singles[module]) * ratio for ratio in ratios[module]) for module in PASSES
        }
        medians = {module: statistics.median(values) for module, values in common.items()}
        return cls(tuple(rows), seconds, context, requests, medians, inside)

    @torch.inference_mode()
    def drift(self, engine: Engine) -> dict[str, float]:
        """By module, the time of a pass now relative to when the curve was measured. The engine must be idle."""
        with _occupied(engine._caches, self.context, self.requests if self.context else 0) as owners:
            taken = _common(engine._runner._forward, self.context, owners, self.requests)
        return {module: value / self.common[module] for module, value in taken.items()}

    def predict(self, done: Pass) -> float:
        """Seconds of a pass by the curve. Beyond its last point, time is proportional to rows."""
        rows, own = self.inside.get(done.inside, {}).get(done.module, ((), ()))
        if own and done.rows <= rows[-1]:
            return float(np.interp(done.rows, rows, own))
        values = self.seconds[done.module]
        if done.rows <= self.rows[-1]:
            return float(np.interp(done.rows, self.rows, values))
        return values[-1] * done.rows / self.rows[-1]


def weights_read(
    passes: Sequence[Pass], parameters: ModuleParameters, head: int, bytes_per_weight: float, patcher_bytes: float = 4
) -> float:
    """Gigabytes of weights that passes read. A pass reads its weights once. The entropy model's have bytes of their
    own."""
    sizes = _sizes(parameters, head, bytes_per_weight, patcher_bytes)
    return sum(sizes[done.module] for done in passes) / 1e9


def least_seconds(
    passes: Sequence[Pass],
    parameters: ModuleParameters,
    head: int,
    bytes_per_weight: float,
    patcher_bytes: float,
    limits: Mapping[str, float],
) -> float:
    """Seconds that passes take at least on a machine with these `limits`: each reads its weights from memory once, and
    multiplies every row by them. Where a processor's caches keep weights, reading takes less."""
    sizes, weights = _sizes(parameters, head, bytes_per_weight, patcher_bytes), module_weights(parameters, head)
    return (
        sum(
            max(
                sizes[done.module] / limits["read_gb_s"],
                2 * weights[done.module] * done.rows / limits["gflop_s"],
            )
            for done in passes
        )
        / 1e9
    )


def _sizes(parameters: ModuleParameters, head: int, bytes_per_weight: float, patcher_bytes: float) -> dict[str, float]:
    """Bytes of the weights of a pass, by module."""
    return {
        module: count * (patcher_bytes if module == "entropies" else bytes_per_weight)
        for module, count in module_weights(parameters, head).items()
    }


def head_weights(config: BltConfig) -> int:
    """The number of weights of the output head."""
    return VOCAB_SIZE * config.decoder.hidden_size


def module_weights(parameters: ModuleParameters, head: int) -> dict[str, int]:
    """The number of weights that a pass of each module reads. The output head is separate from the decoder."""
    return {
        "entropies": parameters.patcher,
        "encode": parameters.encoder,
        "upstream": parameters.global_,
        "decode": parameters.decoder - head,
        "logits": head,
    }


@contextmanager
def _occupied(caches: KvCaches, context: int, requests: int) -> Iterator[list[int]]:
    """Fill the page tables of `requests` state indices up to position `context`, with separate pages if there are
    enough. Yields the state indices."""
    owners = list(range(1, requests + 1))
    for name, group in caches.groups.items():
        count = (context // _PATCH if name == "global" else context) // group.page_size + 1
        pages = np.arange(requests * count) % group.pool.size + 1
        group.table[1 : requests + 1, :count] = pages.reshape(requests, count)
        # Old contents may be NaN. Pages that no row will read are not touched, so they take no memory.
        for layer in group.layers:
            layer[: (int(pages.max(initial=0)) + 1) * group.page_size].zero_()
    caches.tables.send_whole()
    try:
        yield owners
    finally:
        for group in caches.groups.values():
            group.table[1 : requests + 1] = 0


def _spread(owners: Sequence[int], count: int) -> list[int]:
    """The owners of `count` rows, spread evenly; empty if there are no owners."""
    return [owners[at * len(owners) // count] for at in range(count)] if owners else []


def _calls(passes: ModuleForward, count: int, context: int, owners: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """For each module, by the name of its function, a call that runs a pass of `count` rows at position `context`."""
    of_module = make_calls(passes, count, context, context // _PATCH, owners=owners)
    model = passes._model
    states = torch.zeros(count, model.config.decoder.hidden_size, dtype=model.dtype, device=model.device)
    calls = {function: of_module[module] for function, module in zip(PASSES[:-1], MODULES, strict=True)}
    return calls | {"logits": lambda: passes.logits(states, None)}


def _common(passes: ModuleForward, context: int, owners: Sequence[int], requests: int) -> dict[str, float]:
    """Seconds of a pass with a row for each request, by module. Most passes are such, and wait for what these do."""
    return _medians(_calls(passes, requests, context, _spread(owners, requests)), 0.1)


def _medians(calls: dict[str, Callable[[], Any]], budget: float, least: int = 3) -> dict[str, float]:
    """The median seconds of each call. They run in turns, at least `least` times and at most 50."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    finish()
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < least or (
        time.perf_counter() - began < budget and len(next(iter(taken.values()))) < 50
    ):
        for name, call in calls.items():
            clock = time.perf_counter()
            call()
            finish()
            taken[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in taken.items()}
