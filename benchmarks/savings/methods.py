"""What each decoding method saves, over held-out prompts: the paper's settings, one a row, with seconds beside them.

    fastblt bench methods                                 the shipped checkpoint at batch 1, 8 and 32
    fastblt bench methods --shape 1b --settings headline  the same function at the paper's 1B shape
    python -m fastblt.benchmarks.savings.methods --temperature 0.8
        24 prompts of 256 bytes, 256 bytes each, in one batch

Passes are those of each request's own ledger, the prompt's included, and both GB figures are estimates made of them, as
saved against BLT. "bytes/s" is wall clock, the prompts' pass left out. BLT-S and BLT-DV give BLT's bytes, BLT-D does
not: `leading` is the share of its bytes before the first that differs, `equal` that of equal positions. `loops` and
`distinct` tell how much of the text repeats itself, which flatters every other figure. The second table compares drafts
on the newest closed latent (one upstream pass a round) with the paper's, on the open patch closed by force (two).

With a cost curve (`benchmarks.savings.cost_curve`) there are also, against BLT and after the prompts' pass: the weights
that the batch's passes read, the time that they should take, and the time they took. The gap between weights saved and
time saved has three parts, in points: *row curve*, for a pass of many rows is dearer than one of a few; *attention*,
with cache, which is what passes took beyond the curve; *engine*, which is all else: selection, host, scheduling.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.cost_curve import (
    CostCurve,
    Pass,
    Recorder,
    machine_limits,
    module_weights,
    weights_read,
)
from fastblt.benchmarks.text_statistics import distinct4, equal_positions, leading_equal, loops
from fastblt.kernels.cpu.threads import threads as threads_in_use
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.stats import EngineStats
from fastblt.server.request import (
    MAX_BLOCK_SIZE,
    DecodingMethod,
    DecodingParams,
    FinishReason,
    Ledger,
    Request,
    SamplingParams,
    Unmasking,
)
from fastblt.server.settings import PRETRAINED, EngineSettings

BLT = DecodingParams(DecodingMethod.BLT)


def speculation(length: int, *, paper: bool = False) -> DecodingParams:
    """BLT-S with drafts of `length` bytes."""
    return DecodingParams(DecodingMethod.BLT_S, draft_length=length, paper_accounting=paper)


def diffusion(
    method: DecodingMethod, size: int, rule: str, *, align_blocks: bool = False, paper: bool = False
) -> DecodingParams:
    """BLT-D or BLT-DV; `rule` is a0.7 (confidence), g1.5 (entropy) or 1step, as in the paper's tables."""
    confidence = bound = None
    if rule == "1step":
        unmasking = Unmasking.ONE_STEP
    elif rule.startswith("a"):
        unmasking, confidence = Unmasking.CONFIDENCE, float(rule[1:])
    else:
        unmasking, bound = Unmasking.ENTROPY, float(rule[1:])
    return DecodingParams(
        method,
        block_size=size,
        unmasking=unmasking,
        confidence_threshold=confidence,
        entropy_bound=bound,
        align_blocks=align_blocks,
        paper_accounting=paper,
    )


def paper_settings(sizes: Sequence[int]) -> dict[str, DecodingParams]:
    """BLT and the settings of the paper's tables (arXiv 2605.08044, Tables 3-10) for a checkpoint of these block sizes,
    by name.

    Drafting methods come with both accountings ("paper": two upstream passes a round), BLT-D a0.7 also aligned.
    """
    settings = {"blt": BLT}
    for length in (4, 8, 16):
        for suffix, paper in (("", False), (" paper", True)):
            settings[f"blt-s k{length}{suffix}"] = speculation(length, paper=paper)
    for size in sizes:
        for rule in ("a0.5", "a0.7", "g0.8", "g1.0"):
            settings[f"blt-d-{size} {rule}"] = diffusion(DecodingMethod.BLT_D, size, rule)
        settings[f"blt-d-{size} a0.7 aligned"] = diffusion(DecodingMethod.BLT_D, size, "a0.7", align_blocks=True)
    for size in sizes:
        for rule in ("a0.3", "g1.5", "g2.0", "1step"):
            for suffix, paper in (("", False), (" paper", True)):
                settings[f"blt-dv-{size} {rule}{suffix}"] = diffusion(DecodingMethod.BLT_DV, size, rule, paper=paper)
    return settings


@dataclass
class Output:
    """What one request gave, and what it cost on its own."""

    ids: list[int]
    ledger: Ledger


