"""What holding requests, so that they share upstream passes, saves and costs: weights read, speed, latency.

    python -m fastblt.benchmarks.engine.holding weights   at most 1, 8 and 64 passes a beat, 32 requests
    python -m fastblt.benchmarks.engine.holding latency   --max-hold-ms 0, 300 and none at the 1B shape

A request that needs the global transformer is held until all others need it too, for at most the given number of
decoder passes or milliseconds. With 1 pass, or 0 ms, requests are never held. Each request starts one pass after the
one before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import begin, endless, in_turns, start, stretch, submit, whole_length
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts
from fastblt.benchmarks.settings import LOSSLESS, decoding
from fastblt.kernels.cpu.threads import threads
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.widen import paper_shape, widen
from fastblt.server.engine.engine import Engine
from fastblt.server.request import FinishReason, Ledger
from fastblt.server.settings import PRETRAINED

#: The paper's 1B model (arXiv 2605.08044 §4.2). The paper does not count the entropy model, and counts encoder and
#: global transformer together.
PAPER_1B = ModuleParameters(patcher=0, encoder=0, global_=1_304_014_848, decoder=157_852_672)
_MODULES = tuple(asdict(PAPER_1B))

#: The number of passes of each module.
Counts = dict[str, int]


class Run:
    """A running engine, and totals over its measured stretches.

    `shared` are passes by the engine's ledger, which counts a pass once, however many requests share it. `own` are the
    sums of the requests' ledgers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.bytes = 0
        self.shared: Counts = dict.fromkeys(_MODULES, 0)
        self.own: Counts = dict.fromkeys(_MODULES, 0)

    def stretch(self, count: int) -> float:
        """Run until `count` more bytes are generated. Returns bytes per second."""
        before, shared, own = self._engine.stats().bytes_generated, self._engines(), self._requests()
        speed = stretch(self._engine, count)
        self.bytes += self._engine.stats().bytes_generated - before
        for total, now, then in ((self.shared, self._engines(), shared), (self.own, self._requests(), own)):
            for name in _MODULES:
                total[name] += now[name] - then[name]
        return speed

    def _engines(self) -> Counts:
        return _counts([self._engine.stats().ledger])

    def _requests(self) -> Counts:
        return _counts([sequence.ledger for sequence in self._engine._sequences.values()])


def _counts(ledgers: Sequence[Ledger]) -> Counts:
    return {name: sum(getattr(ledger, name) for ledger in ledgers) for name in _MODULES}


def figures(run: Run, requests: int, own: ModuleParameters) -> dict[str, float]:
    """Figures of a run. Weights read are millions of parameters for each byte of each request."""
    upstream = PAPER_1B.encoder + PAPER_1B.global_

    def weights(parameters: ModuleParameters, passes: Counts) -> float:
        return sum(passes[name] * count for name, count in asdict(parameters).items()) / run.bytes / 1e6

    return {
        "decoder_passes_per_byte": run.shared["decoder"] / run.bytes,
        "global_passes_per_byte": run.shared["global_"] / run.bytes,
        "weights_read": requests * weights(own, run.shared),
        "weights_read_1b": requests * weights(PAPER_1B, run.shared),
        "apart_1b": run.own["decoder"] / run.bytes * (PAPER_1B.decoder + upstream) / 1e6,
        "together_1b": weights(PAPER_1B, run.own),
    }


