"""What narrow weights save where weights come from memory: bytes a second by how they are kept, in turns.

    python -m fastblt.benchmarks.savings.narrow                     the 1B shape at batch 1 and 8
    python -m fastblt.benchmarks.savings.narrow --shape 7b --weights bfloat16 --weights int8

The shipped checkpoint is widened to the shape in memory, once for every kind of weights: 11 GB for 1b in float32,
bfloat16 and int8. Figures are of the time after the prompts' pass: bytes a second, as medians over rounds;
the ratio to the first kind's, as the median of ratios within a round; predicted over measured time; and the share of
the memory's read bandwidth that reading weights took. `equal`: the share of bytes that are those of the first kind's
BLT.

Predicted time is that of the run's passes by a cost curve of each engine, with keys and values as in the middle of a
run, and the engine's own time: a round before all others, which counts for nothing else, says how long that is for each
decoder pass of a method.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.machine import machine_limits, measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.savings.batches import Batch, Course, engine_of, predicted
from fastblt.benchmarks.savings.cost_curve import CostCurve, head_weights, weights_read
from fastblt.benchmarks.text_statistics import equal_positions
from fastblt.kernels.cpu.threads import threads as threads_in_use
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.packed import weight_bytes
from fastblt.models.widen import paper_shape, widen
from fastblt.server.settings import PRETRAINED

#: Most rows of a pass that the cost curves have.
_ROWS = 64


def gigabytes(batch: Batch, model: Blt) -> float:
    """What a batch's passes read."""
    parameters, head = ModuleParameters.of(model.config), head_weights(model.config)
    return weights_read(batch.passes, parameters, head, weight_bytes(model), weight_bytes(model.patcher))


def row_of(
    own: list[Batch], early: Batch, first: list[Batch], plain: list[Batch], model: Blt, read_gb_s: float
) -> dict[str, Any]:
    """A kind's figures by a setting. `early` is its batch before all rounds; `first` are the first kind's batches of
    the same rounds, `plain` those of BLT."""
    rates = [batch.bytes / batch.seconds for batch in own]
    before = [batch.bytes / batch.seconds for batch in first]
    pairs = [
        (one.ids, other.ids)
        for batch, base in zip(own, plain, strict=True)
        for one, other in zip(batch.outputs, base.outputs, strict=True)
    ]
    return {
        "bytes_per_second": statistics.median(rates),
        "ratio": statistics.median(one / other for one, other in zip(rates, before, strict=True)),
        "predicted_over_measured": statistics.median(predicted(batch, early) / batch.seconds for batch in own),
        "read_share": statistics.median(gigabytes(batch, model) / batch.seconds / read_gb_s for batch in own),
        "equal": sum(equal_positions(*pair) for pair in pairs) / sum(len(ids) for ids, _ in pairs),
    }


def measure(
    *,
    model: str = str(PRETRAINED),
    shape: str = "1b",
    weights: Sequence[str] = ("float32", "bfloat16", "int8"),
    batch: Sequence[int] = (1, 8),
    setting: Sequence[str] = ("blt", "blt-s k16", "blt-dsv-4 k16"),
    input_len: int = 64,
    length: int = 48,
    rounds: int = 3,
    budget: float = 0.1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Print and return the table, for each number of requests in `batch`. `setting` begins with blt."""
    small = load_checkpoint(model)
    models = {kind: widen(small, paper_shape(shape), kind) for kind in weights}
    result: dict[str, Any] = {**measured_with(model), "shape": shape, "batches": {}}
    for size in batch:
        prompts = held_out_prompts(size, input_len)
        courses = {}
        for kind, wide in models.items():
            engine = engine_of(wide, prompts, length, threads)
            middle = input_len + length // 2
            courses[kind] = Course(engine, CostCurve.measure(engine, _ROWS, budget, context=middle, requests=size))
        limits = machine_limits(threads_in_use())
        result |= {"threads": threads_in_use(), "limits": limits}
        early = {kind: course.round(setting, prompts, length) for kind, course in courses.items()}
        runs: dict[str, list[dict[str, Batch]]] = {kind: [] for kind in models}
        for _ in range(rounds):
            for kind, course in courses.items():
                runs[kind].append(course.round(setting, prompts, length))
        print(f"\n{shape}, {size} at once, {threads_in_use()} threads, memory reads {limits['read_gb_s']:.1f} GB/s\n")
        base = weights[0]
        table = Table(
            "weights", "setting", "bytes/s", f"over {base}", "predicted/measured", "of bandwidth %", "equal %"
        )
        rows: dict[str, Any] = {}
        result["batches"][str(size)] = rows
        plain = [one[setting[0]] for one in runs[base]]
        for kind, own in runs.items():
            rows[kind] = {}
            for name in setting:
                taken, first = [one[name] for one in own], [one[name] for one in runs[base]]
                row = row_of(taken, early[kind][name], first, plain, models[kind], limits["read_gb_s"])
                rows[kind][name] = row
                figures = (f"{row['bytes_per_second']:.2f}", f"{row['ratio']:.2f}")
                shares = (f"{row['predicted_over_measured']:.2f}", f"{100 * row['read_share']:.0f}")
                table.row(kind, name, *figures, *shares, f"{100 * row['equal']:.1f}")
    return result


app = command(measure)

if __name__ == "__main__":
    app()