@dataclass
class Batch:
    """Outputs of requests that ran together, in order; seconds and bytes after the prompts' pass, and the engine's
    passes in that time where they were recorded.
    """

    outputs: list[Output]
    seconds: float
    bytes: int
    passes: list[Pass] = field(default_factory=list)
    #: Seconds that the passes take by the cost curve, and how many times as long as at its time a pass took, by module.
    predicted: float = 0.0
    drift: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    def predict(self, curve: CostCurve, early: dict[str, float], late: dict[str, float]) -> None:
        """Note what the passes take by the curve, at the speed that the machine had before and after them."""
        self.drift = {module: (early[module] + late[module]) / 2 for module in early}
        self.predicted = sum(curve.predict(done) * self.drift[done.module] for done in self.passes)

    def join(self, other: Batch) -> Batch:
        """Both, one after the other."""
        share = self.seconds / (self.seconds + other.seconds)
        return Batch(
            self.outputs + other.outputs,
            self.seconds + other.seconds,
            self.bytes + other.bytes,
            self.passes + other.passes,
            self.predicted + other.predicted,
            {name: share * value + (1 - share) * other.drift[name] for name, value in self.drift.items()},
        )


def run(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], recorder: Recorder | None = None
) -> Batch:
    """Run requests to their ends, all at once. Raises RuntimeError where one ends in an error."""
    outputs = {str(index): Output([], Ledger()) for index in range(len(prompts))}
    for (name, _), ids, one in zip(outputs.items(), prompts, params, strict=True):
        engine.add(Request(name, ids, one, time.monotonic()))
    clock, before = 0.0, 0
    while engine.has_work():
        for delta in engine.step():
            output = outputs[delta.request_id]
            output.ids += delta.ids
            if delta.finish_reason == FinishReason.ERROR:
                raise RuntimeError(delta.error)
            output.ledger = delta.ledger or output.ledger
        if not clock:
            if recorder is not None:
                recorder.clear()
            clock, before = time.perf_counter(), sum(len(output.ids) for output in outputs.values())
    seconds = time.perf_counter() - clock
    made = sum(len(output.ids) for output in outputs.values()) - before
    return Batch(list(outputs.values()), seconds, made, recorder.take() if recorder is not None else [])


def figures(batch: Batch, plain: Batch) -> dict[str, Any]:
    """A row of the table; `plain` is the batch of BLT over the same prompts."""
    outputs, base = batch.outputs, plain.outputs
    texts = [output.ids for output in outputs]
    pairs = list(zip(texts, (output.ids for output in base), strict=True))
    total, before = _total(outputs), _total(base)
    # The prompt's own pass gives the first byte of what is verified.
    in_rounds = total.bytes - (len(outputs) if total.drafted else 0)
    return {
        "acceptance": total.accepted / total.drafted if total.drafted else None,
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
        "bytes_per_second": batch.bytes_per_second,
    }


@dataclass(frozen=True)
class Cost:
    """What figures of time are made of: the curve, and the weights of a model."""

    curve: CostCurve
    parameters: ModuleParameters
    head: int
    bytes_per_weight: int

    @classmethod
    def of(cls, model: Blt, engine: Engine, batch: int) -> Cost:
        head, most = model.lm_head.weight, min(512, 2 * batch * MAX_BLOCK_SIZE)
        return cls(
            CostCurve.measure(engine, most, requests=batch), ModuleParameters.of(model), head.numel(), head.itemsize
        )

    def gigabytes(self, batch: Batch) -> float:
        return weights_read(batch.passes, self.parameters, self.head, self.bytes_per_weight)


def times(batch: Batch, plain: Batch, cost: Cost) -> dict[str, Any]:
    """Seconds of a batch, and what of BLT's it saves; shares of saving are per byte."""
    bytes_ratio = plain.bytes / batch.bytes

    def saved(value: float, base: float) -> float:
        return 1 - bytes_ratio * value / base

    predicted, before = batch.predicted, plain.predicted
    inside, inside_before = (sum(done.seconds for done in b.passes) for b in (batch, plain))
    weights = saved(cost.gigabytes(batch), cost.gigabytes(plain))
    by_curve, by_passes = saved(predicted, before), saved(inside, inside_before)
    measured = saved(batch.seconds, plain.seconds)
    return {
        "seconds": batch.seconds,
        "bytes": batch.bytes,
        "weights_saved": weights,
        "predicted_saved": by_curve,
        "time_saved": measured,
        "gap": {
            "row_curve": weights - by_curve,
            "attention_and_cache": by_curve - by_passes,
            "engine": by_passes - measured,
        },
        "predicted_seconds": predicted,
        "drift": batch.drift,
        "attention_and_cache_seconds": inside - predicted,
        "engine_seconds": batch.seconds - inside,
        "predicted_over_measured": predicted / batch.seconds,
        "module_seconds": {
            name: sum(done.seconds for done in batch.passes if done.module == name) for name in cost.curve.seconds
        },
    }


def _total(outputs: list[Output]) -> Ledger:
    total = Ledger()
    for output in outputs:
        total.add(output.ledger)
    return total


