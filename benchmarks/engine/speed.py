"""The engine's speed, against a bare loop and by decoding method, and how often a batch changes bytes.

    python -m fastblt.benchmarks.engine.speed overhead   one request and 32, engine and bare loop in turns
    python -m fastblt.benchmarks.engine.speed auto       `auto` and fixed settings at 1, 8 and 32 requests
    python -m fastblt.benchmarks.engine.speed modes      how often the default mode's bytes differ from a solo run's

To compare a change of the engine with the commit before it:

    git worktree add ../before HEAD~1
    python -m fastblt.benchmarks.engine.speed auto --against ../before --rounds 1 \\
        --setting auto --setting blt --setting 'blt-s k16' --temperature 0
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.engine.bare_loop import BareLoop
from fastblt.benchmarks.harness import (
    begin,
    best_of,
    complete,
    end,
    endless,
    in_turns,
    over_best,
    ratio,
    start,
    stretch,
    whole_length,
)
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts, library_prompts
from fastblt.benchmarks.settings import decoding
from fastblt.kernels.cpu.threads import threads
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.settings import PRETRAINED

BLT = decoding("blt")
SETTINGS = (
    *("auto", "blt", "blt-s k8", "blt-s k16", "blt-s k32"),
    *("blt-dv-4 1step", "blt-dsv-4 k32", "blt-dsv-8 k32"),
)

#: Requests of a set in `auto`, one after another where fewer run at once; and the parts of a request in which settings
#: take turns.
_AT_LEAST, _LAPS = 4, 8


def overhead(*, model: str = str(PRETRAINED), rounds: int = 5, length: int = 100) -> dict[str, Any]:
    """The engine and a bare loop over the same modules, by turns of `length` bytes for each request; greedy BLT."""
    blt = load_checkpoint(model)
    result: dict[str, Any] = {"what": "overhead"}
    table = Table("requests", "engine, bytes/s", "bare loop", "engine over bare loop")
    for batch, each in ((1, length), (32, max(1, length * 2 // 5))):
        prompts = library_prompts(batch, 300)
        engine = start(blt, batch)
        loop = BareLoop(blt, prompts, 300 + (rounds + 1) * each + 8)
        begin(engine, prompts, endless(BLT, batch))

        def bare(loop: BareLoop = loop, batch: int = batch, each: int = each) -> float:
            clock = time.perf_counter()
            for _ in range(each):
                loop.step()
            return batch * each / (time.perf_counter() - clock)

        sides: dict[str, Callable[[], float]] = {"engine": partial(stretch, engine, batch * each), "bare": bare}
        speeds = in_turns(rounds, sides)
        over = ratio(speeds["engine"], speeds["bare"])
        served, alone = (statistics.median(speeds[name]) for name in ("engine", "bare"))
        result[f"batch_{batch}"] = {
            "engine_bytes_per_second": served,
            "bare_bytes_per_second": alone,
            "engine_over_bare": over,
        }
        table.row(str(batch), f"{served:.0f}", f"{alone:.0f}", f"{over:.2f}")
    one, many = (result[f"batch_{batch}"]["engine_bytes_per_second"] for batch in (1, 32))
    result["time_per_byte_over_bare_batch_1"] = 1 / result["batch_1"]["engine_over_bare"]
    result["batch_32_over_batch_1"] = many / one
    print(f"32 requests: {many / one:.2f} times the bytes per second of one")
    return result | {"threads": threads()}


def modes(*, model: str = str(PRETRAINED), rounds: int = 2, requests: int = 32, length: int = 256) -> dict[str, Any]:
    """Without `deterministic`: how many requests give other bytes in a batch than alone."""
    blt = load_checkpoint(model)
    count = differing = 0
    for turn in range(rounds):
        for temperature in (0.0, 0.8):
            params = [whole_length(BLT, length, temperature, seed=turn)] * requests
            prompts = library_prompts(requests, 200 + 37 * turn)
            together = [output.ids for output in complete(start(blt, requests), prompts, params)]
            alone = [complete(start(blt, 1), [ids], params[:1])[0].ids for ids in prompts]
            count += requests
            differing += sum(one != other for one, other in zip(together, alone, strict=True))
    print(f"default mode: {differing} of {count} requests of {length} bytes differ from their solo run")
    return {"what": "modes", "requests": count, "differing": differing, "rate": differing / count, "threads": threads()}


def auto(
    *,
    model: str = str(PRETRAINED),
    rounds: int = 5,
    requests: Sequence[int] = (1, 8, 32),
    temperature: Sequence[float] = (0.0, 0.8),
    setting: Sequence[str] = SETTINGS,
    length: int = 400,
) -> dict[str, Any]:
    """Settings in turns, over `rounds` sets of held-out prompts, after one set as a warm-up.

    Bytes per second are medians. `over` are medians of the ratios of the first setting's speed to each other one's on
    the same prompts, and `over_best` that to the best setting that gives BLT's bytes. Each engine is kept for all sets,
    as in a server. `length` is the bytes of a request. All engines run the same prompts at the same time, each an
    eighth of a request in its turn while the others rest: the machine's speed changes from second to second. Fewer than
    `_AT_LEAST` requests have several turns a set: what one takes is too short to be told from noise.
    """
    blt = load_checkpoint(model)
    result: dict[str, Any] = {"what": "auto"}
    table = Table("requests, temperature", *setting, f"{setting[0]} over", "the best")
    for batch in requests:
        for heat in temperature:
            engines = {name: start(blt, batch) for name in setting}
            speeds: dict[str, list[float]] = {name: [] for name in setting}
            turns = -(-_AT_LEAST // batch)
            for seed in range(rounds + 1):
                taken = dict.fromkeys(setting, 0.0)
                for turn in range(turns):
                    prompts = held_out_prompts(batch, 256, seed=seed * turns + turn)
                    for name, seconds in _at_once(engines, prompts, heat, length).items():
                        taken[name] += seconds
                for name, seconds in taken.items():
                    speeds[name].append(turns / seconds)
            counted = {name: own[1:] for name, own in speeds.items()}
            medians = {name: round(statistics.median(own)) for name, own in counted.items()}
            first = counted.pop(setting[0])
            over = {name: round(ratio(first, own), 3) for name, own in counted.items()}
            row: dict[str, Any] = {"bytes_per_second": medians, "over": over, "rounds": speeds}
            if lossless := {name: own for name, own in counted.items() if not name.startswith("blt-d-")}:
                row |= {"best": best_of(first, lossless), "over_best": round(over_best(first, lossless), 3)}
            result[f"batch_{batch}_temperature_{heat}"] = row
            words = ", ".join(f"{own:.2f}" for own in over.values())
            table.row(f"{batch}, {heat}", *map(str, medians.values()), words, f"{row.get('over_best', 1):.2f}")
    return result | {"threads": threads()}


def _at_once(engines: dict[str, Engine], prompts: list[list[int]], heat: float, length: int) -> dict[str, float]:
    """Seconds that each engine takes for a byte, over `length` bytes of every prompt."""
    running = {
        name: begin(engine, prompts, endless(decoding(name), len(prompts), heat)) for name, engine in engines.items()
    }
    made, seconds, order = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0.0), list(engines)
    for lap in range(1, _LAPS + 1):
        for name in order:
            engine, due = engines[name], length * len(prompts) * lap / _LAPS - made[name]
            before, clock = engine.stats().bytes_generated, time.perf_counter()
            if due > 0:
                stretch(engine, due)
            seconds[name] += time.perf_counter() - clock
            made[name] += engine.stats().bytes_generated - before
        # Nobody always runs behind the same one.
        order = order[1:] + order[:1]
    for name, requests in running.items():
        end(engines[name], requests)
    return {name: seconds[name] / made[name] for name in engines}


app = command(overhead, modes, auto)

if __name__ == "__main__":
    app()
