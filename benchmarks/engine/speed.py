"""The engine against a bare loop, and its cost against the length of the context.

    python -m fastblt.benchmarks.engine.speed overhead  one request and 32, engine and bare loop in alternation
    python -m fastblt.benchmarks.engine.speed context
        time per byte at 1,000, 4,000 and 16,000 bytes of context, batch 1 and 16
    python -m fastblt.benchmarks.engine.speed modes  how often the default mode's bytes differ from a request's solo run
    python -m fastblt.benchmarks.engine.speed auto
        bytes per second of BLT and of the drafting methods at 1, 8 and 32 requests
    python -m fastblt.benchmarks.engine.speed threads   BLT at 1, 8 and 32 requests with one thread and with two
    python -m fastblt.benchmarks.engine.speed fused     layers in C against the same layers in torch, 1 and 32 requests
    python -m fastblt.benchmarks.engine.speed prefix    time to the first byte after a prefix hit, and without

Each prints what it measured as ratios of one run, and as JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fastblt.server.engine.engine
from fastblt.benchmarks.engine.bare_loop import BareLoop
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.prompts import prompt_ids
from fastblt.benchmarks.savings.methods import diffusion, speculation
from fastblt.kernels.cpu.threads import threads as threads_in_use
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

BLT = DecodingParams(DecodingMethod.BLT)


def start(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[str]:
    """Submit prompts and run until every one has given its first byte; their ids."""
    names = [f"r{index}-{time.monotonic_ns()}" for index in range(len(prompts))]
    for name, ids in zip(names, prompts, strict=True):
        engine.add(Request(name, ids, params, time.monotonic()))
    begun: set[str] = set()
    while len(begun) < len(prompts):
        begun.update(delta.request_id for delta in engine.step())
    return names


def bytes_per_second(engine: Engine, count: int) -> float:
    """Run until `count` more bytes are there."""
    begun, clock = engine.stats().bytes_generated, time.perf_counter()
    while (made := engine.stats().bytes_generated - begun) < count:
        engine.step()
    return made / (time.perf_counter() - clock)


def drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def overhead(model: str, rounds: int) -> dict[str, Any]:
    """Engine and bare loop in alternating stretches of one run; medians of their ratios."""
    blt = load_checkpoint(model)
    result: dict[str, Any] = {}
    for batch, stretch in ((1, 100), (32, 40)):
        prompts = prompt_ids(batch, 300)
        engine = Engine(blt, EngineSettings(model=model, max_running=batch))
        loop = BareLoop(blt, prompts, 300 + (rounds + 1) * stretch + 8)
        start(engine, prompts, SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True, decoding=BLT))
        pairs = []
        for _ in range(rounds):
            served = bytes_per_second(engine, batch * stretch)
            clock = time.perf_counter()
            for _ in range(stretch):
                loop.step()
            pairs.append((served, batch * stretch / (time.perf_counter() - clock)))
        ratio = statistics.median(served / bare for served, bare in pairs)
        result[f"batch_{batch}"] = {
            "engine_bytes_per_second": statistics.median(served for served, _ in pairs),
            "bare_bytes_per_second": statistics.median(bare for _, bare in pairs),
            "engine_over_bare": ratio,
        }
        print(f"batch {batch:2}: engine {pairs[-1][0]:.0f} B/s, bare loop {pairs[-1][1]:.0f} B/s, ratio {ratio:.2f}")
    one, many = (result[f"batch_{b}"]["engine_bytes_per_second"] for b in (1, 32))
    result["time_per_byte_over_bare_batch_1"] = 1 / result["batch_1"]["engine_over_bare"]
    result["batch_32_over_batch_1"] = many / one
    print(f"one request: {result['time_per_byte_over_bare_batch_1']:.2f} times the bare loop's time per byte")
    print(f"32 requests: {result['batch_32_over_batch_1']:.2f} times the bytes per second of one")
    return result


def context(model: str, rounds: int) -> dict[str, Any]:
    """Time per byte at growing contexts, ending with the share of the global transformer."""
    lengths = (1000, 4000, 16000)
    blt = load_checkpoint(model)
    result: dict[str, Any] = {}
    for batch in (1, 16):
        engines = {}
        for length in lengths:
            engine = Engine(blt, EngineSettings(model=model, max_running=batch, max_model_len=length + 4096))
            params = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True, decoding=BLT)
            start(engine, prompt_ids(batch, length), params)
            engines[length] = engine
        times: dict[int, list[float]] = {length: [] for length in lengths}
        for _ in range(rounds):
            for length, engine in engines.items():
                times[length].append(1 / bytes_per_second(engine, 64 * batch))
        base = statistics.median(times[1000])
        for length in lengths:
            ratios = [t / b for t, b in zip(times[length], times[1000], strict=True)]
            share = upstream_share(engines[length], 64 * batch)
            result[f"batch_{batch}_context_{length}"] = {
                "seconds_per_byte": statistics.median(times[length]),
                "over_1000": statistics.median(ratios),
                "global_share": share,
            }
            print(
                f"batch {batch:2}, context {length:5}: {statistics.median(times[length]) * 1e3:.3f} ms a byte, "
                f"{statistics.median(ratios):.2f} times that at 1,000 ({base * 1e3:.3f}), global share {share:.0%}"
            )
    return result


def upstream_share(engine: Engine, count: int) -> float:
    """Share of the time that goes to pooling and the global transformer."""
    runner = engine._runner
    real, spent = runner.upstream, 0.0

    def timed(sequences: list) -> None:  # type: ignore[type-arg]
        nonlocal spent
        clock = time.perf_counter()
        real(sequences)
        spent += time.perf_counter() - clock

    runner.upstream = timed  # type: ignore[method-assign]
    clock = time.perf_counter()
    bytes_per_second(engine, count)
    runner.upstream = real  # type: ignore[method-assign]
    return spent / (time.perf_counter() - clock)


def modes(model: str, rounds: int) -> dict[str, Any]:
    """Default mode: bytes of batched runs that differ from the same request alone."""
    blt = load_checkpoint(model)
    requests = differing = 0
    for round_ in range(rounds):
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=256, temperature=temperature, seed=round_, ignore_eos=True, decoding=BLT)
            prompts = prompt_ids(32, 200 + 37 * round_)
            together = outputs(blt, model, prompts, params, 32)
            alone = [outputs(blt, model, [ids], params, 1)[0] for ids in prompts]
            requests += len(prompts)
            differing += sum(a != b for a, b in zip(together, alone, strict=True))
    print(f"default mode: {differing} of {requests} requests of 256 bytes differ from their solo run")
    return {"requests": requests, "differing": differing, "rate": differing / requests}


def auto(model: str, rounds: int) -> dict[str, Any]:
    """`auto` against fixed settings in turns, over `rounds` sets of held-out prompts after one to warm up.

    Bytes per second are medians; so are `over`, those of `auto` over each setting's of the same prompts. The best fixed
    setting is the one that `auto` comes out lowest against. Engines outlive their prompts, as a server's does.
    """
    candidates = {
        "auto": DecodingParams(DecodingMethod.AUTO),
        "blt": BLT,
        **{f"blt-s k{k}": speculation(k) for k in (4, 8, 16, 32)},
        **{f"blt-dv-{b} 1step": diffusion(DecodingMethod.BLT_DV, b, "1step") for b in (4, 8)},
        "blt-d-8 a0.7": diffusion(DecodingMethod.BLT_D, 8, "a0.7"),
    }
    blt = load_checkpoint(model)
    result: dict[str, Any] = {}
    for batch in (1, 8, 32):
        for temperature in (0.0, 0.8):
            engines = {name: Engine(blt, EngineSettings(model=model, max_running=batch)) for name in candidates}
            measured: dict[str, list[float]] = {name: [] for name in candidates}
            for seed in range(rounds + 1):
                prompts = held_out_prompts(batch, 256, seed=seed)
                for name, decoding in candidates.items():
                    params = SamplingParams(
                        max_tokens=10_000, temperature=temperature, seed=3, ignore_eos=True, decoding=decoding
                    )
                    ids = start(engines[name], prompts, params)
                    measured[name].append(bytes_per_second(engines[name], batch * {1: 400, 8: 200, 32: 80}[batch]))
                    for request_id in ids:
                        engines[name].abort(request_id)
                    drain(engines[name])
            over = {
                name: round(statistics.median(a / b for a, b in zip(measured["auto"][1:], own[1:], strict=True)), 3)
                for name, own in measured.items()
                if name != "auto"
            }
            speeds = {name: round(statistics.median(own[1:])) for name, own in measured.items()}
            best = min(over, key=lambda name: over[name])
            print(f"{batch} requests, temperature {temperature}: {speeds}")
            print(f"    auto over blt {over['blt']:.2f}, over the best fixed setting ({best}) {over[best]:.2f}; {over}")
            result[f"batch_{batch}_temperature_{temperature}"] = {"bytes_per_second": speeds, "over": over}
    return result


def threads(model: str, rounds: int) -> dict[str, Any]:
    """What the default number of threads rests on: median bytes per second of plain BLT, one and two in turns."""
    blt = load_checkpoint(model)
    result: dict[str, Any] = {}
    params = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True, decoding=BLT)
    for batch in (1, 8, 32):
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for count, own in speeds.items():
                engine = Engine(blt, EngineSettings(model=model, max_running=batch, threads=count))
                start(engine, prompt_ids(batch, 300), params)
                own.append(bytes_per_second(engine, 60 * batch))
        for count, own in speeds.items():
            speed = result[f"threads_{count}_batch_{batch}"] = statistics.median(own)
            print(f"{count} threads, {batch} requests: {speed:.0f} B/s")
    return result


def fused(model: str, rounds: int) -> dict[str, Any]:
    """Bytes per second with fused layers over those without, in alternating stretches; medians of the ratios."""
    kinds = {"blt": BLT, "blt-s k8": speculation(8), "blt-dv-8 1step": diffusion(DecodingMethod.BLT_DV, 8, "1step")}
    result: dict[str, Any] = {}
    for batch in (1, 32):
        prompts = held_out_prompts(batch, 256)
        for name, decoding in kinds.items():
            params = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True, decoding=decoding)
            engines = []
            for fuse in (fastblt.server.engine.engine.fuse, lambda blt: False):
                with patch.object(fastblt.server.engine.engine, "fuse", fuse):
                    engines.append(Engine(load_checkpoint(model), EngineSettings(model=model, max_running=batch)))
                start(engines[-1], prompts, params)
            speeds = [[bytes_per_second(engine, 50 * batch) for engine in engines] for _ in range(rounds + 1)][1:]
            ratio = statistics.median(one / other for one, other in speeds)
            print(f"{batch} requests, {name}: {ratio:.2f}x, {statistics.median(s[0] for s in speeds):.0f} B/s")
            result[f"batch_{batch}_{name}"] = ratio
    return result


def prefix(model: str, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first byte: after 4,000 bytes that were seen before and 50 new ones, and after 300 new ones.

    Three kinds of prompt alternate in one engine, and no two prompts are the same.
    """
    engine = Engine(load_checkpoint(model), EngineSettings(model=model))
    short = iter(prompt_ids(rounds + 1, 300))
    long = iter(prompt_ids(rounds + 1, 4050))
    shared, *endings = prompt_ids(2 * (rounds + 1), 4051)
    kinds = {
        "new_300": lambda: next(short),
        "hit_4000": lambda: shared[:4001] + endings.pop()[-50:],
        "new_4050": lambda: next(long),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind, prompt in kinds.items():
            times[kind].append(first_byte(engine, prompt()))
    hits, queries = engine.stats().prefix_hits, engine.stats().prefix_queries
    # The first round warms up, and computes what the others hit.
    result: dict[str, Any] = {f"{kind}_ms": 1e3 * statistics.median(t[1:]) for kind, t in times.items()}
    ratios = [hit / new for hit, new in zip(times["hit_4000"][1:], times["new_300"][1:], strict=True)]
    result |= {"hit_over_new_300": statistics.median(ratios), "hit_bytes": hits, "looked_up_bytes": queries}
    print(", ".join(f"{name} {value:.2f}" for name, value in result.items()))
    return result


def first_byte(engine: Engine, ids: list[int]) -> float:
    """Seconds from a request's submission to its first byte; nothing else runs."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    clock = time.perf_counter()
    engine.add(Request(f"r-{time.monotonic_ns()}", ids, params, time.monotonic()))
    while not any(delta.ids for delta in engine.step()):
        pass
    took = time.perf_counter() - clock
    drain(engine)
    return took


def outputs(blt: Any, model: str, prompts: list[list[int]], params: SamplingParams, running: int) -> list[list[int]]:
    engine = Engine(blt, EngineSettings(model=model, max_running=running))
    made: dict[str, list[int]] = {}
    for index, ids in enumerate(prompts):
        made[str(index)] = []
        engine.add(Request(str(index), ids, replace(params), time.monotonic()))
    while engine.has_work():
        for delta in engine.step():
            made[delta.request_id] += delta.ids
    return list(made.values())


MEASURES = {
    "overhead": overhead,
    "context": context,
    "modes": modes,
    "auto": auto,
    "threads": threads,
    "fused": fused,
    "prefix": prefix,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {"what": args.what, **MEASURES[args.what](args.model, args.rounds), "threads": threads_in_use()}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
