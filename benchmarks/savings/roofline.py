"""Where the time of a beat goes, and what is left to gain.

    python -m fastblt.benchmarks.savings.roofline                    the shipped checkpoint at 1 and 32 requests
    python -m fastblt.benchmarks.savings.roofline --model FOLDER --batch 1 --bytes 64

First what the machine can do: memory bandwidth in reading, and the rate of a large product. Then, for every number of
requests, a pass of every module by its rows, at a context of a few hundred bytes; beside it the least time that its
weights and products could take, from those two limits. Weights that stay in the processor's caches can be read faster
than memory.

Then, for every method: microseconds a byte measured, and predicted as the sum of the run's passes on the curve (design
§6.6); and the parts of the former: each module's passes, what they took beyond the curve, and the engine, which is all
else (selection, host, scheduling). The machine's speed may drift, so the methods take turns, and passes before
and after each correct what the curve says for the speed of the moment; a row is of the round in which predicted over
measured time was the median.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.cost_curve import CostCurve, Recorder, machine_limits, module_weights
from fastblt.benchmarks.savings.methods import Batch, batch_settings, chosen_settings, run
from fastblt.kernels.cpu.threads import threads
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import MAX_BLOCK_SIZE, DecodingMethod, DecodingParams, SamplingParams
from fastblt.server.settings import PRETRAINED

_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def floor(weights: int, rows: int, limits: dict[str, float], width: int = 4) -> float:
    """Seconds that no pass of `rows` rows can beat: reading its weights once, or its products."""
    return max(width * weights / limits["read_gb_s"], 2 * weights * rows / limits["gflop_s"]) / 1e9


def curve_table(curve: CostCurve, weights: dict[str, int], limits: dict[str, float]) -> str:
    """Microseconds of a pass by rows, and how many times its floor that is."""
    lines = ["| rows | " + " | ".join(curve.seconds) + " |", "|---" * (1 + len(curve.seconds)) + "|"]
    for at, rows in enumerate(curve.rows):
        if rows not in _SHOWN:
            continue
        cells = [
            f"{1e6 * seconds[at]:.0f} ({seconds[at] / floor(weights[module], rows, limits):.1f}x)"
            for module, seconds in curve.seconds.items()
        ]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts(batch: Batch) -> dict[str, Any]:
    """Microseconds a byte of a run: measured, predicted, and what the difference is made of."""
    scale = 1e6 / batch.bytes
    inside = sum(done.seconds for done in batch.passes)
    return {
        "measured": scale * batch.seconds,
        "predicted": scale * batch.predicted,
        "predicted_over_measured": batch.predicted / batch.seconds,
        "drift": batch.drift,
        "beyond_curve": scale * (inside - batch.predicted),
        "engine": scale * (batch.seconds - inside),
        "modules": {
            module: scale * sum(done.seconds for done in batch.passes if done.module == module)
            for module in batch.drift
        },
        "passes_per_byte": len(batch.passes) / batch.bytes,
        "rows_per_pass": sum(done.rows for done in batch.passes) / len(batch.passes),
    }


def measure(
    model: Blt, prompts: Sequence[list[int]], length: int, batches: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Print and return the tables."""
    settings = {"auto": DecodingParams(DecodingMethod.AUTO)} | chosen_settings(model.config.block_sizes, "headline")
    context = len(prompts[0]) + length // 2
    weights = module_weights(ModuleParameters.of(model), model.lm_head.weight.numel())
    result: dict[str, Any] = {"context": context, "weights": weights, "batches": {}, "curves": {}}
    for size in batches:
        engine = Engine(model, replace(batch_settings(prompts[:size], length), prefix_cache=False))
        if "limits" not in result:
            limits = machine_limits(threads(), model.lm_head.weight.device)
            result |= {"limits": limits, "threads": threads()}
            print("{threads} threads: reads {read_gb_s:.1f} GB/s, {gflop_s:.0f} GFLOP/s".format(**result, **limits))
        curve = CostCurve.measure(engine, min(512, 2 * size * MAX_BLOCK_SIZE), context=context, requests=size)
        result["curves"][size] = {"rows": curve.rows, "seconds": curve.seconds}
        print(f"\nMicroseconds of a pass at position {context} of {size} requests (times the least it could take):\n")
        print(curve_table(curve, weights, limits))
        recorder = Recorder(engine)
        print(f"\n{size} requests, microseconds a byte:\n")
        modules = " | ".join(curve.seconds)
        print(f"| setting | measured | predicted | predicted/measured | {modules} | beyond the curve | engine |")
        print("|---" * (6 + len(curve.seconds)) + "|", flush=True)
        rows = result["batches"][size] = {}
        runs = in_turns(engine, curve, recorder, settings, prompts[:size], length, rounds)
        for name, own in runs.items():
            each = sorted(map(parts, own), key=lambda row: row["predicted_over_measured"])
            row = rows[name] = each[(rounds - 1) // 2]
            row["rounds"] = [one["predicted_over_measured"] for one in each]
            cells = " | ".join(f"{value:.0f}" for value in row["modules"].values())
            print(
                f"| {name} | {row['measured']:.0f} | {row['predicted']:.0f} | {row['predicted_over_measured']:.2f} "
                f"| {cells} | {row['beyond_curve']:.0f} | {row['engine']:.0f} |",
                flush=True,
            )
    return result


def in_turns(
    engine: Engine,
    curve: CostCurve,
    recorder: Recorder,
    settings: dict[str, DecodingParams],
    prompts: Sequence[list[int]],
    length: int,
    rounds: int,
) -> dict[str, list[Batch]]:
    """Runs of the settings by name, a run a round, each with its predicted time at the speed of the moment."""
    runs: dict[str, list[Batch]] = {name: [] for name in settings}
    early = curve.drift(engine)
    for _ in range(rounds):
        for name, decoding in settings.items():
            one = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, decoding=decoding)
            with recorder.on():
                batch = run(engine, prompts, [one] * len(prompts), recorder)
            late = curve.drift(engine)
            batch.predict(curve, early, late)
            early = late
            runs[name].append(batch)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--bytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = held_out_prompts(max(args.batch), args.prompt_length)
    result = measure(load_checkpoint(args.model), prompts, args.bytes, args.batch, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
