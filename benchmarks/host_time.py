"""Host Python per pass: what a step costs beside the modules and the selection kernels.

    python -m benchmarks.host_time    BLT, BLT-S, BLT-DV and BLT-D at 1 and 32 requests

Timers stand around the calls that only give work to the device and never wait for it or loop over requests: the passes
(`server/engine/passes.py`) and the kernels that choose bytes. Whatever else a step takes, planning, laying out rows,
gathering parameters, fetching and settling, is the host's, and would leave an accelerator idle. Printed are
microseconds of this thread's processor time per decoder pass (mean and median) and per request in it, against the
target of 200 and 20 for each request, and the host's share of the steps' wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out import held_out_prompts
from benchmarks.holding import METHODS, endless, start_apart
from benchmarks.methods import diffusion
from models.blt import Blt
from models.checkpoint import load_checkpoint
from server.engine import choosing
from server.engine.engine import Engine
from server.engine.passes import Passes
from server.request import DecodingMethod, DecodingParams
from server.settings import PRETRAINED, EngineSettings

#: Microseconds of a pass, and of each request in it.
TARGET = (200, 20)


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


@contextmanager
def device_time() -> Iterator[Timer]:
    """A timer around everything that is not the host's."""
    timer = Timer()
    places: list[tuple[Any, str]] = [(choosing, "select"), (choosing, "unmask"), (choosing, "verify")]
    methods = ("entropies", "encode", "upstream", "decode", "logits", "places", "ids_at", "write")
    places += [(Passes, name) for name in methods]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:
        setattr(place, name, timer.around(original))
    try:
        yield timer
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def host_time(model: Blt, prompts: list[list[int]], decoding: DecodingParams, passes: int) -> dict[str, float]:
    """Microseconds of the host per decoder pass, while all the requests run."""
    engine = Engine(model, EngineSettings(max_running=len(prompts)))
    start_apart(engine, prompts, endless(decoding, len(prompts), 0.0))
    host: list[float] = []
    total = 0.0
    before = sum(sequence.ledger.decoder for sequence in engine._sequences.values())
    with device_time() as timer:
        for _ in range(passes):
            inside, clock, wall = timer.seconds, time.thread_time(), time.perf_counter()
            engine.step()
            total += time.perf_counter() - wall
            host.append(1e6 * (time.thread_time() - clock - (timer.seconds - inside)))
    taking_part = sum(sequence.ledger.decoder for sequence in engine._sequences.values()) - before
    return {
        "requests": len(prompts),
        "requests_per_pass": taking_part / passes,
        "host_us_per_pass": statistics.mean(host),
        "host_us_per_pass_median": statistics.median(host),
        "host_us_per_request": sum(host) / taking_part,
        "host_share": sum(host) / 1e6 / total,
        "target_us": TARGET[0] + TARGET[1] * taking_part / passes,
    }


def measure(model: Blt, prompts: list[list[int]], passes: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Host time of every method at every number of requests, printed as a table."""
    methods = dict(METHODS)
    if model.config.has_diffusion:
        methods["blt-d-8 a0.7"] = diffusion(DecodingMethod.BLT_D, 8, "a0.7")
    rows: dict[str, Any] = {}
    print("| method | requests | in a pass | us a pass | median | us a request | share of the step | target |")
    print("|" + "---|" * 8)
    for name, decoding in methods.items():
        for count in counts:
            row = rows[f"{name}, {count}"] = host_time(model, prompts[:count], decoding, passes)
            print(
                f"| {name} | {count} | {row['requests_per_pass']:.1f} | {row['host_us_per_pass']:.0f} "
                f"| {row['host_us_per_pass_median']:.0f} | {row['host_us_per_request']:.1f} "
                f"| {row['host_share']:.0%} | {row['target_us']:.0f} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = held_out_prompts(max(args.requests), 256)
    rows = measure(load_checkpoint(args.model), prompts, args.passes, tuple(args.requests))
    if args.json:
        result = {"passes": args.passes, "threads": torch.get_num_threads(), "runs": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
