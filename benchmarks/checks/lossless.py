"""BLT-S and BLT-DV give BLT's bytes: greedy and sampled, byte for byte, on the shipped checkpoint.

    python -m fastblt.benchmarks.checks.lossless                200 greedy prompts and 8 sampled ones, 256 bytes each
    python -m fastblt.benchmarks.checks.lossless --processes 4
        the prompts split over so many processes, of one thread each

Half of the prompts are held-out text, half the ends of HumanEval's. Every prompt is decoded with BLT and with every
drafting setting, all of them mixed in one deterministic engine, so that batches hold many methods at different stages.
The sampled prompts go through every row of `SAMPLED` with a seed of their own. A line a setting says how many outputs
differ anywhere from BLT's with the same prompt, parameters and seed; any difference makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastblt.benchmarks.evaluation.python_lines import humaneval_prompts
from fastblt.benchmarks.held_out import held_out_prompts
from fastblt.benchmarks.savings.methods import BLT, diffusion, speculation
from fastblt.benchmarks.text_statistics import leading_equal
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings

GREEDY: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}}

#: Parameters of the sampled runs, by name.
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature 0.3": {"temperature": 0.3},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.5, "min_p": 0.05},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.2,
    },
    "bias": {"temperature": 0.7, "top_p": 0.95, "logit_bias": {14: -3.0, 36: 1.5, 105: 2.0}},
    "ends": {"temperature": 1.0, "ignore_eos": False, "logit_bias": {2: 6.0}, "stop": (b"return ", b"\n\n\n")},
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 0.3, "repetition_penalty": 1.3},
}


def drafting_settings(sizes: Sequence[int]) -> dict[str, DecodingParams]:
    """All that must equal BLT, for a checkpoint of these block sizes, by name."""
    settings = {}
    for suffix, paper in (("", False), (" paper", True)):
        for length in (1, 4, 8, 16, 32):
            settings[f"blt-s k{length}{suffix}"] = speculation(length, paper=paper)
        for size in sizes:
            for rule in ("1step", "a0.3", "g1.5"):
                decoding = diffusion(DecodingMethod.BLT_DV, size, rule, paper=paper)
                settings[f"blt-dv-{size} {rule}{suffix}"] = decoding
    return settings


@dataclass(frozen=True)
class Difference:
    """An output that is not BLT's: from which byte on, and of which prompt (its number is the seed) and parameters."""

    position: int
    seed: int
    parameters: str


@dataclass
class Tally:
    """Outputs of one setting, the bytes that BLT gave in their place, and what differs."""

    outputs: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.outputs += other.outputs
        self.bytes += other.bytes
        self.differences += other.differences


def compare(
    model: Blt,
    prompts: dict[int, list[int]],
    length: int,
    parameters: dict[str, dict[str, Any]],
    max_running: int = 64,
    progress: bool = False,
) -> dict[str, Tally]:
    """Decode every prompt with BLT and every drafting setting, mixed in one engine. Keys of `prompts` are seeds."""
    settings = {"blt": BLT, **drafting_settings(model.config.block_sizes)}
    jobs = [(seed, name, setting) for seed in prompts for name in parameters for setting in settings]
    random.Random(0).shuffle(jobs)
    engine = Engine(model, EngineSettings(deterministic=True, max_running=max_running, max_waiting=len(jobs)))
    outputs: dict[str, list[int]] = {}
    ends: dict[str, tuple[str, object]] = {}
    for number, (seed, name, setting) in enumerate(jobs):
        values = {"ignore_eos": True, "seed": seed, "max_tokens": length, **parameters[name]}
        params = SamplingParams(**values, decoding=settings[setting])
        outputs[str(number)] = []
        engine.add(Request(str(number), prompts[seed], params, time.monotonic()))
    clock = time.perf_counter()
    while engine.has_work():
        for delta in engine.step():
            outputs[delta.request_id] += delta.ids
            if delta.finish_reason is not None:
                ends[delta.request_id] = (str(delta.finish_reason), delta.error)
                if progress and len(ends) % 100 == 0:
                    note = f"\r{len(ends)} of {len(jobs)} requests, {time.perf_counter() - clock:.0f} s"
                    print(note, end="", file=sys.stderr, flush=True)
    return _compare(list(settings), jobs, list(outputs.values()), [ends[name] for name in outputs])


