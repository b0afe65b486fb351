"""x W^T for a few rows on a CPU, in fp32: reading W is what costs, and it is read once, as fast as memory gives it.

torch multiplies a few rows by a matrix product that is made for many, and two rows of a large map cost it twice one.
Here more rows cost nothing until the processor cannot multiply as fast as it reads. A row's result does not depend
on the rows beside it.

Shapes: x [N, inputs] fp32, W [outputs, inputs] fp32 as in `nn.Linear`, contiguous; returns a new tensor [N,
outputs].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastblt.kernels.cpu.native import require
from fastblt.kernels.cpu.threads import threads

#: Most rows of a pass for which models use it; torch's product may be faster beyond.
FEW = 64


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T.

    Raises RuntimeError where there is no C code, ValueError for weights that are not fp32, contiguous and on a CPU.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        raise ValueError(f"weights must be contiguous fp32 on a CPU, not {weight.dtype} on {weight.device}")
    x = x.contiguous()
    outputs, inputs = weight.shape
    out = torch.empty(x.shape[0], outputs)
    require().fastblt_linear(x.data_ptr(), x.shape[0], inputs, weight.data_ptr(), outputs, threads(), out.data_ptr())
    return out