def latent_question(batches: dict[str, Batch]) -> dict[str, Any]:
    """Acceptance of each draft on the newest closed latent and on the paper's, with the difference paired by prompt."""
    rows = {}
    for name, batch in batches.items():
        if (forced := batches.get(f"{name} paper")) is None:
            continue
        closed, paper = ([_acceptance(o) for o in b.outputs] for b in (batch, forced))
        differences = [one - other for one, other in zip(closed, paper, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        rows[name] = {
            "closed": statistics.mean(closed),
            "forced": statistics.mean(paper),
            "difference": statistics.mean(differences),
            "standard_error": spread / len(differences) ** 0.5,
        }
    return rows


def _acceptance(output: Output) -> float:
    return output.ledger.accepted / max(1, output.ledger.drafted)


def measure(
    model: Blt,
    prompts: Sequence[list[int]],
    length: int,
    temperature: float = 0.0,
    settings: dict[str, DecodingParams] | None = None,
    *,
    batch: int | None = None,
    rounds: int = 1,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run every setting over the prompts, then print a row of a table for each.

    With `batch`, that many requests run at a time and there are figures of time. The machine's speed may drift, so the
    settings take turns at every batch of prompts, and passes before and after each correct what the cost curve says
    for the speed of the moment. Where the prompts are one batch there should be several `rounds`, each with
    a curve of its own; a row is of the round in which the setting's time, as a share of BLT's in that round, was the
    median.
    """
    settings = settings or paper_settings(model.config.block_sizes)
    engine = Engine(model, replace(batch_settings(prompts[:batch], length), prefix_cache=False, threads=threads))
    recorder = Recorder(engine) if batch is not None else None
    size = batch or len(prompts)
    costs: list[Cost] = []
    runs: dict[str, list[Batch]] = {name: [] for name in settings}
    positions: dict[str, _Positions] = {name: _Positions() for name in settings}
    for _ in range(rounds):
        if batch is not None:
            costs.append(Cost.of(model, engine, batch))
        done: dict[str, Batch] = {}
        early = costs[-1].curve.drift(engine) if costs else {}
        for first in range(0, len(prompts), size):
            for name, decoding in settings.items():
                seeds = range(len(prompts))[first : first + size]
                params = [
                    SamplingParams(
                        max_tokens=length, temperature=temperature, seed=seed, ignore_eos=True, decoding=decoding
                    )
                    for seed in seeds
                ]
                before = engine.stats()
                with recorder.on() if recorder is not None else nullcontext():
                    part = run(engine, prompts[first : first + size], params, recorder)
                positions[name].add(before, engine.stats())
                if costs:
                    late = costs[-1].curve.drift(engine)
                    part.predict(costs[-1].curve, early, late)
                    early = late
                done[name] = done[name].join(part) if name in done else part
        for name, one in done.items():
            runs[name].append(one)
    rows: dict[str, dict[str, Any]] = {}
    batches: dict[str, Batch] = {}
    print(_TIMED_HEADER if costs else _HEADER)
    for name, own in runs.items():
        at = _median_round(own, runs["blt"])
        batches[name] = own[at]
        rows[name] = figures(own[at], runs["blt"][at]) | positions[name].shares()
        if costs:
            rows[name] |= times(own[at], runs["blt"][at], costs[at])
        print(_timed_row(name, rows[name]) if costs else _row(name, rows[name]), flush=True)
    latents = latent_question(batches)
    if latents:
        print("\n| draft | closed latent % | forced latent % | difference, points |\n|---|---|---|---|")
    for name, row in latents.items():
        error = f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}"
        print(f"| {name} | {_percent(row['closed'])} | {_percent(row['forced'])} | {error} |")
    result: dict[str, Any] = {"settings": rows, "draft_latent": latents}
    if costs:
        cost = costs[0]
        result["curve"] = {
            "rows": cost.curve.rows,
            "seconds": cost.curve.seconds,
            "weights": module_weights(cost.parameters, cost.head),
            "limits": machine_limits(threads_in_use(), model.lm_head.weight.device),
        }
        result["threads"] = threads_in_use()
    return result


def _median_round(runs: list[Batch], plain: list[Batch]) -> int:
    """The round whose time, as a share of plain BLT's in that round, is the median of all; BLT's own is its time."""
    order = [(one.seconds / base.seconds, one.seconds) for one, base in zip(runs, plain, strict=True)]
    return order.index(statistics.median_low(order))


class _Positions:
    """How many bytes were drafted, and how many of them accepted, at each position of a draft."""

    def __init__(self) -> None:
        self._drafted: list[int] = []
        self._accepted: list[int] = []

    def add(self, before: EngineStats, after: EngineStats) -> None:
        """What came between two snapshots."""
        early, late = before.drafted_by_position, after.drafted_by_position
        had, taken = before.accepted_by_position, after.accepted_by_position
        self._drafted = _sums(self._drafted, late, [-count for count in early])
        self._accepted = _sums(self._accepted, taken, [-count for count in had])

    def shares(self) -> dict[str, Any]:
        """Share of drafted bytes that were accepted at each position; nothing where nothing was drafted."""
        pairs = zip_longest(self._drafted, self._accepted, fillvalue=0)
        shares = [accepted / drafted for drafted, accepted in pairs if drafted]
        return {"acceptance_by_position": shares} if shares else {}


def _sums(*counts: Sequence[int]) -> list[int]:
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


#: Settings that stand for the others where a run is long.
HEADLINE = ("blt", *(f"blt-s k{length}" for length in (4, 8, 16)))


def chosen_settings(sizes: Sequence[int], which: str) -> dict[str, DecodingParams]:
    """`all` of the paper's settings, `headline` ones (BLT-S, BLT-D a0.7, BLT-DV in one step), or those whose names
    contain `which`, beside BLT.
    """
    settings = paper_settings(sizes)
    if which == "all":
        return settings
    if which != "headline":
        return {name: one for name, one in settings.items() if name == "blt" or which in name}
    names = {*HEADLINE, *(f"blt-d-{size} a0.7" for size in sizes), *(f"blt-dv-{size} 1step" for size in sizes)}
    return {name: one for name, one in settings.items() if name in names}


def batch_settings(prompts: Sequence[list[int]], length: int) -> EngineSettings:
    """All requests run at once, and the prompts take one pass."""
    longest = max(map(len, prompts)) + MAX_BLOCK_SIZE
    rows = max(512, len(prompts) * longest)
    return EngineSettings(max_running=len(prompts), max_pass_rows=rows, max_model_len=longest + length + 4096)


_COLUMNS = (
    "acc % | bytes/round | dec/byte | up/byte | bytes/patch | GB paper saved % | GB saved % | leading % | equal %"
)
_HEADER = f"| setting | {_COLUMNS} | loops % | distinct | bytes/s |\n|{'---|' * 13}"


def _row(name: str, row: dict[str, Any]) -> str:
    rounds = "-" if row["bytes_a_round"] is None else f"{row['bytes_a_round']:.2f}"
    patch = "-" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}"
    passes = f"{row['decoder_per_byte']:.3f} | {row['upstream_per_byte']:.3f} | {patch}"
    percents = ("gb_paper_saved", "gb_saved", "leading_equal", "equal_positions", "loops")
    rest = " | ".join(_percent(row[key]) for key in percents)
    return (
        f"| {name} | {_percent(row['acceptance'])} | {rounds} | {passes} | {rest} | {row['distinct4']:.3f} "
        f"| {row['bytes_per_second']:.0f} |"
    )


#: Share of looping texts from which on a row is no headline.
MOST_LOOPS = 0.10
_TIMED_COLUMNS = (
    "acc % | dec/byte | up/byte | bytes/patch | GB paper saved % | weights saved % | predicted saved % | time saved % "
    "| row curve | attention | engine | predicted/measured | equal % | loops % | distinct | bytes/s |"
)
_TIMED_HEADER = f"| setting | {_TIMED_COLUMNS}\n|{'---|' * 17}"


def _timed_row(name: str, row: dict[str, Any]) -> str:
    patch = "-" if row["bytes_per_patch"] is None else f"{row['bytes_per_patch']:.2f}"
    passes = f"{row['decoder_per_byte']:.3f} | {row['upstream_per_byte']:.3f} | {patch}"
    saved = " | ".join(
        _percent(row[key]) for key in ("gb_paper_saved", "weights_saved", "predicted_saved", "time_saved")
    )
    gap = " | ".join(_percent(row["gap"][key]) for key in ("row_curve", "attention_and_cache", "engine"))
    return (
        f"| {name} | {_percent(row['acceptance'])} | {passes} | {saved} | {gap} | {row['predicted_over_measured']:.2f} "
        f"| {_percent(row['equal_positions'])} | {_percent(row['loops'])} | {row['distinct4']:.3f} "
        f"| {row['bytes_per_second']:.1f} |"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-length", type=int, default=256, help="bytes of each prompt")
    parser.add_argument("--bytes", type=int, default=256, help="bytes to decode for each prompt")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--only", default="all", help="headline, or settings whose names contain this, beside blt")
    parser.add_argument("--batch", type=int, help="requests at a time, with figures of time")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_checkpoint(args.model)
    settings = chosen_settings(model.config.block_sizes, args.only)
    prompts = held_out_prompts(args.prompts, args.prompt_length)
    result = measure(model, prompts, args.bytes, args.temperature, settings, batch=args.batch, threads=args.threads)
    if args.json:
        run_settings = {k: v for k, v in vars(args).items() if k not in ("model", "json")}
        result |= {"run": run_settings | {"threads": threads_in_use()}}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
