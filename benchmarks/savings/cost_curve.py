"""What a pass costs on this machine by module and rows, and what a decoding's passes should take by that.

Predicted time is the sum over passes of t_m(rows) (design §6.6). The curve is measured on the engine's own passes, the
modules in turns as in a beat, so that each finds in the processor's caches what the others left. Without a context,
rows stand at the very beginning of a request: all weights are read and each row attends to one key. So what a real pass
takes beyond it is attention over a context, and cache; and what a step takes beyond its passes is the engine. With a
context, the rows read the keys and values of as many requests as will run.
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

from fastblt.kernels.cpu.decoder_steps import COLUMNS, SINGLE_ROWS, Decoded, DecoderSteps, Plans
from fastblt.kernels.cpu.multi_step import OPENED, MultiStep, Steps
from fastblt.kernels.cpu.structs import Spent
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
class Pass:
    """One pass of a module: entropies, encode, upstream, decode, or logits (the head)."""

    module: str
    rows: int
    seconds: float


class Recorder:
    """Times every pass of an engine on a CPU while it is on. Whoever starts a clock clears it; what calls stood for is
    worked out when they are taken, for it would take the clock's time."""

    def __init__(self, engine: Engine) -> None:
        self._calls: list[Callable[[], list[Pass]]] = []
        self._device = engine._runner._forward

    def clear(self) -> None:
        """Forget what was timed."""
        self._calls.clear()

    def take(self) -> list[Pass]:
        """The passes since it was cleared."""
        passes = [done for call in self._calls for done in call()]
        self.clear()
        return passes

    @contextmanager
    def on(self) -> Iterator[None]:
        for module in _MODULES:
            setattr(self._device, module, self._timed(module, getattr(self._device, module)))
        self._device.steps = self._taken_apart(self._device.steps)  # type: ignore[method-assign]
        self._device.decode_steps = self._decoded(self._device.decode_steps)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name in (*_MODULES, "steps", "decode_steps"):
                delattr(self._device, name)

    def _taken_apart(self, call: Callable[..., Steps]) -> Callable[..., Steps]:
        """A call of many steps as the passes that it stands for: of each step and module those who took part. What the
        choice of bytes takes is the head's."""

        def timed(step: MultiStep, columns: np.ndarray, *args: Any, **kwargs: Any) -> Steps:
            clock = time.perf_counter()
            result = call(step, columns, *args, **kwargs)
            taken = time.perf_counter() - clock
            self._calls.append(lambda: _passes_of_steps(columns, result, taken, step.encoder_input))
            return result

        return timed

    def _decoded(self, call: Callable[..., Decoded]) -> Callable[..., Decoded]:
        """A call of the decoder's passes likewise: of each step its rows, and those that bytes were chosen from."""

        def timed(step: DecoderSteps, plans: Plans, **kwargs: Any) -> Decoded:
            clock = time.perf_counter()
            result = call(step, plans, **kwargs)
            taken = time.perf_counter() - clock
            # The next call takes these back.
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
    """The passes that a call of steps stood for."""
    stays = columns[OPENED] >= 0
    encoded = result.made - 1 if fed else np.where(stays, result.made - 1, 0)
    each = {"entropies": result.scanned[stays], "encode": encoded, "decode": result.made, "logits": result.made}
    steps = {name: [int((own > at).sum()) for at in range(int(own.max(initial=0)))] for name, own in each.items()}
    return _share(result.spent, taken, steps)


def _passes_of_plans(
    plans: Plans, result: Decoded, fixed: tuple[np.ndarray, np.ndarray], taken: float, fed: bool
) -> list[Pass]:
    """The passes that a call of plans stood for, where steps fixed those bytes of the blocks and of the drafts."""
    asked = {name: np.array(plans.column(name)) for name in COLUMNS}
    lines, drafted = np.array(result.lines), np.array(result.drafts.steps)
    behind, encoded = lines >= 0, list[int]()
    steps_of = np.array(result.made.steps)
    rows, chosen = _of_blocks(asked["causals"], asked["selects"], asked["sizes"], fixed[0], steps_of)
    if behind.any():
        own, singles = np.zeros(len(drafted), dtype=np.int32), np.zeros(len(drafted), dtype=bool)
        accepted = np.array(result.accepted)[behind]
        own[lines[behind]] = np.minimum(asked["follows"][behind], asked["lefts"][behind] - accepted - 2)
        singles[lines[behind]] = asked["rules"][behind] == SINGLE_ROWS
        if own[~singles].any():
            ones, sizes = (~singles & (own > 0)).astype(np.int32), np.where(singles, 0, own)
            further = _of_blocks(ones, ones, sizes, fixed[1], np.where(singles, 0, drafted))
            rows, chosen = rows + further[0], chosen + further[1]
        each = np.where(singles, drafted, 0)
        steps = [int((each > at).sum()) for at in range(int(each.max()))]
        rows, chosen, encoded = rows + steps, chosen + steps, steps[1:]
    return _share(result.spent, taken, {"decode": rows, "logits": chosen, "encode": encoded if fed else []})


