"""Checks that BLT-S, BLT-DV and BLT-DSV give BLT's bytes, greedy and sampled, on the shipped checkpoint.

    python -m fastblt.benchmarks.checks.lossless                 200 greedy prompts and 8 sampled ones, 256 bytes each
    python -m fastblt.benchmarks.checks.lossless --processes 4   the prompts split over processes of one thread each

Half of the prompts are held-out text, half are the ends of HumanEval prompts. Every prompt is decoded by BLT and by
every drafting setting, mixed in one deterministic engine, so that batches contain several methods at different stages.
Sampled prompts are decoded with every row of `SAMPLED`, each prompt with its own seed. The table says for each setting
how many outputs differ from BLT's with the same prompt, parameters and seed. The exit status is 1 if any differs.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastblt.benchmarks.command import command
from fastblt.benchmarks.harness import Output, complete, start
from fastblt.benchmarks.markdown import Table
from fastblt.benchmarks.prompts import held_out_prompts, humaneval_texts
from fastblt.benchmarks.settings import decoding
from fastblt.benchmarks.text_statistics import leading_equal
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import encode, with_bos
from fastblt.server.request import SamplingParams
from fastblt.server.settings import PRETRAINED

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

#: Groups of settings that run one behind another. The settings of a group are of all methods.
_GROUPS = 8

#: A request: the number of its prompt, which is also its seed; the name of its parameters; its setting.
Job = tuple[int, str, str]


def drafting_settings(sizes: Sequence[int]) -> list[str]:
    """All settings whose outputs must equal BLT's, for a checkpoint with these block sizes."""
    names = [f"blt-s k{length}" for length in (1, 4, 8, 16, 32)]
    names += [f"blt-dv-{size} {rule}" for size in sizes for rule in ("1step", "a0.3", "g1.5")]
    filtered = [f"blt-dsv-{size} k{length}" for size in sizes for length in (8, 16, 32)]
    filtered += [f"blt-dsv-{size} k16 {rule}" for size in sizes for rule in ("a0.3", "g1.5")]
    return [*(f"{name}{suffix}" for suffix in ("", " paper") for name in names), *filtered]


@dataclass(frozen=True)
class Difference:
    """An output that differs from BLT's: the first different byte, the seed (number of the prompt), the parameters."""

    position: int
    seed: int
    parameters: str


@dataclass
class Tally:
    """The outputs of one setting: their number, the bytes of BLT's outputs, and the differences."""

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
    """Decode every prompt by BLT and every drafting setting, mixed in one engine. The keys of `prompts` are seeds."""
    settings = ["blt", *drafting_settings(model.config.block_sizes)]
    jobs = [(seed, name, setting) for seed in prompts for name in parameters for setting in settings]
    random.Random(0).shuffle(jobs)
    # Each setting takes passes of its own: all of them at once would leave each a request or two.
    jobs.sort(key=lambda job: settings.index(job[2]) % _GROUPS)
    params = []
    for seed, name, setting in jobs:
        values = {"ignore_eos": True, "seed": seed, "max_tokens": length, **parameters[name]}
        params.append(SamplingParams(**values, decoding=decoding(setting)))
    clock, shown = time.perf_counter(), 0

    def show(outputs: list[Output]) -> None:
        nonlocal shown
        done = sum(output.finish_reason is not None for output in outputs)
        if done >= shown + 100:
            shown = done
            note = f"\r{done} of {len(jobs)} requests, {time.perf_counter() - clock:.0f} s"
            print(note, end="", file=sys.stderr, flush=True)

    engine = start(model, max_running, deterministic=True, max_waiting=len(jobs))
    asked = [prompts[seed] for seed, _, _ in jobs]
    found = tally(jobs, complete(engine, asked, params, after_step=show if progress else None, errors=True))
    return {setting: found[setting] for setting in settings[1:]}


def tally(jobs: Sequence[Job], outputs: Sequence[Output]) -> dict[str, Tally]:
    """Compare every output with BLT's of the same seed and parameters: bytes, finish reasons, errors."""
    plain = {
        (seed, name): output for (seed, name, setting), output in zip(jobs, outputs, strict=True) if setting == "blt"
    }
    tallies: dict[str, Tally] = {}
    for (seed, name, setting), output in zip(jobs, outputs, strict=True):
        if setting == "blt":
            continue
        base = plain[seed, name]
        own = tallies.setdefault(setting, Tally())
        own.outputs += 1
        own.bytes += len(base.ids)
        if (output.ids, output.finish_reason, output.error) != (base.ids, base.finish_reason, base.error):
            own.differences.append(Difference(leading_equal(output.ids, base.ids), seed, name))
    return tallies


def _work(
    model: str, prompts: dict[int, list[int]], length: int, parameters: dict[str, Any], loud: bool
) -> dict[str, Tally]:
    """`compare` in one process, which loads the model itself."""
    return compare(load_checkpoint(model), prompts, length, parameters, progress=loud)


def in_processes(
    model: str, prompts: list[list[int]], length: int, parameters: dict[str, dict[str, Any]], processes: int
) -> dict[str, Tally]:
    """`compare` with the prompts split over processes of one thread each. With one, in this process."""
    seeded = list(enumerate(prompts))
    if processes == 1:
        return _work(model, dict(seeded), length, parameters, loud=True)
    shares = [dict(seeded[first::processes]) for first in range(processes)]
    spawn = multiprocessing.get_context("spawn")
    total: dict[str, Tally] = {}
    with ProcessPoolExecutor(processes, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = [pool.submit(_work, model, share, length, parameters, not at) for at, share in enumerate(shares)]
        for run in runs:
            for setting, own in run.result().items():
                total.setdefault(setting, Tally()).add(own)
    return total


def mixed_prompts(count: int, length: int) -> list[list[int]]:
    """Held-out text and the last `length` bytes of HumanEval prompts, alternating, each with BOS first."""
    others = [with_bos(encode(text.encode()[-length:])) for text in humaneval_texts()[: count // 2]]
    half = held_out_prompts(count - len(others), length)
    prompts = [ids for pair in zip(half, others, strict=False) for ids in pair]
    return prompts + half[len(others) :]


def check(
    *,
    model: str = str(PRETRAINED),
    prompts: int = 200,
    sampled: int = 8,
    prompt_length: int = 256,
    length: int = 256,
    processes: int = 2,
) -> dict[str, Any]:
    """Decode `prompts` prompts greedily, and `sampled` prompts with each row of `SAMPLED`, `length` bytes each."""
    result: dict[str, Any] = {}
    compared = differing = 0
    for title, count, parameters in (("greedy", prompts, GREEDY), ("sampled", sampled, SAMPLED)):
        if count == 0:
            continue
        clock = time.perf_counter()
        tallies = in_processes(model, mixed_prompts(count, prompt_length), length, parameters, min(processes, count))
        print(f"\n{title}: {', '.join(parameters)}; {time.perf_counter() - clock:.0f} s")
        table = Table("setting", "outputs", "bytes", "differing")
        for setting, own in tallies.items():
            table.row(setting, str(own.outputs), str(own.bytes), str(len(own.differences)))
        for setting, own in tallies.items():
            for one in own.differences[:5]:
                print(f"{setting}: differs from byte {one.position} on; seed {one.seed}, {one.parameters}")
        compared += sum(own.outputs for own in tallies.values())
        differing += sum(len(own.differences) for own in tallies.values())
        result[title] = {setting: asdict(own) for setting, own in tallies.items()}
    print(f"\n{compared} outputs compared with BLT's: {differing} differ")
    return result | {"passed": not differing}


app = command(check)

if __name__ == "__main__":
    app()
