"""What a pass costs on this machine by module and rows, and what a decoding's passes should take by that.

Predicted time is the sum over passes of what a pass of its module takes at its rows (design §6.6). The curve is
measured on the engine's own passes, the modules in turns as in a beat, so that each finds in the processor's caches
what the others left. Without a context, rows stand at the very beginning of a request: all weights are read and each
row attends to one key. So what a real pass takes beyond it is attention over a context, and cache; and what a step
takes beyond its passes is the engine. With a context, the rows read the keys and values of as many requests as will
run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastblt.benchmarks.savings.passes import MODULES as PASSES
from fastblt.benchmarks.savings.passes import Pass
from fastblt.models.accounting import ModuleParameters
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.device.cost import MODULES, make_calls
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.engine import Engine

#: Rows the curve is measured at, those of a verified draft among them; between them it is a line.
_GRID = (1, 2, 4, 5, 8, 9, 12, 16, 17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
#: Rows whose passes are measured at least so often: a large model's are long, and those of a draft decide.
_FEW, _TURNS = 32, 7
#: Bytes a patch, at which a position's patch is guessed.
_PATCH = 4


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a pass by module, at the rows it was measured at, which stood at position `context`, for a batch of so
    many requests; and, by themselves, of a pass of as many rows as are `common`."""

    rows: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]
    context: int = 0
    requests: int = 1
    common: dict[str, float] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode()
    def measure(cls, engine: Engine, most: int, budget: float = 0.5, context: int = 0, requests: int = 1) -> CostCurve:
        """Medians of as many passes as fit into `budget` seconds, and at least a few, up to `most` rows.

        Passes of every number of rows take turns with passes of one: how much dearer they are is a ratio of neighbors,
        for a machine whose memory others use as well is not as fast at one minute as at the next.

        Rows stand at position `context`, and attend to what their windows hold of the keys up to there, each to those
        of one of `requests` requests. Nothing must run in the engine, nor be kept by its prefix cache.
        """
        passes = engine._runner._forward
        rows = [count for count in _GRID if count < most] + [most]
        ratios: dict[str, list[float]] = {module: [] for module in PASSES}
        singles: dict[str, list[float]] = {module: [] for module in PASSES}
        common: dict[str, list[float]] = {module: [] for module in PASSES}
        with _occupied(engine._caches, context, requests if context else 0) as owners:
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
        seconds = {
            module: tuple(statistics.median(singles[module]) * ratio for ratio in ratios[module]) for module in PASSES
        }
        medians = {module: statistics.median(values) for module, values in common.items()}
        return cls(tuple(rows), seconds, context, requests, medians)

    @torch.inference_mode()
    def drift(self, engine: Engine) -> dict[str, float]:
        """How many times as long as when the curve was measured a pass of as many rows as are common takes now, by
        module. Nothing must run in the engine."""
        with _occupied(engine._caches, self.context, self.requests if self.context else 0) as owners:
            taken = _common(engine._runner._forward, self.context, owners, self.requests)
        return {module: value / self.common[module] for module, value in taken.items()}

    def predict(self, done: Pass) -> float:
        """Seconds that a pass of so many rows takes by the curve; beyond its end it goes on as a line."""
        values = self.seconds[done.module]
        if done.rows <= self.rows[-1]:
            return float(np.interp(done.rows, self.rows, values))
        return values[-1] * done.rows / self.rows[-1]


def weights_read(passes: Sequence[Pass], parameters: ModuleParameters, head: int, bytes_per_weight: int) -> float:
    """Gigabytes of weights that passes read, each once whatever its rows; the entropy model's weights have 4 bytes."""
    sizes = {
        module: count * (4 if module == "entropies" else bytes_per_weight)
        for module, count in module_weights(parameters, head).items()
    }
    return sum(sizes[done.module] for done in passes) / 1e9


def module_weights(parameters: ModuleParameters, head: int) -> dict[str, int]:
    """Weights that a pass of each module reads, the head apart from the decoder."""
    return {
        "entropies": parameters.patcher,
        "encode": parameters.encoder,
        "upstream": parameters.global_,
        "decode": parameters.decoder - head,
        "logits": head,
    }


@contextmanager
def _occupied(caches: KvCaches, context: int, requests: int) -> Iterator[list[int]]:
    """State rows whose page tables name pages, of their own as far as there are enough, up to position `context`."""
    owners = list(range(1, requests + 1))
    for name, group in caches.groups.items():
        count = (context // _PATCH if name == "global" else context) // group.page_size + 1
        pages = np.arange(requests * count) % group.pool.size + 1
        group.table[1 : requests + 1, :count] = pages.reshape(requests, count)
        # Whatever lay there may be no number; what nobody will read stays as it is, and costs no memory.
        for layer in group.layers:
            layer[: (int(pages.max(initial=0)) + 1) * group.page_size].zero_()
    caches.send_tables()
    try:
        yield owners
    finally:
        for group in caches.groups.values():
            group.table[1 : requests + 1] = 0


def _spread(owners: Sequence[int], count: int) -> list[int]:
    """Whose each of so many rows is; nobody's where there are no owners."""
    return [owners[at * len(owners) // count] for at in range(count)] if owners else []


def _calls(passes: ModuleForward, count: int, context: int, owners: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """A pass of `count` rows of every module at position `context`, by the name of the function that runs it."""
    of_module = make_calls(passes, count, context, context // _PATCH, owners=owners)
    head = passes._model.lm_head.weight
    states = torch.zeros(count, head.shape[1], dtype=head.dtype, device=head.device)
    calls = {function: of_module[module] for function, module in zip(PASSES[:-1], MODULES, strict=True)}
    return calls | {"logits": lambda: passes.logits(states, None)}


def _common(passes: ModuleForward, context: int, owners: Sequence[int], requests: int) -> dict[str, float]:
    """Seconds of a pass of four rows a request, by module."""
    count = 4 * requests
    return _medians(_calls(passes, count, context, _spread(owners, count)), 0.1)


def _medians(calls: dict[str, Callable[[], Any]], budget: float, least: int = 3) -> dict[str, float]:
    """Seconds of every call, which take at least so many turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < least or (
        time.perf_counter() - began < budget and len(next(iter(taken.values()))) < 50
    ):
        for name, call in calls.items():
            clock = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in taken.items()}