def _share(spent: Spent, taken: float, steps: dict[str, list[int]]) -> list[Pass]:
    """The seconds of a call among the passes that it stands for, by their rows: the `steps` of the modules, and what
    went beside them."""
    passes = {name: [rows for rows in own if rows] for name, own in steps.items()}
    for name, rows in zip(("encode", "entropies", "encode"), spent.rows, strict=True):
        passes.setdefault(name, []).extend([rows] if rows else [])
    patcher, encoder, decoder, altogether = spent.seconds
    inside = {"entropies": patcher, "encode": encoder, "decode": decoder}
    inside["logits"] = max(altogether - sum(inside.values()), 0.0)
    shared: list[Pass] = []
    for name, own in passes.items():
        each = taken * inside[name] / altogether / max(sum(own), 1)
        shared += [Pass(name, rows, each * rows) for rows in own]
    return shared


def _of_blocks(
    causals: np.ndarray, selects: np.ndarray, sizes: np.ndarray, fixed: np.ndarray, taken: np.ndarray
) -> tuple[list[int], list[int]]:
    """Of each step that blocks took, causal rows in the first: its rows, and those that bytes were chosen from."""
    steps = range(1, int(taken.max()) + 1)
    rows = [int(sizes[taken >= at].sum()) for at in steps]
    rows[0] += int(causals.sum())
    inside = np.arange(fixed.shape[1]) < sizes[:, None]
    masked = inside & ((fixed == 0) | (fixed >= np.array(steps)[:, None, None]))
    chosen = (masked & (taken >= np.array(steps)[:, None])[..., None]).sum((1, 2)).tolist()
    # A selected row's byte opens the block.
    chosen[0] += int(selects.sum()) - int((selects[sizes > 0] > 0).sum())
    return rows, chosen


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
        ratios: dict[str, list[float]] = {module: [] for module in _MODULES}
        singles: dict[str, list[float]] = {module: [] for module in _MODULES}
        common: dict[str, list[float]] = {module: [] for module in _MODULES}
        with _occupied(engine._caches, context, requests if context else 0) as owners:
            for count in rows:
                own = _spread(owners, count)
                single = _calls(passes, rows[0], context, own[:1])
                both = {f"{module} alone": call for module, call in single.items()}
                taken = _medians(
                    both | _calls(passes, count, context, own), 2 * budget, least=_TURNS if count <= _FEW else 3
                )
                for module in _MODULES:
                    singles[module].append(taken[f"{module} alone"])
                    ratios[module].append(taken[module] / taken[f"{module} alone"])
                for module, value in _common(passes, context, owners, requests).items():
                    common[module].append(value)
        seconds = {
            module: tuple(statistics.median(singles[module]) * ratio for ratio in ratios[module]) for module in _MODULES
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


def machine_limits(threads: int, device: torch.device) -> dict[str, float]:
    """What no pass can beat here: `read_gb_s`, reading memory far larger than any cache, and `gflop_s`, fp32 products.

    On the device and with as many CPU threads as the passes have.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = torch.ones(2**26, device=device)
        square = torch.ones(1024, 1024, device=device)

        def best(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(6):
                clock = time.perf_counter()
                # The sum comes to the host, so a device is waited for.
                float(call())
                times.append(time.perf_counter() - clock)
            return min(times)

        read, product = best(lambda: block.sum()), best(lambda: (square @ square)[0, 0])
    finally:
        torch.set_num_threads(before)
    return {"read_gb_s": block.nbytes / read / 1e9, "gflop_s": 2 * 1024**3 / product / 1e9}


def module_weights(parameters: ModuleParameters, head: int) -> dict[str, int]:
    """Weights that a pass of each module reads, the head apart from the decoder."""
    return {
        "entropies": parameters.patcher,
        "encode": parameters.encoder,
        "upstream": parameters.global_,
        "decode": parameters.decoder - head,
        "logits": head,
    }


#: Functions of `ModuleForward`: those of `fastblt.server.engine.device.cost.MODULES` in their order, and the head.
_MODULES = ("entropies", "encode", "upstream", "decode", "logits")


def _rows_of(module: str, args: tuple[Any, ...]) -> int:
    if module == "upstream":
        return len(args[0].starts)
    if module == "logits":
        states, index = args
        return len(states) if index is None else len(index)
    return len(args[0].owners)


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
    calls = {function: of_module[module] for function, module in zip(_MODULES[:-1], MODULES, strict=True)}
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
