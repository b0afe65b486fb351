"""Loads the model that settings name, and makes its modules run as they run best on this machine."""

from __future__ import annotations

import torch

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.threads import cores, set_threads
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.checkpoint import checkpoint_folder, load_checkpoint, read_config
from fastblt.models.config import BltConfig
from fastblt.models.fused import fuse
from fastblt.models.merged import merge
from fastblt.models.packed import WEIGHTS, is_packed, pack_maps
from fastblt.server.engine.device.devices import device_of, dtype_of
from fastblt.server.engine.device.ranks import spread
from fastblt.server.settings import EngineSettings

#: Models of fewer weights run fused layers, which copy their weights, and one thread of torch.
_SMALL = 50_000_000

#: Counted before an engine changes what torch found.
_CORES = cores()

#: Weights that the fused layers of a small model can have: the processor's caches hold them as they are.
_FUSED = ("auto", "float32")


def load_model(settings: EngineSettings) -> Blt:
    """The model of the settings' checkpoint. Raises CheckpointError, ConfigError or ValueError."""
    place = device_of(settings.device)
    dtype = dtype_of(settings.dtype, place)
    if place.type == "cuda":
        # What has no index of its own, as a library's memory, goes to the current device.
        torch.cuda.set_device(place)
    if (size := settings.tensor_parallel_size) < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, not {size}")
    # Weights that will be spread need not fit one device.
    device = str(place) if size == 1 else "cpu"
    weights = _weights(settings, dtype)
    folder = checkpoint_folder(settings.model, revision=settings.revision)
    small = _small(read_config(folder))
    if small and weights in _FUSED:
        weights = None
    model = load_checkpoint(folder, dtype=dtype, device=device, weights=weights, pack=size == 1)
    if size > 1:
        spread(model, settings, 1 if small else _threads(settings), weights)
    return model


def prepare(model: Blt, settings: EngineSettings) -> None:
    """Set the threads that suit the model on a CPU, and have its modules run as C: the weights of a large one that are
    not packed yet are, and given up as they were. On a GPU, which becomes the current one, they run merged."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Beside 16-bit modules the entropy model alone has fp32 products; in TF32 hardly a boundary moves
        # (`benchmarks/checkpoint/patch_precision.py`).
        narrow = model.dtype != torch.float32
        torch.backends.cuda.matmul.allow_tf32 = narrow and not settings.deterministic
    if use_triton(device):
        merge(model, invariant=settings.deterministic)
    if use_triton(device) or device.type != "cpu":
        return
    threads, small = _threads(settings), _small(model.config)
    # An operation of torch is shorter there than waking a second thread for it; a share of a pass is not.
    torch.set_num_threads(1 if small else threads)
    set_threads(threads)
    if small and settings.weights in _FUSED and not is_packed(model):
        fuse(model)
    elif model.dtype == torch.float32:
        pack_maps(model, settings.weights)
    else:
        pack_maps(model.patcher, prefix="patcher.")


def _weights(settings: EngineSettings, dtype: torch.dtype) -> str | None:
    """`settings.weights` where they are packed; None: weights have the dtype of arithmetic. Raises ValueError."""
    if settings.weights not in WEIGHTS:
        raise ValueError(f"weights must be {', '.join(WEIGHTS)}, not {settings.weights!r}")
    if torch.device(settings.device).type == "cpu" and dtype == torch.float32:
        return settings.weights
    if settings.weights != "auto":
        raise ValueError(f"weights {settings.weights} need a CPU and dtype float32; elsewhere dtype is that of weights")
    return None


def _small(config: BltConfig) -> bool:
    parameters = ModuleParameters.of(config)
    return parameters.patcher + parameters.encoder + parameters.global_ + parameters.decoder < _SMALL


def _threads(settings: EngineSettings) -> int:
    """Threads of this process: the settings', or an equal share of the cores for every rank."""
    return settings.threads or max(1, _CORES // settings.tensor_parallel_size)