def weights(
    *,
    model: str = str(PRETRAINED),
    requests: int = 32,
    holds: Sequence[int] = (1, 8, 64),
    length: int = 128,
    rounds: int = 5,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Weights read per byte, by method and most passes a beat.

    They are millions of parameters per byte *of each request*: with this checkpoint's modules, entropy model included,
    and with those of the paper's 1B model in their place. For the latter there are also two bounds from the requests'
    own passes: `apart`, if every decoder pass came with an upstream pass, and `together`, if all requests were in step.
    With the paper's acceptance and patches the model of design §3 predicts 1572 and 332 for BLT-S, 375 and 208 for
    BLT-DV, and 1462 for BLT apart.
    """
    blt = load_checkpoint(model)
    rows = compare_weights(blt, held_out_prompts(requests, 256), holds, length, rounds, temperature)
    return {"requests": requests, "threads": threads(), "runs": rows}


def compare_weights(
    model: Blt, prompts: list[list[int]], holds: Sequence[int], length: int, rounds: int, temperature: float = 0.0
) -> dict[str, dict[str, float]]:
    """Print and return a row for each method and limit of passes a beat. `length`: bytes of a request in a stretch."""
    own = ModuleParameters.of(model.config)
    rows: dict[str, dict[str, float]] = {}
    columns = ("decoder/byte", "global/byte", "weights read, M", "as 1B, M", "apart", "together", "bytes/s")
    table = Table("method", "passes a beat", *columns)
    for name in LOSSLESS:
        runs: dict[str, Run] = {}
        for passes in holds:
            engine = start(model, len(prompts), max_passes_per_beat=passes)
            begin(engine, prompts, endless(decoding(name), len(prompts), temperature))
            runs[str(passes)] = Run(engine)
        speeds = in_turns(rounds, {hold: partial(run.stretch, length * len(prompts)) for hold, run in runs.items()})
        for hold, run in runs.items():
            row = figures(run, len(prompts), own) | {"bytes_per_second": statistics.median(speeds[hold])}
            rows[f"{name}, {hold} passes a beat"] = row
            digits = (4, 4, 2, 0, 0, 0, 0)
            table.row(name, hold, *(f"{value:.{n}f}" for value, n in zip(row.values(), digits, strict=True)))
    return rows


Shape = Annotated[str, typer.Option(help="Widen to 1b or 3b first, in memory; none takes the model as it is.")]


def latency(
    *,
    model: str = str(PRETRAINED),
    shape: Shape = "1b",
    requests: Sequence[int] = (8, 32),
    length: int = 32,
    rounds: int = 1,
) -> dict[str, Any]:
    """Bytes per second and latency by `--max-hold-ms`: 0, 300, and none, with which 64 passes are the limit.

    Gaps are times between the deltas of one request. `in all` is the time from its submission to its end.
    """
    blt = load_checkpoint(model)
    if shape != "none":
        blt = widen(blt, paper_shape(shape))
    rows = compare_latency(blt, held_out_prompts(max(requests), 64), requests, length, rounds)
    return {"shape": shape, "bytes": length, "threads": threads(), "runs": rows}


#: Longest holds in milliseconds. None: only the number of passes in a beat limits them.
HOLDS: tuple[float | None, ...] = (0.0, 300.0, None)


def compare_latency(
    model: Blt, prompts: Sequence[list[int]], counts: Sequence[int], length: int, rounds: int
) -> list[dict[str, Any]]:
    """Print and return medians over the rounds, by method, number of requests and hold."""
    rows: list[dict[str, Any]] = []
    table = Table("method", "requests", "hold, ms", "bytes/s", "global/byte", "gap p50, ms", "gap p99", "in all p99, s")
    for name in LOSSLESS[1:]:
        for count in counts:
            kinds = {str(hold): partial(to_the_end, model, prompts[:count], name, hold, length) for hold in HOLDS}
            for hold, own in zip(HOLDS, in_turns(rounds, kinds).values(), strict=True):
                row = {key: float(np.median([one[key] for one in own])) for key in own[0]}
                rows.append({"method": name, "requests": count, "max_hold_ms": hold, **row})
                speed, passes, half, most, whole = row.values()
                cells = (f"{speed:.1f}", f"{passes:.4f}", f"{half:.0f}", f"{most:.0f}", f"{whole / 1e3:.1f}")
                table.row(name, str(count), "none" if hold is None else f"{hold:.0f}", *cells)
    return rows


def to_the_end(
    model: Blt, prompts: Sequence[list[int]], setting: str, hold: float | None, length: int
) -> dict[str, float]:
    """Run all prompts to their ends. Returns the run's figures."""
    engine = start(model, len(prompts), max_hold_ms=hold, max_model_len=2048, prefix_cache=False)
    params = whole_length(decoding(setting), length)
    waiting = list(prompts)
    submitted: dict[str, float] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    whole: list[float] = []
    began = time.perf_counter()
    while waiting or engine.has_work():
        if waiting:
            submitted[submit(engine, waiting.pop(0), params)] = time.perf_counter()
        deltas, now = engine.step(), time.perf_counter()
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                raise RuntimeError(delta.error)
            if delta.request_id in last:
                gaps.append(now - last[delta.request_id])
            last[delta.request_id] = now
            if delta.finish_reason is not None:
                whole.append(now - submitted[delta.request_id])
    stats = engine.stats()
    return {
        "bytes_per_second": stats.bytes_generated / (time.perf_counter() - began),
        "global_passes_per_byte": stats.ledger.global_ / stats.bytes_generated,
        "p50_gap_ms": 1e3 * float(np.percentile(gaps, 50)),
        "p99_gap_ms": 1e3 * float(np.percentile(gaps, 99)),
        "p99_in_all_ms": 1e3 * float(np.percentile(whole, 99)),
    }


app = command(weights, latency)

if __name__ == "__main__":
    app()
