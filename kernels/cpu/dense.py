"""The dense part of a transformer layer over N rows, on a CPU, in fp32: norm, linear maps, and the sums around them.

    rms_norm      gain * (x / sqrt(mean(x^2) + eps))
    project       linear maps of the same rows, normed before where a norm is given
    project_add   x W^T + times * residual, for times of 0, 1 or 2
    feed_forward  x + down(silu(gate(norm(x))) * up(norm(x)))

In torch these are some ten operations a layer, each of which costs a small model more in dispatch than in
arithmetic. The C code reads weights that were packed once (`pack`), for models whose weights the processor's caches
hold. An output is one sum over the inputs in their order, so a row's result does not depend on the rows beside it.
Weights that bfloat16 can hold, which is the upper half of a float, are kept so, and widened as they are read: that
changes no bit of a result and reads half as much.

Shapes: x [N, d] fp32, weights [out, in] as in `nn.Linear`; results are new tensors [N, out]. All raise RuntimeError
where there is no C code.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.native import require

#: Outputs that lie together; PANEL in dense.h.
PANEL = 16


@dataclass(frozen=True)
class Packed:
    """A weight [outputs, inputs] in panels [panels, inputs, PANEL], the last of which is padded with zeros; or, where
    it is `narrow`, words of two bfloat16 each, int32 [panels, inputs, PANEL / 2] (dense.h). `struct` has it for C."""

    panels: Tensor
    struct: structs.Packed
    outputs: int
    inputs: int
    pointer: int


@dataclass(frozen=True)
class Norm:
    """An RMS norm's gain [d] and epsilon."""

    gain: Tensor
    eps: float
    pointer: int


def pack(weight: Tensor) -> Packed:
    """A copy of fp32 CPU weights [outputs, inputs] for the functions here."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"packed weights are fp32 on a CPU, not {weight.dtype} on {weight.device}")
    outputs, inputs = weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % PANEL))
    panels = padded.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
    bits = panels.view(torch.int32)
    if narrow := not (bits & 0xFFFF).any():
        low, high = bits[..., : PANEL // 2], bits[..., PANEL // 2 :]
        panels = low >> 16 & 0xFFFF | high
    struct = structs.Packed(panels.data_ptr(), narrow)
    return Packed(panels, struct, outputs, inputs, ctypes.addressof(struct))


def pack_norm(gain: Tensor, eps: float) -> Norm:
    """An RMS norm for the functions here; shares the gain's memory."""
    gain = gain.detach()
    return Norm(gain, eps, gain.data_ptr())


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """gain * (x / sqrt(mean(x^2) + eps)), [N, d]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    require().fastblt_rms_norm(x.data_ptr(), *x.shape, norm.pointer, norm.eps, out.data_ptr())
    return out


def project(x: Tensor, norm: Norm | None, maps: tuple[Packed, ...]) -> list[Tensor]:
    """The results of maps of the same rows, normed before where there is a norm: [N, outputs] of each.

    Raises MemoryError.
    """
    x = x.contiguous()
    outs = [torch.empty(x.shape[0], one.outputs) for one in maps]
    linears = (structs.Linear * len(maps))(
        *(structs.Linear(one.pointer, one.outputs, out.data_ptr()) for one, out in zip(maps, outs, strict=True))
    )
    gain, eps = (norm.pointer, norm.eps) if norm is not None else (None, 0.0)
    _check(require().fastblt_project(x.data_ptr(), *x.shape, gain, eps, linears, len(maps)))
    return outs


def project_add(x: Tensor, one: Packed, residual: Tensor, times: int = 1) -> Tensor:
    """x W^T + times * residual, [N, outputs]. Raises ValueError for `times` other than 0, 1 and 2."""
    if times not in (0, 1, 2):
        raise ValueError(f"a residual is added up to twice, not {times} times")
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty_like(residual)
    require().fastblt_project_add(
        x.data_ptr(), x.shape[0], one.inputs, one.pointer, one.outputs, residual.data_ptr(), times, out.data_ptr()
    )
    return out


def feed_forward(x: Tensor, norm: Norm, gate: Packed, up: Packed, down: Packed) -> Tensor:
    """x + down(silu(gate(norm(x))) * up(norm(x))), [N, d]. Raises MemoryError."""
    x = x.contiguous()
    out = torch.empty_like(x)
    weights = (norm.pointer, norm.eps, gate.pointer, up.pointer, gate.outputs, down.pointer)
    _check(require().fastblt_feed_forward(x.data_ptr(), x.shape[0], gate.inputs, *weights, out.data_ptr()))
    return out


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("a layer could not allocate its scratch space")
