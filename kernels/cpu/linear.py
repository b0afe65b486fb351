"""x W^T on a CPU for weights that do not fit the caches: kept as narrow as they come, multiplied and summed in fp32.

A pass of few rows waits for its weights, so bytes saved are time saved. The C code reads weights once, as one stream,
and widens them in registers; for many rows it widens a part of them once for all. Widening is exact, and an output is
one sum over the inputs in their order. So results over bfloat16 and float16 are, bit for bit, those over the same
values in float32, and a row's result does not depend on the rows beside it.

int8 is not exact. Inputs are cut into groups of `GROUP`. Of each group, an output's weights are whole numbers from -127
to 127 times a scale, and so is a row of x, quantized when it comes. (After LLM.int8, arXiv 2208.07339, where scales are
one a row: with groups an input that is far larger than the others costs precision in its own group only.)

Layout: panels of `WIDTH` outputs, the last padded with zeros. float32 and float16: [panel][input][WIDTH]. bfloat16 the
same, but outputs i and i + 16 are neighbors. int8: [panel][group], each WIDTH scales (fp32), then
[GROUP / 4][WIDTH][4].

Shapes: x [N, inputs] fp32, W [outputs, inputs] as in `nn.Linear`; returns a new tensor [N, outputs], fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.kernels.cpu import large_pages
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import threads

#: Outputs that lie together, and inputs that share scales; as in narrow.h and linear_int8.c.
WIDTH, GROUP = 32, 128


class Storage(StrEnum):
    """How weights are stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self]


_DTYPES = {
    Storage.FLOAT32: torch.float32,
    Storage.BFLOAT16: torch.bfloat16,
    Storage.FLOAT16: torch.float16,
    Storage.INT8: torch.int8,
}
#: The number of a type in narrow.h.
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Weights:
    """Packed weights of a map: `data` has the layout above, [panels, ...].

    `lost`: the largest share of an output's weights that became nothing in int8.
    """

    data: Tensor
    outputs: int
    inputs: int
    storage: Storage
    lost: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def pack_weights(weight: Tensor, storage: Storage) -> Weights:
    """Weights [outputs, inputs] of a floating dtype on a CPU, in a layout of their own. The original is left alone."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.device.type != "cpu":
        raise ValueError(f"a map's weights are a matrix of floats on a CPU, not {weight.dtype} on {weight.device}")
    outputs, inputs = weight.shape
    source = weight.detach().to(torch.float32 if storage == Storage.INT8 else storage.dtype).contiguous()
    panels, groups = -(-outputs // WIDTH), -(-inputs // GROUP)
    native, lost = library(), 0.0
    if native is None and storage == Storage.INT8:
        data, lost = _pack_int8(source)
    elif native is None:
        data = _pack(source)
    elif storage == Storage.INT8:
        data = large_pages.empty((panels, groups, 4 * WIDTH + WIDTH * GROUP), torch.int8)
        lost = native.fastblt_pack_int8(source.data_ptr(), outputs, inputs, threads(), data.data_ptr())
    else:
        data = large_pages.empty((panels, inputs, WIDTH), storage.dtype)
        number = NUMBERS[storage.dtype]
        native.fastblt_pack(source.data_ptr(), number, outputs, inputs, threads(), data.data_ptr())
    return Weights(data, outputs, inputs, storage, lost)


def unpack_weights(weights: Weights) -> Tensor:
    """The values [outputs, inputs] that packed weights stand for, fp32."""
    data = weights.data
    if weights.storage == Storage.INT8:
        scales, whole = _parts(data)
        values = whole * scales[..., None]  # [panels, groups, WIDTH, GROUP]
        values = values.transpose(1, 2).reshape(-1, values.shape[1] * GROUP)
    else:
        values = data.float()
        if weights.storage == Storage.BFLOAT16:
            values = values.unflatten(-1, (16, 2)).transpose(-1, -2).flatten(-2)
        values = values.transpose(1, 2).reshape(-1, weights.inputs)
    return values[: weights.outputs, : weights.inputs].contiguous()


def linear(x: Tensor, weights: Weights) -> Tensor:
    """x W^T. In C a row's result does not depend on the others. Raises MemoryError."""
    native = library()
    if native is None:
        return _linear_int8(x, weights) if weights.storage == Storage.INT8 else F.linear(x, unpack_weights(weights))
    x = x.contiguous()
    out = torch.empty(x.shape[0], weights.outputs)
    rows, data = (x.data_ptr(), x.shape[0], weights.inputs), weights.data.data_ptr()
    if weights.storage == Storage.INT8:
        failed = native.fastblt_linear_int8(*rows, data, weights.outputs, threads(), out.data_ptr())
    else:
        number = NUMBERS[weights.storage.dtype]
        failed = native.fastblt_linear(*rows, data, number, weights.outputs, threads(), out.data_ptr())
    if failed:
        raise MemoryError("a linear map could not allocate its scratch space")
    return out


# The same in torch.


def _pack(weight: Tensor) -> Tensor:
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % WIDTH)).view(-1, WIDTH, weight.shape[1]).transpose(1, 2)
    if weight.dtype == torch.bfloat16:
        padded = padded.unflatten(-1, (2, 16)).transpose(-1, -2).flatten(-2)
    return padded.contiguous()


def _pack_int8(weight: Tensor) -> tuple[Tensor, float]:
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % GROUP, 0, -outputs % WIDTH)).unflatten(-1, (-1, GROUP))
    whole, scales = quantize(padded)
    lost = float(((whole == 0) & (padded != 0)).flatten(1).sum(1).max() / inputs)
    whole = whole.view(-1, WIDTH, scales.shape[1], GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    scales = scales.view(-1, WIDTH, scales.shape[1]).transpose(1, 2).contiguous()
    return torch.cat((scales.view(torch.int8), whole.to(torch.int8).flatten(2)), -1), lost


def _parts(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [panels, groups, WIDTH] and whole numbers [panels, groups, WIDTH, GROUP] of int8 weights, fp32."""
    scales, whole = data[..., : 4 * WIDTH].contiguous().view(torch.float32), data[..., 4 * WIDTH :]
    return scales, whole.unflatten(-1, (GROUP // 4, WIDTH, 4)).transpose(2, 3).flatten(3).float()


def quantize(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 [..., GROUP] and scales [...] of groups [..., GROUP], fp32."""
    most = groups.abs().amax(-1)
    finite = torch.isfinite(most)
    by = torch.where((most > 1e-36) & finite, 127.0 / most, 0.0)[..., None]
    whole = torch.where(by > 0, groups * by, 0.0).round()
    return whole, torch.where(finite, most / 127.0, torch.nan)


def _linear_int8(x: Tensor, weights: Weights) -> Tensor:
    scales, values = _parts(weights.data)
    whole, own = quantize(F.pad(x, (0, -weights.inputs % GROUP)).unflatten(-1, (-1, GROUP)))
    # [groups, N, outputs]: sums of whole numbers, which are exact.
    sums = torch.einsum("ngk,pgok->gnpo", whole, values).flatten(2)
    each = sums * scales.permute(1, 0, 2).flatten(1)[:, None] * own.T[..., None]
    return each.sum(0)[:, : weights.outputs]
