"""Devices by name, and how they fail."""

from __future__ import annotations

import torch

from fastblt.models.checkpoint import check_device

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: cudaErrorMemoryAllocation: the one error of a GPU's runtime after which it goes on.
_NO_MEMORY = 2


class DeviceLostError(RuntimeError):
    """The device failed in a way after which none of its calls succeeds."""


def device_of(name: str) -> torch.device:
    """The device of that name, a GPU with its index. Raises ValueError if there is none here."""
    check_device(name)
    device = torch.device(name)
    if device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; by default what suits the device. Raises ValueError."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype must be {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def is_lost(error: Exception) -> bool:
    """Whether a pass failed because its device is lost."""
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) != _NO_MEMORY


def out_of_memory(error: Exception) -> bool:
    """Whether a pass failed for want of memory."""
    if isinstance(error, torch.AcceleratorError):
        return not is_lost(error)
    # The allocator of CPU tensors raises no type of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
