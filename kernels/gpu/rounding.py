"""Rounding to the type of a store, for all kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_stored(x, store):
    """fp32 `x` rounded to the element type of the pointer `store`, bf16 by hand: the interpreter would truncate."""
    if store.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(store.dtype.element_ty)
