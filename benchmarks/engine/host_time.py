"""Host Python per pass: what a step costs beside the modules and the selection kernels.

    python -m fastblt.benchmarks.engine.host_time    BLT, BLT-S, BLT-DV and BLT-D at 1 and 32 requests

The device's side of a step are the calls that only give it work, from integers that the host has staged, and never wait
for it or loop over requests: the modules' passes (`server/engine/device/forward.py`), the choice of bytes
(`Sampler.choose`), the packing of results. All else (planning, laying out rows, fetching, postprocessing) is the
host's, and would leave an accelerator idle. It is measured twice, in microseconds of this thread's processor time per
decoder pass; a call that makes several (`ModuleForward.steps`, `decode_steps`) asks the host once for all of them:

  beside   with timers around the device's calls, which run on the same processor. Every pass then reads all weights
           through its caches, and the host's code and data come from memory again.
  alone    the run once more with the device's calls left out and the results of the first run handed to the host:
           what remains where a device of its own does that work. The same plans, rows, picks and bytes.

Against the target of 200 us a pass and 20 for each request in it. What others do on the machine only ever adds to it:
of `--rounds` runs the one that had least alone is reported, beside what the others had, and beside what a fixed piece
of Python of this module took right behind each: where that takes longer, it is the minute that is slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastblt.benchmarks.engine.holding import METHODS, endless, start_apart
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.methods import diffusion
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.device.forward import ModuleForward
from fastblt.server.engine.device.staging import Fetch
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.runner.sampler import Sampler
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

#: Microseconds of a pass, and of each request in it.
TARGET = (200, 20)


#: The device's side, and what brings its results to the host.
_DEVICE: list[tuple[Any, str]] = [
    (ModuleForward, "entropies"),
    (ModuleForward, "encode"),
    (ModuleForward, "upstream"),
    (ModuleForward, "decode"),
    (ModuleForward, "steps"),
    (ModuleForward, "decode_steps"),
    (Sampler, "choose"),
    (Fetch, "pack"),
]


class Timer:
    """Processor time of this thread in the calls it was put around; a call within another counts once."""

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


#: What has results for the host.
_RESULTS: list[tuple[Any, str]] = [(Fetch, "__call__"), (ModuleForward, "steps"), (ModuleForward, "decode_steps")]


@contextmanager
def replaced(change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """The device's calls, and those with results, as `change` makes them of their name and themselves."""
    places = _DEVICE + _RESULTS
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:
        setattr(place, name, change(name, original))
    try:
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


@dataclass(slots=True)
class _Thing:
    value: int
    tail: list[int]


def yardstick() -> float:
    """Microseconds of this thread's processor time that a fixed piece of Python takes: objects, attributes, short
    lists, a dict; the best of a few, so that it says how fast the minute is, and nothing of single interruptions."""

    def once() -> float:
        clock, named = time.thread_time(), dict[int, _Thing]()
        for at in range(2000):
            thing = named[at & 31] = _Thing(at, [at, at + 1])
            thing.tail += (thing.value, len(named))
        return 1e6 * (time.thread_time() - clock)

    return min(once() for _ in range(5))


def run(model: Blt, prompts: list[list[int]], decoding: DecodingParams, steps: int, timer: Timer) -> dict[str, float]:
    """Microseconds of the host per decoder pass, while all the requests run; `timer` has the device's share."""
    engine = Engine(model, EngineSettings(max_running=len(prompts)))
    start_apart(engine, prompts, endless(decoding, len(prompts), 0.0))
    host: list[float] = []
    made: list[int] = []
    decode, requests, ledger = engine._runner.decode, list[int](), engine._runner.ledger

    def counted(sequences: list[Any]) -> Any:
        requests.append(len(sequences))
        return decode(sequences)

    engine._runner.decode = counted  # type: ignore[method-assign]
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


def host_time(model: Blt, prompts: list[list[int]], decoding: DecodingParams, steps: int) -> dict[str, Any]:
    """The host's time beside the device's work and alone."""
    timer, results = Timer(), dict[str, list[Any]](__call__=[], steps=[], decode_steps=[])

    def record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if name not in results:
            return timer.around(call)
        if name != "__call__":
            call = timer.around(call)

        def kept(*args: Any, **kwargs: Any) -> Any:
            results[name].append(call(*args, **kwargs))
            return results[name][-1]

        return kept

    with replaced(record):
        beside = run(model, prompts, decoding, steps, timer)
    again = {name: iter(own) for name, own in results.items()}

    def replay(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        if name in again:
            return lambda *_, **__: next(again[name])
        return lambda *_: []

    with replaced(replay):
        alone = run(model, prompts, decoding, steps, Timer())
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


def measure(
    model: Blt, prompts: list[list[int]], steps: int, counts: tuple[int, ...], rounds: int = 1
) -> dict[str, Any]:
    """Host time of every method at every number of requests, the best of some rounds, printed as a table."""
    methods = dict(METHODS)
    if model.config.has_diffusion:
        methods["blt-d-8 a0.7"] = diffusion(DecodingMethod.BLT_D, 8, "a0.7")
    rows: dict[str, Any] = {}
    print(
        "| method | requests | in a call | its passes | beside, mean us | median | alone, mean us | median "
        "| of rounds (fixed Python) | target |"
    )
    print("|" + "---|" * 10)
    for name, decoding in methods.items():
        for count in counts:
            runs = [host_time(model, prompts[:count], decoding, steps) for _ in range(rounds)]
            row = rows[f"{name}, {count}"] = min(runs, key=lambda run: run["alone"]["mean"])
            row["rounds"] = [run["alone"]["mean"] for run in runs]
            row["yardsticks"] = [run["yardstick"] for run in runs]
            beside, alone = row["beside"], row["alone"]
            others = ", ".join(f"{run['alone']['mean']:.0f} ({run['yardstick']:.0f})" for run in runs)
            print(
                f"| {name} | {count} | {row['requests_per_pass']:.1f} "
                f"| {row['passes_per_step']:.1f} | {beside['mean']:.0f} | {beside['median']:.0f} "
                f"| {alone['mean']:.0f} | {alone['median']:.0f} | {others} | {row['target_us']:.0f} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = held_out_prompts(max(args.requests), 256)
    rows = measure(load_checkpoint(args.model), prompts, args.steps, tuple(args.requests), args.rounds)
    if args.json:
        result = {"steps": args.steps, "rounds": args.rounds, "runs": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
