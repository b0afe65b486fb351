"""What aligning the requests of a batch saves: weights read and bytes per second, with and without holding.

    python -m fastblt.benchmarks.engine.holding
        BLT, BLT-S k = 8 and BLT-DV-8 at 32 requests, at most 1, 8 and 64 passes a beat

A request that needs the global transformer is held until the others can go no further either, for at most so many
decoder passes: 1 never holds. Requests start one pass after another and are measured while all of them run; the engines
of one method take turns. Passes are those of the engine's ledger, where one counts once however many requests share it.
"Weights read" are millions of parameters per byte *of each request*: with this checkpoint's modules, entropy model
included, and with decoder, encoder and global transformer of the paper's 1B model in their place. Beside the latter
stands what it would be by the requests' own passes: `apart` where every decoder pass comes with an upstream pass,
`together` where all requests are in step. With the paper's acceptance and patches the model of design §3 says 1572 and
332 for BLT-S, 375 and 208 for BLT-DV, and 1462 for BLT apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.methods import BLT, diffusion, speculation
from fastblt.kernels.cpu.threads import threads
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Ledger, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

METHODS: dict[str, DecodingParams] = {
    "blt": BLT,
    "blt-s k8": speculation(8),
    "blt-dv-8 1step": diffusion(DecodingMethod.BLT_DV, 8, "1step"),
}

#: The paper's 1B model, whose accounting has no entropy model (arXiv 2605.08044 §4.2); encoder and global transformer
#: in one.
PAPER_1B = ModuleParameters(patcher=0, encoder=0, global_=1_304_014_848, decoder=157_852_672)


def start_apart(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> None:
    """Submit requests one pass after another; return when all of them decode."""
    waiting = {str(index) for index in range(len(prompts))}
    for index, (ids, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add(Request(str(index), ids, one, time.monotonic()))
        waiting -= {delta.request_id for delta in engine.step()}
    while waiting:
        waiting -= {delta.request_id for delta in engine.step()}


def endless(decoding: DecodingParams, count: int, temperature: float) -> list[SamplingParams]:
    """Parameters of `count` requests that outlast a measurement."""
    return [
        SamplingParams(max_tokens=16000, temperature=temperature, seed=seed, ignore_eos=True, decoding=decoding)
        for seed in range(count)
    ]


class _Run:
    """An engine in full swing, and what its stretches have come to."""

    def __init__(self, model: Blt, hold: int, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        self.engine = Engine(model, EngineSettings(max_running=len(prompts), max_passes_per_beat=hold))
        self.speeds: list[float] = []
        self.bytes = 0
        self.shared, self.own = Ledger(), Ledger()
        start_apart(self.engine, prompts, params)

    def stretch(self, count: int) -> None:
        """Run until `count` more bytes are there."""
        engine = self.engine
        before, shared, own = engine.stats().bytes_generated, _sum([engine.stats().ledger]), self._requests()
        clock = time.perf_counter()
        while (made := engine.stats().bytes_generated - before) < count:
            engine.step()
        self.speeds.append(made / (time.perf_counter() - clock))
        self.bytes += made
        self.shared = _sum([self.shared, engine.stats().ledger], minus=shared)
        self.own = _sum([self.own, self._requests()], minus=own)

    def _requests(self) -> Ledger:
        return _sum([sequence.ledger for sequence in self.engine._sequences.values()])


def _sum(ledgers: list[Ledger], minus: Ledger | None = None) -> Ledger:
    """Numbers of ledgers added up."""
    names = [field.name for field in fields(Ledger) if isinstance(getattr(ledgers[0], field.name), int)]
    less = minus or Ledger()
    return Ledger(**{n: sum(getattr(one, n) for one in ledgers) - getattr(less, n) for n in names})


def figures(run: _Run, requests: int, own: ModuleParameters) -> dict[str, float]:
    """What a run read and made."""
    passes, each = run.shared, run.own
    upstream = PAPER_1B.encoder + PAPER_1B.global_

    def weights(parameters: ModuleParameters, ledger: Ledger) -> float:
        counts = asdict(parameters)
        return sum(getattr(ledger, name) * counts[name] for name in counts) / run.bytes / 1e6

    return {
        "decoder_passes_per_byte": passes.decoder / run.bytes,
        "global_passes_per_byte": passes.global_ / run.bytes,
        "weights_read": requests * weights(own, passes),
        "weights_read_1b": requests * weights(PAPER_1B, passes),
        "apart_1b": each.decoder / run.bytes * (PAPER_1B.decoder + upstream) / 1e6,
        "together_1b": weights(PAPER_1B, each),
        "bytes_per_second": statistics.median(run.speeds),
    }


def measure(
    model: Blt,
    prompts: list[list[int]],
    holds: Sequence[int] = (1, 8, 64),
    length: int = 128,
    rounds: int = 5,
    temperature: float = 0.0,
    methods: dict[str, DecodingParams] = METHODS,
) -> dict[str, dict[str, float]]:
    """Figures by method and most passes a beat, printed as a table. `length` is bytes a request and stretch."""
    own = ModuleParameters.of(model)
    rows: dict[str, dict[str, float]] = {}
    print(
        "| method | passes a beat | decoder/byte | global/byte | weights read, M | as 1B, M | apart | together "
        "| bytes/s |"
    )
    print("|" + "---|" * 9)
    for name, decoding in methods.items():
        params = endless(decoding, len(prompts), temperature)
        runs = {hold: _Run(model, hold, prompts, params) for hold in holds}
        for _ in range(rounds):
            for run in runs.values():
                run.stretch(length * len(prompts))
        for hold, run in runs.items():
            row = rows[f"{name}, {hold} passes a beat"] = figures(run, len(prompts), own)
            print(
                f"| {name} | {hold} | {row['decoder_passes_per_byte']:.4f} | {row['global_passes_per_byte']:.4f} "
                f"| {row['weights_read']:.2f} | {row['weights_read_1b']:.0f} | {row['apart_1b']:.0f} "
                f"| {row['together_1b']:.0f} | {row['bytes_per_second']:.0f} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--holds", type=int, nargs="+", default=[1, 8, 64], help="most decoder passes of a beat")
    parser.add_argument("--bytes", type=int, default=128, help="bytes of each request in a stretch")
    parser.add_argument("--rounds", type=int, default=5, help="stretches of each engine")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = held_out_prompts(args.requests, 256)
    rows = measure(load_checkpoint(args.model), prompts, args.holds, args.bytes, args.rounds, args.temperature)
    if args.json:
        result = {"requests": args.requests, "threads": threads(), "runs": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
