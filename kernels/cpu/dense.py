"""The dense part of a transformer layer over N rows: norm, linear maps, and the sums around them.

    rms_norm      gain * (x / sqrt(mean(x^2) + eps))
    project       up to three linear maps of the same rows, normed before where a norm is given
    project_add   x W^T + times * residual, for times of 0, 1 or 2
    feed_forward  x + down(silu(gate(norm(x))) * up(norm(x)))

In torch these are some ten operations a layer, each of which costs a small model more in dispatch than in arithmetic.
Here they are C over weights that were packed once (`pack`): for fp32 on a CPU, and for models whose weights its caches
hold. An output is one sum over the inputs in their order, so a row's result does not depend on the rows beside it.

Shapes: x [N, d] fp32, weights [out, in] as in `nn.Linear`; results are new tensors [N, out].
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.kernels.cpu.native import library

#: Outputs that lie together; PANEL in dense.c.
PANEL = 16


@dataclass(frozen=True)
class Packed:
    """A weight [outputs, inputs] in panels [panels, inputs, PANEL]; the last is padded with zeros."""

    panels: Tensor
    outputs: int
    inputs: int
    pointer: int


@dataclass(frozen=True)
class Norm:
    """An RMS norm's gain [d] and epsilon."""

    gain: Tensor
    eps: float
    pointer: int


def available() -> bool:
    """Whether the C code is there."""
    return _entries() is not None


def pack(weight: Tensor) -> Packed:
    """A copy of fp32 CPU weights [outputs, inputs] for the functions here."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"packed weights are fp32 on a CPU, not {weight.dtype} on {weight.device}")
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % PANEL))
    panels = padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
    return Packed(panels, outputs, inputs, panels.data_ptr())


def pack_norm(gain: Tensor, eps: float) -> Norm:
    """An RMS norm for the functions here; shares the gain's memory."""
    gain = gain.detach()
    return Norm(gain, eps, gain.data_ptr())


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _native().rms_norm(x.data_ptr(), x.shape[0], x.shape[1], norm.pointer, norm.eps, out.data_ptr())
    return out


def project(x: Tensor, norm: Norm | None, maps: tuple[Packed, ...]) -> list[Tensor]:
    """The results of one to three maps [N, outputs of each]."""
    x = x.contiguous()
    n = x.shape[0]
    outs = [torch.empty(n, one.outputs) for one in maps]
    where: list[int | None] = []
    for one, out in zip(maps, outs, strict=True):
        where += one.pointer, one.outputs, out.data_ptr()
    where += [None, 0, None] * (3 - len(maps))
    gain, eps = (norm.pointer, norm.eps) if norm is not None else (None, 0.0)
    _check(_native().project(x.data_ptr(), n, x.shape[1], gain, eps, *where))
    return outs


def project_add(x: Tensor, one: Packed, residual: Tensor, times: int = 1) -> Tensor:
    if times not in (0, 1, 2):
        raise ValueError(f"a residual is added up to twice, not {times} times")
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(residual)
    _native().project_add(
        x.data_ptr(), x.shape[0], one.inputs, one.pointer, one.outputs, residual.data_ptr(), times, out.data_ptr()
    )
    return out


def feed_forward(x: Tensor, norm: Norm, gate: Packed, up: Packed, down: Packed) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    native = _native()
    _check(
        native.feed_forward(
            x.data_ptr(), x.shape[0], gate.inputs, norm.pointer, norm.eps, gate.pointer, up.pointer, gate.outputs,
            down.pointer, out.data_ptr(),
        )
    )  # fmt: skip
    return out


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("a layer could not allocate its scratch space")


@dataclass(frozen=True)
class _Entries:
    rms_norm: Callable[..., int]
    project: Callable[..., int]
    project_add: Callable[..., int]
    feed_forward: Callable[..., int]


@cache
def _entries() -> _Entries | None:
    """The C functions, with their argument types said once."""
    native = library("dense")
    if native is None:
        return None
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    signatures = {
        "rms_norm": [pointer, integer, integer, pointer, real, pointer],
        "project": [pointer, integer, integer, pointer, real, *[pointer, integer, pointer] * 3],
        "project_add": [pointer, integer, integer, pointer, integer, pointer, integer, pointer],
        "feed_forward": [pointer, integer, integer, pointer, real, pointer, pointer, integer, pointer, pointer],
    }
    functions: dict[str, Callable[..., int]] = {}
    for name, arguments in signatures.items():
        function = getattr(native, f"fastblt_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_int
        functions[name] = function
    return _Entries(**functions)


def _native() -> _Entries:
    entries = _entries()
    if entries is None:
        raise RuntimeError("this machine has no C compiler for the fused layers; ask `available` first")
    return entries
