"""What holding requests for one another saves and costs: weights read, bytes per second, latency.

    python -m fastblt.benchmarks.engine.holding weights   at most 1, 8 and 64 passes a beat, 32 requests
    python -m fastblt.benchmarks.engine.holding latency   --max-hold-ms 0, 300 and none at the 1B shape

A request that needs the global transformer is held until the others can go no further either, for at most so many
decoder passes or milliseconds: 1 pass, or 0 ms, never holds. Requests start one pass after another.
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

#: The paper's 1B model, whose accounting has no entropy model (arXiv 2605.08044 §4.2); encoder and global
#: transformer in one.
PAPER_1B = ModuleParameters(patcher=0, encoder=0, global_=1_304_014_848, decoder=157_852_672)
_MODULES = tuple(asdict(PAPER_1B))

#: Passes of each module, and the bytes that they made.
Counts = dict[str, int]


class Run:
    """An engine in full swing, and what its stretches have come to: passes of the engine's ledger, where one counts
    once however many requests share it, and of the requests' own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.bytes = 0
        self.shared: Counts = dict.fromkeys(_MODULES, 0)
        self.own: Counts = dict.fromkeys(_MODULES, 0)

    def stretch(self, count: int) -> float:
        """Run until `count` more bytes are there: bytes a second."""
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
    """What a run read. Weights are in millions a byte of each request."""
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
    """Weights read a byte, by method and most passes a beat.

    They are millions of parameters per byte *of each request*: with this checkpoint's modules, entropy model included,
    and with decoder, encoder and global transformer of the paper's 1B model in their place. Beside the latter stands
    what it would be by the requests' own passes: `apart` where every decoder pass comes with an upstream pass,
    `together` where all requests are in step. With the paper's acceptance and patches the model of design §3 says 1572
    and 332 for BLT-S, 375 and 208 for BLT-DV, and 1462 for BLT apart.
    """
    blt = load_checkpoint(model)
    rows = compare_weights(blt, held_out_prompts(requests, 256), holds, length, rounds, temperature)
    return {"requests": requests, "threads": threads(), "runs": rows}


def compare_weights(
    model: Blt, prompts: list[list[int]], holds: Sequence[int], length: int, rounds: int, temperature: float = 0.0
) -> dict[str, dict[str, float]]:
    """Print and return a row for each method and most passes a beat. `length` is bytes a request and stretch."""
    own = ModuleParameters.of(model)
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
    """Bytes a second and latency by `--max-hold-ms`: 0, 300, and none, which the engine ends after 64 passes.

    Gaps are between the pieces of one request's text, `in all` from its submission to its end.
    """
    blt = load_checkpoint(model)
    if shape != "none":
        blt = widen(blt, paper_shape(shape))
    rows = compare_latency(blt, held_out_prompts(max(requests), 64), requests, length, rounds)
    return {"shape": shape, "bytes": length, "threads": threads(), "runs": rows}


#: Longest waits in milliseconds; None: as many passes as a beat may have.
HOLDS: tuple[float | None, ...] = (0.0, 300.0, None)


def compare_latency(
    model: Blt, prompts: Sequence[list[int]], counts: Sequence[int], length: int, rounds: int
) -> list[dict[str, Any]]:
    """Print and return medians over the rounds."""
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
    """Figures of one run of all prompts to their ends."""
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
