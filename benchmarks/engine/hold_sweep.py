"""What `--max-hold-ms` buys and costs: bytes per second and latency, where weights dominate.

    python -m fastblt.benchmarks.engine.hold_sweep  the 1B shape; BLT-S k = 8 and one-step BLT-DV-8, 8 and 32 requests
    python -m fastblt.benchmarks.engine.hold_sweep --shape none  the shipped checkpoint as it is

A request that needs the global transformer is held while others can still go on, at most so long: 0 never holds, `none`
is the default, which the engine ends after 64 passes. Requests start one pass after another and all produce as many
bytes; the settings take turns. Gaps are between the pieces of one request's text, `in all` from its submission to its
end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastblt.benchmarks.engine.holding import METHODS
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.machine import measured_with
from fastblt.kernels.cpu.threads import threads
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import paper_shape, widen
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingParams, FinishReason, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

#: Longest waits in milliseconds; None: as many passes as a beat may have.
HOLDS: tuple[float | None, ...] = (0.0, 300.0, None)


def run(
    model: Blt, prompts: Sequence[list[int]], decoding: DecodingParams, hold: float | None, length: int
) -> dict[str, float]:
    """Figures of one run of all prompts to their ends."""
    settings = EngineSettings(max_running=len(prompts), max_hold_ms=hold, max_model_len=2048, prefix_cache=False)
    engine = Engine(model, settings)
    params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, decoding=decoding)
    waiting = list(enumerate(prompts))
    submitted: dict[str, float] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    whole: list[float] = []
    began = time.perf_counter()
    while waiting or engine.has_work():
        if waiting:
            index, ids = waiting.pop(0)
            submitted[str(index)] = time.perf_counter()
            engine.add(Request(str(index), ids, params, time.monotonic()))
        deltas, now = engine.step(), time.perf_counter()
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise RuntimeError(delta.error)
            if delta.request_id in last:
                gaps.append(now - last[delta.request_id])
            last[delta.request_id] = now
            if delta.finish_reason is not None:
                whole.append(now - submitted[delta.request_id])
    seconds = time.perf_counter() - began
    stats = engine.stats()
    return {
        "bytes_per_second": stats.bytes_generated / seconds,
        "global_passes_per_byte": stats.ledger.global_ / stats.bytes_generated,
        "p50_gap_ms": 1e3 * float(np.percentile(gaps, 50)),
        "p99_gap_ms": 1e3 * float(np.percentile(gaps, 99)),
        "p99_in_all_ms": 1e3 * float(np.percentile(whole, 99)),
    }


def measure(
    model: Blt, prompts: Sequence[list[int]], counts: Sequence[int], length: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians over the rounds, printed as a table."""
    rows: list[dict[str, Any]] = []
    print("| method | requests | hold, ms | bytes/s | global/byte | gap p50, ms | gap p99 | in all p99, s |")
    print("|" + "---|" * 8, flush=True)
    for name in ("blt-s k8", "blt-dv-8 1step"):
        for count in counts:
            runs: dict[float | None, list[dict[str, float]]] = {hold: [] for hold in HOLDS}
            for _ in range(rounds):
                for hold, own in runs.items():
                    own.append(run(model, prompts[:count], METHODS[name], hold, length))
            for hold, own in runs.items():
                row = {key: float(np.median([one[key] for one in own])) for key in own[0]}
                rows.append({"method": name, "requests": count, "max_hold_ms": hold, **row})
                print(
                    f"| {name} | {count} | {'none' if hold is None else f'{hold:.0f}'} | {row['bytes_per_second']:.1f} "
                    f"| {row['global_passes_per_byte']:.4f} | {row['p50_gap_ms']:.0f} | {row['p99_gap_ms']:.0f} "
                    f"| {row['p99_in_all_ms'] / 1e3:.1f} |",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--shape", choices=("1b", "3b", "none"), default="1b")
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--bytes", type=int, default=32, help="of each request")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_checkpoint(args.model)
    if args.shape != "none":
        model = widen(model, paper_shape(args.shape))
    rows = measure(model, held_out_prompts(max(args.requests), 64), args.requests, args.bytes, args.rounds)
    if args.json:
        result = {**measured_with(args.model), "shape": args.shape, "bytes": args.bytes, "threads": threads()}
        args.json.write_text(json.dumps(result | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
