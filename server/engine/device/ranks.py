"""Tensor parallelism of the global transformer: this process, rank 0, leads, and the other ranks follow its passes.

Everything but the global transformer runs here alone: what the others would compute of it is the same, and they need
none of it. For a pass of closed patches, rank 0 tells the others where the rows stand (a frame over a Unix socket) and
what the patches were pooled to (a broadcast); each rank then runs its share of the layers (`models.tensor_parallel`)
over its own heads' pages. Page numbers are rank 0's, so the others keep no books.

Whatever goes wrong within a pass leaves the ranks in different places of it. So it ends the engine: RankLostError.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastblt.models.blt import Blt
from fastblt.models.config import BltConfig
from fastblt.models.layers import SelfAttend
from fastblt.models.tensor_parallel import check_split, split_transformer, split_weights
from fastblt.server.child_process import child_environment
from fastblt.server.engine.cache.kv_caches import CacheGroup
from fastblt.server.framing import Message, pack
from fastblt.server.settings import EngineSettings

#: Seconds that the ranks have to meet, and that one waits for another within a pass.
MEETING_SECONDS = 120.0

#: Seconds that a rank has to exit once its channel is closed.
_EXIT_SECONDS = 5.0

_COMMAND = (sys.executable, "-P", "-m", "fastblt.server.engine.device.follower")


class RankLostError(RuntimeError):
    """The ranks no longer run the same pass; no other pass can follow."""


class Join(Message):
    """The first message: who this rank is, where the ranks meet, and what of the model it runs."""

    rank: int
    size: int
    store: str
    config: BltConfig
    dtype: str
    device: str
    exact: bool
    threads: int
    #: In which order and dtypes the weights come, and how they are kept; None: as they come.
    dtypes: list[str]
    weights: str | None


class Prepare(Message):
    """Make the pages of the global transformer."""

    pages: int
    page_size: int
    rows: int
    max_length: int
    tiled: bool


class Copy(Message):
    """Copy the first `count` positions of one page to another, in every layer."""

    source: int
    target: int
    count: int


class Run(Message):
    """Run a pass of the global transformer. `columns` int32 [3, rows]: owners, positions, highs, as in `forward.Rows`.

    `owners` int32 are the state indexes that occur, `table` int32 [owners, pages] their rows of the page table.
    """

    columns: bytes
    spans: list[tuple[int, int]]
    owners: bytes
    table: bytes


Order = Join | Prepare | Copy | Run


class Collectives:
    """All-reduce and all-gather over the ranks of the process group."""

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)


def meet(store: str, rank: int, size: int, device: torch.device) -> Collectives:
    """Join the process group of all ranks on this machine. Raises RuntimeError when somebody does not come."""
    if sys.platform == "linux":
        # Ranks of one machine have nothing to say outside of it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=MEETING_SECONDS),
    )
    return Collectives(size)


def rank_device(name: str, rank: int) -> torch.device:
    """The device of a rank: GPUs are taken in order from the first one named."""
    device = torch.device(name)
    return torch.device(device.type, (device.index or 0) + rank) if device.type == "cuda" else device


class Leader(nn.Module):
    """Rank 0's share of the global transformer, in place of the whole; the other ranks run when it does.

    One to a process. Starts the other ranks and gives each its weights. Raises ConfigError if the transformer cannot
    be split, RuntimeError if a rank does not come.
    """

    def __init__(self, model: Blt, settings: EngineSettings, threads: int, kept: str | None) -> None:
        super().__init__()
        size, exact = settings.tensor_parallel_size, settings.deterministic
        check_split(model.config, size)
        self.size = size
        self._frame = b""
        self._folder = tempfile.TemporaryDirectory(prefix="fastblt-ranks-")
        self._channels: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        dtype = _name(model.dtype)
        store = str(Path(self._folder.name) / "store")
        weights = model.global_transformer.state_dict()
        dtypes = [_name(weight.dtype) for weight in weights.values()]
        atexit.register(self.close)
        try:
            for rank in range(1, size):
                self._start()
                theirs = str(rank_device(settings.device, rank))
                join = Join(rank, size, store, model.config, dtype, theirs, exact, threads, dtypes, kept)
                self._send(rank, join)
            device = rank_device(settings.device, 0)
            exchange = meet(store, 0, size, device)
            for rank in range(1, size):
                for part in split_weights(weights, rank, size, exact=exact).values():
                    dist.send(part.to(device), rank)
            self.transformer = split_transformer(model.config, exchange, exact=exact)
            self.transformer.load_state_dict(split_weights(weights, 0, size, exact=exact), assign=True)
            self.transformer.eval().requires_grad_(False)
        except BaseException:
            self.close()
            raise

    def share(self, config: BltConfig) -> BltConfig:
        """`config` with the heads of keys and values that one rank has pages for."""
        stack = config.global_
        return replace(config, global_=replace(stack, num_kv_heads=stack.num_kv_heads // self.size))

    def prepare(self, group: CacheGroup, max_length: int, tiled: bool) -> None:
        """Let the others make pages like `group`'s, and from then on copy what it copies."""
        rows = group.table.shape[0]
        self._tell(pack([Prepare(group.pool.size, group.page_size, rows, max_length, tiled)]))
        group.on_copy = lambda source, target, count: self._tell(pack([Copy(source, target, count)]))

    def announce(self, columns: np.ndarray, spans: list[tuple[int, int]], group: CacheGroup) -> None:
        """Where the rows of the next pass stand: int32 [3, rows], owners, positions and highs."""
        owners = np.unique(columns[0])
        pages = -(-int(columns[2].max()) // group.page_size)
        table = np.ascontiguousarray(group.table[owners, :pages])
        self._frame = pack([Run(columns.tobytes(), spans, owners.tobytes(), table.tobytes())])

    def forward(self, vectors: Tensor, attend: SelfAttend) -> Tensor:
        """Latents [P, dg] of the announced patches' vectors [P, k*d]. Raises RankLostError."""
        self._tell(self._frame)
        vectors = vectors.contiguous()
        try:
            dist.broadcast(vectors, 0)
            return self.transformer(vectors, attend)
        except Exception as error:
            raise RankLostError(f"the ranks failed in a pass of the global transformer: {error}") from error

    def close(self) -> None:
        """End the other ranks, and the process group."""
        atexit.unregister(self.close)
        for channel in self._channels:
            channel.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_SECONDS)
            process.kill()
            process.wait()
        self._folder.cleanup()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._channels.append(ours)
        with theirs:
            self._processes.append(subprocess.Popen(_COMMAND, stdin=theirs.fileno(), env=child_environment()))

    def _send(self, rank: int, order: Order) -> None:
        self._channels[rank - 1].sendall(pack([order]))

    def _tell(self, frame: bytes) -> None:
        for rank, channel in enumerate(self._channels, 1):
            try:
                channel.sendall(frame)
            except OSError as error:
                raise RankLostError(f"rank {rank} is gone") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def leader_of(model: Blt) -> Leader | None:
    """The leader that stands in place of a model's global transformer, if one does."""
    transformer = model.get_submodule("global_transformer")
    return transformer if isinstance(transformer, Leader) else None


def spread(model: Blt, settings: EngineSettings, threads: int, kept: str | None = None) -> None:
    """Spread a model, on the CPU, over `tensor_parallel_size` ranks; this one's part goes to its device. As Leader.

    The others pack their parts as `kept` says (`packed.WEIGHTS`); None: they do not.
    """
    model.add_module("global_transformer", Leader(model, settings, threads, kept))
    model.to(rank_device(settings.device, 0))
