"""A map of a large model by rows: ours, by how weights are stored, beside torch's own (MKL, oneDNN, FBGEMM), in turns.

    python -m fastblt.benchmarks.kernels.maps

Weights come from memory: so many maps take turns that caches hold none of them. `torch bfloat16` rounds inputs to
bfloat16 too, and `torch int8` has one scale a tensor for inputs (`quantized.dynamic`); neither gives the bits of fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.benchmarks.command import command
from fastblt.benchmarks.machine import machine_limits, measured_with
from fastblt.benchmarks.markdown import Table
from fastblt.kernels.cpu.linear import Storage, linear, pack_weights
from fastblt.kernels.cpu.threads import set_threads

#: Bytes that no cache holds.
_FAR = 2**28


def _torch_int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = torch.nn.Parameter(weight.float())
    return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(plain), {torch.nn.Linear}, torch.qint8)


def _ours(storage: Storage) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def make(weight: Tensor) -> Callable[[Tensor], Tensor]:
        packed = pack_weights(weight, storage)
        return lambda x: linear(x, packed)

    return make


def _torch_bfloat16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    narrow = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), narrow).float()


def _torch_float32(weight: Tensor) -> Callable[[Tensor], Tensor]:
    wide = weight.clone()
    return lambda x: F.linear(x, wide)


#: How a map is made, and its bytes a weight.
KINDS: dict[str, tuple[Callable[[Tensor], Callable[[Tensor], Tensor]], float]] = {
    **{storage.value: (_ours(storage), storage.dtype.itemsize) for storage in Storage},
    "torch float32": (_torch_float32, 4),
    "torch bfloat16": (_torch_bfloat16, 2),
    "torch int8": (_torch_int8, 1),
}


@torch.inference_mode()
def measure(
    *,
    inputs: int = 2048,
    outputs: int = 5632,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 300),
    threads: int = 2,
    rounds: int = 3,
) -> dict[str, Any]:
    """Print and return milliseconds of a map, the median over rounds."""
    torch.set_num_threads(threads)
    set_threads(threads)
    limits = machine_limits(threads)
    speeds = f"reads {limits['read_gb_s']:.1f} GB/s, {limits['gflop_s']:.0f} GFLOP/s"
    print(f"{threads} threads: {speeds}; {inputs} x {outputs}\n")
    weight = torch.randn(outputs, inputs)
    maps = {}
    for kind, (make, width) in KINDS.items():
        copies = -(-_FAR // int(width * weight.numel()))
        maps[kind] = [make(weight) for _ in range(copies)]
    result: dict[str, Any] = {**measured_with(), "inputs": inputs, "outputs": outputs, "threads": threads}
    result |= {"limits": limits, "milliseconds": {}}
    table = Table("rows", *KINDS)
    for count in rows:
        x = torch.randn(count, inputs)
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(rounds + 1):
            for kind, calls in maps.items():
                some = calls if count < 100 else calls[:3]
                began = time.perf_counter()
                for call in some:
                    call(x)
                if turn:
                    taken[kind].append(1e3 * (time.perf_counter() - began) / len(some))
        own = result["milliseconds"][str(count)] = {kind: statistics.median(each) for kind, each in taken.items()}
        table.row(str(count), *(f"{value:.2f}" for value in own.values()))
    return result


app = command(measure)

if __name__ == "__main__":
    app()
