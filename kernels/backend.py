"""Chooses the implementation of an operation: Triton on a GPU, C or torch elsewhere (`kernels/cpu/native.py`).

`FASTBLT_KERNELS=triton` or `=torch` forces one for the whole process; with `torch` the C code still runs on a CPU.
Without a GPU, forced Triton kernels run in Triton's interpreter. It must be chosen before triton is first imported, so
every file that may import a Triton kernel imports this one.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_FORCED = os.environ.get("FASTBLT_KERNELS", "")
if _FORCED not in ("", "triton", "torch"):
    raise ValueError(f"FASTBLT_KERNELS is {_FORCED!r}; it may be 'triton' or 'torch'")
if _FORCED == "triton" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_INSTALLED = importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels compute tensors on `device`."""
    if _FORCED:
        return _FORCED == "triton"
    return device.type == "cuda" and _INSTALLED


def interpreted() -> bool:
    """Whether Triton kernels run under the interpreter. Its arithmetic on bfloat16 is wrong: compute in fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"
