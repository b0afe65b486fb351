"""The savings of each decoding method on held-out prompts: a row for each of the paper's settings, with seconds.

    fastblt bench methods                                 the shipped checkpoint at batch 1, 8 and 32
    fastblt bench methods --shape 1b --settings headline  the same function at the paper's 1B shape

Passes are counted by each request's own ledger, with those of the prompt. Both GB figures are computed from them and
shown as savings over BLT. BLT-S and BLT-DV give BLT's bytes, BLT-D does not: `leading` is the share of its bytes before
the first that differs, `equal` the share of equal positions. `loops` and `distinct` show how much the text repeats
itself, which inflates all other figures. The second table compares drafts on the newest closed latent (one upstream
pass a round) with the paper's, on the open patch closed by force (two).

For the time after the prompts' pass there are also savings over BLT in weights that the batch's passes read, in the
time predicted by a cost curve, and in measured time. The gap between weights saved and time saved has three parts, in
percentage points: *row curve*, since a pass of many rows takes longer than one of a few; *attention*, with cache, the
time of passes beyond the curve; *engine*, all else: selection, host, scheduling. "bytes/s" is by wall clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastblt.benchmarks.harness import Output
from fastblt.benchmarks.machine import machine_limits
from fastblt.benchmarks.markdown import Table, percent, table
from fastblt.benchmarks.savings.batches import Batch, Course, engine_of, module_seconds
from fastblt.benchmarks.savings.cost_curve import CostCurve, head_weights, least_seconds, module_weights, weights_read
from fastblt.benchmarks.settings import papers
from fastblt.benchmarks.text_statistics import distinct4, equal_positions, leading_equal, loops
from fastblt.kernels.cpu.threads import threads as threads_in_use
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.packed import weight_bytes
from fastblt.server.request import MAX_BLOCK_SIZE, Ledger

#: A setting is no headline if at least this share of its texts end in a loop.
MOST_LOOPS = 0.10


def figures(outputs: Sequence[Output], plain: Sequence[Output]) -> dict[str, Any]:
    """Figures of a setting's requests, without times. `plain` are BLT's outputs for the same prompts."""
    texts = [output.ids for output in outputs]
    pairs = list(zip(texts, (output.ids for output in plain), strict=True))
    total, before = _total(outputs), _total(plain)
    # With drafts, a request's first byte comes from the prompt's pass and not from a round.
    in_rounds = total.bytes - (len(outputs) if total.drafted else 0)
    return {
        "acceptance": total.accepted / total.drafted if total.drafted else None,
        "filter": total.passed / total.proposed if total.proposed else None,
        "bytes_a_round": in_rounds / total.rounds if total.rounds else None,
        "decoder_per_byte": statistics.mean(o.ledger.decoder / len(o.ids) for o in outputs),
        "upstream_per_byte": statistics.mean(o.ledger.global_ / len(o.ids) for o in outputs),
        "bytes_per_patch": total.bytes_per_patch,
        "gb_paper_saved": 1 - total.gb_paper / before.gb_paper,
        "gb_saved": 1 - total.gb / before.gb,
        "leading_equal": statistics.mean(leading_equal(*pair) / len(pair[0]) for pair in pairs),
        "equal_positions": statistics.mean(equal_positions(*pair) / len(pair[0]) for pair in pairs),
        "loops": statistics.mean(map(loops, texts)),
        "distinct4": statistics.mean(map(distinct4, texts)),
    }


@dataclass(frozen=True)
class Cost:
    """A cost curve, the weights of a model, and the machine's limits."""

    curve: CostCurve
    parameters: ModuleParameters
    head: int
    bytes_per_weight: float
    patcher_bytes: float
    limits: Mapping[str, float]

    def gigabytes(self, batch: Batch) -> float:
        return weights_read(batch.passes, self.parameters, self.head, self.bytes_per_weight, self.patcher_bytes)

    def least_seconds(self, batch: Batch) -> float:
        sizes = (self.bytes_per_weight, self.patcher_bytes)
        return least_seconds(batch.passes, self.parameters, self.head, *sizes, self.limits)


def times(batch: Batch, plain: Batch, cost: Cost) -> dict[str, Any]:
    """Times of a batch, and its savings per byte over BLT's batch `plain`."""
    bytes_ratio = plain.bytes / batch.bytes

    def saved(value: float, base: float) -> float:
        return 1 - bytes_ratio * value / base

    inside, inside_before = (sum(done.seconds for done in b.passes) for b in (batch, plain))
    weights = saved(cost.gigabytes(batch), cost.gigabytes(plain))
    by_curve, by_passes = saved(batch.predicted, plain.predicted), saved(inside, inside_before)
    measured = saved(batch.seconds, plain.seconds)
    shares = [a / d for d, a in zip(batch.drafted, batch.accepted, strict=True) if d]
    return {
        "bytes_per_second": batch.bytes / batch.seconds,
        "seconds": batch.seconds,
        "least_seconds": cost.least_seconds(batch),
        "bytes": batch.bytes,
        "weights_saved": weights,
        "predicted_saved": by_curve,
        "time_saved": measured,
        "gap": {
            "row_curve": weights - by_curve,
            "attention_and_cache": by_curve - by_passes,
            "engine": by_passes - measured,
        },
        "predicted_seconds": batch.predicted,
        "drift": batch.drift,
        "attention_and_cache_seconds": inside - batch.predicted,
        "engine_seconds": batch.seconds - inside,
        "predicted_over_measured": batch.predicted / batch.seconds,
        "module_seconds": module_seconds(batch),
        **({"acceptance_by_position": shares} if shares else {}),
    }


