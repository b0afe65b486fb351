"""Which implementation of a kernel serves: Triton on GPUs, torch (and C, see `native`) elsewhere.

`FASTBLT_KERNELS=triton` or `=torch` forces one for the whole process. Without a GPU a forced Triton runs under its
interpreter, which must be chosen before triton is first imported: so this module is imported by every launcher.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_FORCED = os.environ.get("FASTBLT_KERNELS", "")
if _FORCED not in ("", "triton", "torch"):
    raise ValueError(f"FASTBLT_KERNELS is {_FORCED!r}; it may be 'triton' or 'torch'")
if _FORCED == "triton" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_INSTALLED = importlib.util.find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernels."""
    if _FORCED:
        return _FORCED == "triton"
    return device.type == "cuda" and _INSTALLED


def launcher(plain: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`<op>_torch` of kernels/<file>.py, or `<op>_triton` of kernels/gpu/<file>.py if the first tensor goes there.

    Triton is imported by the first such call, never before.
    """

    @wraps(plain)
    def launch(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        first = arguments[0]
        if isinstance(first, torch.Tensor) and use_triton(first.device):
            name = plain.__name__.removesuffix("torch") + "triton"
            package, _, file = plain.__module__.rpartition(".")
            return getattr(importlib.import_module(f"{package}.gpu.{file}"), name)(*arguments, **options)
        return plain(*arguments, **options)

    return launch


def interpreted() -> bool:
    """Whether Triton kernels run under the interpreter. Its arithmetic on bfloat16 is wrong: compute in fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"
