"""A large map over a few rows: C beside torch, and beside the time that reading its weights takes.

    python -m fastblt.benchmarks.kernels.linear    a map of 2,048 to 5,632, in fp32

The calls go through eight such maps, so that no weight is in a cache when it is wanted again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.benchmarks.machine import measured_with
from fastblt.benchmarks.savings.cost_curve import machine_limits
from fastblt.kernels.cpu.linear import linear
from fastblt.kernels.cpu.threads import set_threads

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def fastest(call: Callable[[Tensor], object], weights: Sequence[Tensor], rounds: int) -> float:
    """Seconds a map, over all of them, of the fastest round."""
    times = []
    for _ in range(rounds):
        clock = time.perf_counter()
        for weight in weights:
            call(weight)
        times.append(time.perf_counter() - clock)
    return min(times) / len(weights)


@torch.inference_mode()
def measure(inputs: int, outputs: int, threads: int, rows: Sequence[int] = ROWS, rounds: int = 5) -> dict[str, Any]:
    """Print and return milliseconds by rows."""
    set_threads(threads)
    weights = [torch.randn(outputs, inputs) for _ in range(8)]
    read = machine_limits(threads, torch.device("cpu"))["read_gb_s"]
    floor = weights[0].nbytes / read / 1e6
    print(f"{threads} threads read {read:.1f} GB/s: a map of {weights[0].nbytes / 1e6:.0f} MB in {floor:.2f} ms\n")
    print("| rows | torch, ms | C, ms | torch / C |\n|---|---|---|---|")
    table = []
    for count in rows:
        x = torch.randn(count, inputs)
        theirs = 1e3 * fastest(lambda weight, x=x: F.linear(x, weight), weights, rounds)  # type: ignore[misc]
        ours = 1e3 * fastest(lambda weight, x=x: linear(x, weight), weights, rounds)  # type: ignore[misc]
        table.append({"rows": count, "torch_ms": theirs, "c_ms": ours})
        print(f"| {count} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |", flush=True)
    set_threads(None)
    return {"threads": threads, "read_gb_s": read, "floor_ms": floor, "rows": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=5632)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measured_with() | measure(args.inputs, args.outputs, args.threads)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
