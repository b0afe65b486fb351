"""Where the time of a beat goes, and how much could still be gained.

    python -m fastblt.benchmarks.savings.roofline                         the shipped checkpoint at 1 and 32 requests
    python -m fastblt.benchmarks.savings.roofline --batch 1 --length 64   one request

First come the machine's limits: read bandwidth of memory, and the rate of a large matrix product. Then, for every
number of requests, the time of a pass of every module by its rows, at a context of a few hundred bytes, and how many
times the least time by these limits that is. Weights that stay in the processor's caches are read faster than memory.

Then, for every method: microseconds a byte, measured, and predicted as the sum of the run's passes on the curve (design
§6.6) and the engine's time beside them in the round before (before the first comes the last). The measured time has
these parts: the passes of each module; the time of passes beyond the curve; the engine, which is all else (selection,
host, scheduling). Methods take turns, and every method decodes at least `_PROMPTS` prompts in a round: one request of
128 bytes takes 40 ms, in which a shared machine is up to a third faster or slower than in the next. A row shows the
round in which predicted over measured time was the median.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.machine import machine_limits
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.savings.batches import Batch, Course, engine_of, module_seconds, predicted
from fastblt.benchmarks.savings.cost_curve import CostCurve, head_weights, module_weights
from fastblt.benchmarks.settings import chosen
from fastblt.kernels.cpu.threads import threads
from fastblt.models.accounting import ModuleParameters
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.packed import weight_bytes
from fastblt.server.request import MAX_BLOCK_SIZE
from fastblt.server.settings import PRETRAINED

#: Fewest prompts of a round.
_PROMPTS = 8
_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def floor(weights: int, rows: int, limits: dict[str, float], width: float = 4) -> float:
    """The least seconds of a pass of `rows` rows: to read its weights once or to multiply them, whichever is longer."""
    return max(width * weights / limits["read_gb_s"], 2 * weights * rows / limits["gflop_s"]) / 1e9


def show_curve(
    curve: CostCurve, weights: dict[str, int], limits: dict[str, float], widths: tuple[float, float] = (4, 4)
) -> None:
    """Print microseconds of a pass by rows, and that time divided by its floor. `widths` are bytes a weight, of the
    entropy model and of the others."""
    table = Table("rows", *curve.seconds)
    for at, rows in enumerate(curve.rows):
        if rows in _SHOWN:
            floors = {name: floor(weights[name], rows, limits, widths[name != "entropies"]) for name in curve.seconds}
            cells = [f"{1e6 * own[at]:.0f} ({own[at] / floors[name]:.1f}x)" for name, own in curve.seconds.items()]
            table.row(str(rows), *cells)


def parts(batch: Batch, other: Batch) -> dict[str, Any]:
    """Microseconds a byte of a run: measured, predicted with the engine's time of another one, and the parts of the
    measured time."""
    scale = 1e6 / batch.bytes
    inside, expected = sum(done.seconds for done in batch.passes), predicted(batch, other)
    return {
        "measured": scale * batch.seconds,
        "predicted": scale * expected,
        "predicted_over_measured": expected / batch.seconds,
        "drift": batch.drift,
        "beyond_curve": scale * (inside - batch.predicted),
        "engine": scale * (batch.seconds - inside),
        "modules": {module: scale * seconds for module, seconds in module_seconds(batch).items()},
        "passes_per_byte": len(batch.passes) / batch.bytes,
        "rows_per_pass": sum(done.rows for done in batch.passes) / len(batch.passes),
    }


def measure(
    *,
    model: str = str(PRETRAINED),
    batch: Sequence[int] = (1, 32),
    input_len: int = 256,
    length: int = 128,
    rounds: int = 5,
    settings: str = "headline",
) -> dict[str, Any]:
    """Print and return the tables, for each number of requests in `batch`."""
    blt = load_checkpoint(model)
    prompts = held_out_prompts(max(*batch, _PROMPTS), input_len)
    names = ["auto", *chosen(blt.config.block_sizes, settings)]
    context = len(prompts[0]) + length // 2
    weights = module_weights(ModuleParameters.of(blt.config), head_weights(blt.config))
    engine_of(blt, prompts[:1], length)  # Sets the threads that a model of this size suits.
    limits = machine_limits(threads(), str(blt.device))
    print(f"{threads()} threads: reads {limits['read_gb_s']:.1f} GB/s, {limits['gflop_s']:.0f} GFLOP/s")
    result: dict[str, Any] = {"context": context, "weights": weights, "limits": limits, "threads": threads()}
    result |= {"batches": {}, "curves": {}}
    for size in batch:
        engine = engine_of(blt, prompts[:size], length)
        curve = CostCurve.measure(engine, min(512, 2 * size * MAX_BLOCK_SIZE), context=context, requests=size)
        result["curves"][size] = {
            "rows": curve.rows,
            "seconds": curve.seconds,
            "inside": curve.inside,
        }
        print(f"\nMicroseconds of a pass at position {context} of {size} requests (times the least it could take):\n")
        show_curve(curve, weights, limits, (weight_bytes(blt.patcher), weight_bytes(blt)))
        course = Course(engine, curve)
        some = prompts[: size * -(-_PROMPTS // size)]
        runs = [course.round(names, some, length, together=size) for _ in range(rounds)]
        print(f"\n{size} requests, microseconds a byte:\n")
        columns = ("setting", "measured", "predicted", "predicted/measured")
        table = Table(*columns, *curve.seconds, "beyond the curve", "engine")
        rows = result["batches"][size] = {}
        for name in names:
            each = sorted(
                (parts(run[name], runs[at - 1][name]) for at, run in enumerate(runs)),
                key=lambda row: row["predicted_over_measured"],
            )
            row = rows[name] = each[(rounds - 1) // 2]
            row["rounds"] = [one["predicted_over_measured"] for one in each]
            figures = (row["measured"], row["predicted"], row["predicted_over_measured"])
            cells = [f"{value:.0f}" for value in (*row["modules"].values(), row["beyond_curve"], row["engine"])]
            table.row(name, f"{figures[0]:.0f}", f"{figures[1]:.0f}", f"{figures[2]:.2f}", *cells)
    return result


app = command(measure)

if __name__ == "__main__":
    app()
