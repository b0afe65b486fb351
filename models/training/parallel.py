"""Processes and devices of a run: `torchrun` starts the processes, FSDP2 (`fully_shard`) shards the model over them.

Every process holds a share of each parameter, its gradient and the optimizer's state, in fp32, and gathers the whole
parameters, in the type that the step computes in, when it needs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


@dataclass(frozen=True)
class World:
    """This process's number, how many there are, its device, and the type that steps compute in."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def sharded(self) -> bool:
        return dist.is_initialized()

    def mine(self, groups: int) -> range:
        """The numbers of the micro-batches of a step that this process takes. All processes take as many."""
        share = groups // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a vector over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, module: nn.Module, layers: Iterable[nn.Module], ignored: Iterable[nn.Parameter]) -> None:
        """Move a module to the device and shard its parameters but the `ignored` ones. `layers` are gathered one after
        another, everything else at once."""
        module.to(self.device)
        if not self.sharded:
            return
        mesh = init_device_mesh(self.device.type, (self.size,))
        low = self.dtype != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,
        )
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(ignored))


def ranks() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(dtype: torch.dtype | None = None) -> Iterator[World]:
    """Take one's place among the processes. Steps compute in `dtype`, by default fp32 on CPUs and bf16 on GPUs."""
    rank, size = int(os.environ.get("RANK", "0")), ranks()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # A user may suspend a process for a long time. The others must wait for it.
    patience = timedelta(days=1)
    if size > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=patience)
    elif dtype != torch.float32:
        # One process computes in bf16 over fp32 weights by the same means.
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    try:
        yield World(rank, size, device, dtype)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
