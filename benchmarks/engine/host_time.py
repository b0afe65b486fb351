"""Host time per pass: the Python time of a step, without the modules and the selection kernels.

    python -m fastblt.benchmarks.engine.host_time    BLT, BLT-S, BLT-DV and BLT-D at 1 and 32 requests

The device's side of a step are calls that only give a device work, from staged integers, and neither wait for it nor
loop over requests: the passes of the modules, sampling, packing of results (`_DEVICE`). All else is the host's and
would leave an accelerator idle: planning, laying out rows, fetching, postprocessing. Host time is measured twice, in
microseconds of this thread's processor time per decoder pass. A call that makes several passes needs the host once for
all of them.

  beside   the device's calls run on the same processor and are subtracted. Every pass then reads all weights through
           the processor's caches, so the host's code and data come from memory again.
  alone    the same run again, with the device's calls left out and the results of the first run given to the host:
           the host time with a separate device. Plans, rows and bytes are the same.

The target is 200 us a pass plus 20 us for each request in it. Other jobs on the machine can only add time. So of
`--rounds` runs the one with the least time alone is reported, together with the times of the others. After each run a
fixed piece of Python is timed: if that is slow, the machine was slow at that time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import begin, endless, replaced, start
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import decoding, with_diffusion
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.staging import Fetch
from fastblt.server.engine.runner.sampler import Sampler
from fastblt.server.settings import PRETRAINED

#: Target in microseconds for a pass, and for each request in it.
TARGET = (200, 20)

#: The device's calls that return nothing to the host.
_DEVICE: list[tuple[Any, str]] = [
    (ModuleForward, "entropies"),
    (ModuleForward, "encode"),
    (ModuleForward, "upstream"),
    (ModuleForward, "decode"),
    (Sampler, "choose"),
    (Fetch, "pack"),
]
#: The calls that return results to the host: device calls of many passes, and the fetching of all other results.
_CALLS: list[tuple[Any, str]] = [(ModuleForward, "steps"), (ModuleForward, "decode_steps")]
_FETCH = (Fetch, "__call__")


class Timer:
    """Sums this thread's processor time in the calls that it wraps. A wrapped call inside another counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            clock = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - clock
                self._inside = False

        return timed


@dataclass(slots=True)
class _Thing:
    value: int
    tail: list[int]


def yardstick() -> float:
    """Microseconds of this thread's processor time for a fixed piece of Python: objects, attributes, short lists, a
    dict. It is the least of a few runs, so that it shows the speed of the machine without single interruptions."""

    def once() -> float:
        clock, named = time.thread_time(), dict[int, _Thing]()
        for at in range(2000):
            thing = named[at & 31] = _Thing(at, [at, at + 1])
            thing.tail += (thing.value, len(named))
        return 1e6 * (time.thread_time() - clock)

    return min(once() for _ in range(5))


def run(model: Blt, prompts: list[list[int]], setting: str, steps: int, timer: Timer) -> dict[str, float]:
    """Host microseconds per decoder pass while all requests run. `timer` has the device's time, which is subtracted."""
    engine = start(model, len(prompts))
    begin(engine, prompts, endless(decoding(setting), len(prompts)))
    host: list[float] = []
    made: list[int] = []
    requests, ledger = list[int](), engine._runner.ledger

    def counted(decode: Callable[..., Any]) -> Callable[..., Any]:
        def call(sequences: list[Any]) -> Any:
            requests.append(len(sequences))
            return decode(sequences)

        return call

    with replaced((engine._runner, "decode", counted)):
        for _ in range(steps):
            inside, clock, before = timer.seconds, time.thread_time(), ledger.decoder
            engine.step()
            host.append(1e6 * (time.thread_time() - clock - (timer.seconds - inside)))
            made.append(ledger.decoder - before)
    return {
        "requests_per_pass": sum(requests) / steps,
        "passes_per_step": sum(made) / steps,
        "mean": sum(host) / sum(made),
        "median": statistics.median(one / count for one, count in zip(host, made, strict=True)),
    }


def _nothing(_: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: []


def host_time(model: Blt, prompts: list[list[int]], setting: str, steps: int) -> dict[str, Any]:
    """Host time `beside` and `alone`. Raises RuntimeError if the second run does not repeat the first."""
    timer = Timer()
    results: dict[str, list[Any]] = {name: [] for _, name in (*_CALLS, _FETCH)}

    def kept(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> Any:
            made = call(*args, **kwargs)
            # The next call may write to the same arrays.
            results[name].append(copy.deepcopy(made))
            return made

        return keep if name == _FETCH[1] else timer.around(keep)

    timed = [(place, name, timer.around) for place, name in _DEVICE]
    keeping = [(place, name, partial(kept, name)) for place, name in (*_CALLS, _FETCH)]
    with replaced(*timed, *keeping):
        beside = run(model, prompts, setting, steps, timer)
    again = {name: iter(own) for name, own in results.items()}

    def replay(name: str, _: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *_, **__: next(again[name])

    left_out = [(place, name, _nothing) for place, name in _DEVICE]
    replayed = [(place, name, partial(replay, name)) for place, name in (*_CALLS, _FETCH)]
    with replaced(*left_out, *replayed):
        alone = run(model, prompts, setting, steps, Timer())
    left = any(next(own, None) is not None for own in again.values())
    if left or alone["requests_per_pass"] != beside["requests_per_pass"]:
        raise RuntimeError("the second run did not repeat the first")
    return {
        "requests": len(prompts),
        "requests_per_pass": beside["requests_per_pass"],
        "passes_per_step": beside["passes_per_step"],
        "beside": beside,
        "alone": alone,
        "yardstick": yardstick(),
        "target_us": TARGET[0] + TARGET[1] * beside["requests_per_pass"],
    }


def compare(model: Blt, prompts: list[list[int]], steps: int, counts: Sequence[int], rounds: int = 1) -> dict[str, Any]:
    """Print and return the host time of every method for each number of requests; the best of `rounds`."""
    rows: dict[str, Any] = {}
    columns = ("in a call", "its passes", "beside, mean us", "median", "alone, mean us", "median")
    table = Table("method", "requests", *columns, "of rounds (fixed Python)", "target")
    for name in with_diffusion(model.config.block_sizes):
        for count in counts:
            runs = [host_time(model, prompts[:count], name, steps) for _ in range(rounds)]
            row = rows[f"{name}, {count}"] = min(runs, key=lambda run: run["alone"]["mean"])
            row["rounds"] = [run["alone"]["mean"] for run in runs]
            row["yardsticks"] = [run["yardstick"] for run in runs]
            cells = [f"{row[key]:.1f}" for key in ("requests_per_pass", "passes_per_step")]
            cells += [f"{row[where][kind]:.0f}" for where in ("beside", "alone") for kind in ("mean", "median")]
            others = ", ".join(f"{run['alone']['mean']:.0f} ({run['yardstick']:.0f})" for run in runs)
            table.row(name, str(count), *cells, others, f"{row['target_us']:.0f}")
    return rows


def measure(
    *, model: str = str(PRETRAINED), requests: Sequence[int] = (1, 32), steps: int = 400, rounds: int = 5
) -> dict[str, Any]:
    """Host time of every method."""
    prompts = held_out_prompts(max(requests), 256)
    rows = compare(load_checkpoint(model), prompts, steps, requests, rounds)
    return {"steps": steps, "rounds": rounds, "runs": rows}


app = command(measure)

if __name__ == "__main__":
    app()