def latent_question(outputs: dict[str, list[Output]]) -> dict[str, Any]:
    """Acceptance of drafts on the newest closed latent and on the paper's; the mean difference is paired by prompt."""
    rows = {}
    for name, own in outputs.items():
        if (forced := outputs.get(f"{name} paper")) is None:
            continue
        closed, paper = ([o.ledger.accepted / max(1, o.ledger.drafted) for o in those] for those in (own, forced))
        differences = [one - other for one, other in zip(closed, paper, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        rows[name] = {
            "closed": statistics.mean(closed),
            "forced": statistics.mean(paper),
            "difference": statistics.mean(differences),
            "standard_error": spread / len(differences) ** 0.5,
        }
    return rows


def measure(
    model: Blt,
    prompts: Sequence[list[int]],
    length: int,
    temperature: float = 0.0,
    settings: Sequence[str] | None = None,
    *,
    batch: int | None = None,
    rounds: int = 1,
    threads: int | None = None,
    budget: float = 0.5,
) -> dict[str, Any]:
    """Run every setting over the prompts, `batch` requests at a time (all by default), then print a row for each.

    If the prompts are a single batch, there should be several `rounds`. Each round measures its own cost curve, with
    `budget` seconds for each point. A row shows the round in which the setting's time relative to BLT's was the median.
    """
    settings = settings or papers(model.config.block_sizes)
    size = batch or len(prompts)
    engine = engine_of(model, prompts[:size], length, threads)
    head, parameters = head_weights(model.config), ModuleParameters.of(model.config)
    curves: list[CostCurve] = []
    runs: dict[str, list[Batch]] = {name: [] for name in settings}
    # Nothing is faster than a limit, so the largest rates found before, between and behind the rounds count.
    find_limits = partial(machine_limits, threads_in_use(), str(model.device))
    found = [find_limits()]
    for _ in range(rounds):
        curve = CostCurve.measure(engine, min(512, 2 * size * MAX_BLOCK_SIZE), budget, requests=size)
        curves.append(curve)
        for name, one in Course(engine, curve).round(settings, prompts, length, temperature, size).items():
            runs[name].append(one)
        found.append(find_limits())
    limits = {name: max(one[name] for one in found) for name in found[0]}
    sizes = (weight_bytes(model), weight_bytes(model.patcher))
    costs = [Cost(curve, parameters, head, *sizes, limits) for curve in curves]
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, list[Output]] = {}
    shown = Table(*_COLUMNS)
    for name, own in runs.items():
        at = _median_round(own, runs["blt"])
        plain, outputs[name] = runs["blt"][at], own[at].outputs
        rows[name] = figures(own[at].outputs, plain.outputs) | times(own[at], plain, costs[at])
        shown.row(name, *_cells(rows[name]))
    latents = latent_question(outputs)
    if latents:
        print("\n" + table(_LATENT_COLUMNS, [_latent_cells(name, row) for name, row in latents.items()]))
    return {
        "settings": rows,
        "draft_latent": latents,
        "curve": {
            "rows": costs[0].curve.rows,
            "seconds": costs[0].curve.seconds,
            "weights": module_weights(parameters, head),
            "limits": limits,
        },
        "threads": threads_in_use(),
    }


def _median_round(runs: Sequence[Batch], plain: Sequence[Batch]) -> int:
    """The round in which the time relative to BLT's of that round is the median. For BLT itself, its time decides."""
    order = [(one.seconds / base.seconds, one.seconds) for one, base in zip(runs, plain, strict=True)]
    return order.index(statistics.median_low(order))


def _total(outputs: Sequence[Output]) -> Ledger:
    total = Ledger()
    for output in outputs:
        total.add(output.ledger)
    return total


_COLUMNS = (
    *("setting", "acc %", "bytes/round", "dec/byte", "up/byte", "bytes/patch", "GB paper saved %", "GB saved %"),
    *("weights saved %", "predicted saved %", "time saved %", "row curve", "attention", "engine"),
    *("predicted/measured", "leading %", "equal %", "loops %", "distinct", "bytes/s"),
)
_LATENT_COLUMNS = ("draft", "closed latent %", "forced latent %", "difference, points")


def _cells(row: dict[str, Any]) -> list[str]:
    saved = ("gb_paper_saved", "gb_saved", "weights_saved", "predicted_saved", "time_saved")
    return [
        _percent(row["acceptance"]),
        _or_dash(row["bytes_a_round"]),
        f"{row['decoder_per_byte']:.3f}",
        f"{row['upstream_per_byte']:.3f}",
        _or_dash(row["bytes_per_patch"]),
        *(_percent(row[key]) for key in saved),
        *(_percent(row["gap"][key]) for key in ("row_curve", "attention_and_cache", "engine")),
        f"{row['predicted_over_measured']:.2f}",
        *(_percent(row[key]) for key in ("leading_equal", "equal_positions", "loops")),
        f"{row['distinct4']:.3f}",
        f"{row['bytes_per_second']:.1f}",
    ]


def _latent_cells(name: str, row: dict[str, float]) -> list[str]:
    error = f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}"
    return [name, _percent(row["closed"]), _percent(row["forced"]), error]


def _percent(share: float | None) -> str:
    return percent(share, 1) or "-"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
