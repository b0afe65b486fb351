"""What an operator wants to know of an engine when it has been loaded."""

from __future__ import annotations

import torch

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu import native
from fastblt.kernels.cpu.threads import threads
from fastblt.models.blt import Blt
from fastblt.server.engine.device.devices import dtype_of
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.stats import EngineAbout


def about(engine: Engine) -> EngineAbout:
    """The size of the model, where and by which code it is computed, and what the caches take."""
    settings = engine.settings
    device = torch.device(settings.device)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Blt(engine.config).parameters())
    if use_triton(device):
        code = "Triton kernels"
    elif device.type == "cpu":
        count = threads()
        code = f"{count} thread{'s' if count > 1 else ''}, {native.status()}"
    else:
        code = "torch"
    dtype = str(dtype_of(settings.dtype, device)).removeprefix("torch.")
    return EngineAbout(weights, dtype, settings.device, code, engine.cache_bytes)