def _compare(
    settings: list[str], jobs: list[tuple[int, str, str]], outputs: list[list[int]], ends: list[tuple[str, object]]
) -> dict[str, Tally]:
    """Every output against BLT's of the same seed and parameters, bytes and finish reasons."""
    plain = {(seed, name): at for at, (seed, name, setting) in enumerate(jobs) if setting == "blt"}
    tallies = {setting: Tally() for setting in settings if setting != "blt"}
    for at, (seed, name, setting) in enumerate(jobs):
        if setting == "blt":
            continue
        base = plain[seed, name]
        tally = tallies[setting]
        tally.outputs += 1
        tally.bytes += len(outputs[base])
        if outputs[at] != outputs[base] or ends[at] != ends[base]:
            tally.differences.append(Difference(leading_equal(outputs[at], outputs[base]), seed, name))
    return tallies


def _work(
    model: str, prompts: dict[int, list[int]], length: int, parameters: dict[str, Any], loud: bool
) -> dict[str, Tally]:
    """What one process does."""
    return compare(load_checkpoint(model), prompts, length, parameters, progress=loud)


def in_processes(
    model: str, prompts: list[list[int]], length: int, parameters: dict[str, dict[str, Any]], processes: int
) -> dict[str, Tally]:
    """`compare` with the prompts split over processes of one thread each."""
    seeded = list(enumerate(prompts))
    shares = [dict(seeded[first::processes]) for first in range(processes)]
    spawn = multiprocessing.get_context("spawn")
    total: dict[str, Tally] = {}
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = [pool.submit(_work, model, share, length, parameters, not at) for at, share in enumerate(shares)]
        for run in runs:
            for setting, tally in run.result().items():
                total.setdefault(setting, Tally()).add(tally)
    return total


def mixed_prompts(count: int, length: int) -> list[list[int]]:
    """Held-out text and the last `length` bytes of HumanEval prompts in turn, BOS first."""
    half = held_out_prompts(count - count // 2, length)
    others = humaneval_prompts(length)[: count // 2]
    if len(others) < count // 2:
        half = held_out_prompts(count - len(others), length)
    prompts = [ids for pair in zip(half, others, strict=False) for ids in pair]
    return prompts + half[len(others) :]


def report(title: str, tallies: dict[str, Tally], seconds: float) -> None:
    print(f"\n{title}; {seconds:.0f} s\n| setting | outputs | bytes | differing |\n|---|---|---|---|")
    for setting, tally in tallies.items():
        print(f"| {setting} | {tally.outputs} | {tally.bytes} | {len(tally.differences)} |")
    for setting, tally in tallies.items():
        for one in tally.differences[:5]:
            print(f"{setting}: differs from byte {one.position} on; seed {one.seed}, {one.parameters}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--prompts", type=int, default=200, help="greedy prompts")
    parser.add_argument("--sampled", type=int, default=8, help="prompts of each sampled run")
    parser.add_argument("--prompt-length", type=int, default=256, help="bytes of each prompt")
    parser.add_argument("--bytes", type=int, default=256, help="bytes to decode for each prompt")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, dict[str, Tally]] = {}
    for title, count, parameters in (("greedy", args.prompts, GREEDY), ("sampled", args.sampled, SAMPLED)):
        if count == 0:
            continue
        clock = time.perf_counter()
        prompts = mixed_prompts(count, args.prompt_length)
        result[title] = in_processes(args.model, prompts, args.bytes, parameters, max(1, min(args.processes, count)))
        report(f"{title}: {', '.join(parameters)}", result[title], time.perf_counter() - clock)
    tallies = [tally for one in result.values() for tally in one.values()]
    differing = sum(len(tally.differences) for tally in tallies)
    print(f"\n{sum(tally.outputs for tally in tallies)} outputs compared with BLT's: {differing} differ")
    if args.json:
        rows = {title: {name: asdict(tally) for name, tally in one.items()} for title, one in result.items()}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
