"""Chooses the implementation of an operation: Triton on a GPU, C or torch elsewhere (`kernels/cpu/native.py`).

`FASTBLT_KERNELS=triton` or `=torch` forces one for the whole process; with `torch` the C code still runs on a CPU.
Without a GPU, forced Triton kernels run in Triton's interpreter. It must be chosen before triton is first imported, so
every file that may import a Triton kernel imports this one.

`=triton` also has the engine run a CPU as it runs a GPU: memory apart, rows in buckets, replayed graphs. `=apart` does
so with the kernels of a CPU: the same program, tested in a fraction of the interpreter's time.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_FORCED = os.environ.get("FASTBLT_KERNELS", "")
if _FORCED not in ("", "triton", "torch", "apart"):
    raise ValueError(f"FASTBLT_KERNELS is {_FORCED!r}; it may be 'triton', 'torch' or 'apart'")
if _FORCED == "triton" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_INSTALLED = importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels compute tensors on `device`."""
    if _FORCED in ("triton", "torch"):
        return _FORCED == "triton"
    return device.type == "cuda" and _INSTALLED


def is_apart(device: torch.device) -> bool:
    """Whether the engine treats a device as one with memory of its own, which does its work behind the host's back."""
    return device.type != "cpu" or _FORCED in ("triton", "apart")


def interpreted() -> bool:
    """Whether Triton kernels run under the interpreter. Its arithmetic on bfloat16 is wrong: compute in fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"
