"""The process of a rank other than 0: `python -m fastblt.server.engine.device.follower`, with its channel as standard
input.

It runs its share of the global transformer in every pass that rank 0 announces, until rank 0 is gone.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys

import numpy as np
import torch
import torch.distributed as dist

from fastblt.kernels.cpu.threads import set_threads
from fastblt.models.blt import GlobalTransformer
from fastblt.models.packed import pack_maps
from fastblt.models.tensor_parallel import split_transformer
from fastblt.server.engine.cache.kv_caches import CacheGroup, PageTables
from fastblt.server.engine.device.forward import GroupAttention, Rows
from fastblt.server.engine.device.ranks import Copy, Join, Order, Prepare, Run, meet
from fastblt.server.engine.device_queue import DeviceQueue
from fastblt.server.framing import Unpacker

#: Of prctl(2): the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1

_CHUNK = 1 << 16


def main() -> int:
    """Run the process; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A terminal and a service manager signal every process; this one ends with rank 0.
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    channel = socket.socket(fileno=0)
    unpacker: Unpacker[Order] = Unpacker(Order)
    follower: Follower | None = None
    while data := channel.recv(_CHUNK):
        for order in unpacker.feed(data):
            if isinstance(order, Join):
                follower = Follower(order)
                continue
            assert follower is not None, "the first order must be Join"
            follower.obey(order)
    return 0


class Follower:
    """One rank: its weights, which it gets from rank 0, and its pages. Raises RuntimeError if the ranks cannot meet."""

    def __init__(self, join: Join) -> None:
        self._config = join.config
        self._device = torch.device(join.device)
        self._dtype: torch.dtype = getattr(torch, join.dtype)
        self._size = join.size
        if self._device.type == "cpu":
            torch.set_num_threads(join.threads)
        else:
            torch.cuda.set_device(self._device)
        exchange = meet(join.store, join.rank, join.size, self._device)
        self._transformer: GlobalTransformer = split_transformer(join.config, exchange, exact=join.exact)
        weights = {
            name: torch.empty(shape.shape, dtype=getattr(torch, dtype), device=self._device)
            for (name, shape), dtype in zip(self._transformer.state_dict().items(), join.dtypes, strict=True)
        }
        for weight in weights.values():
            dist.recv(weight, 0)
        self._transformer.load_state_dict(weights, assign=True)
        self._transformer.eval().requires_grad_(False)
        if join.weights is not None:
            set_threads(join.threads)
            pack_maps(self._transformer, join.weights, prefix="global_transformer.")
        self._width = join.config.encoder.hidden_size * join.config.cross_attn_k
        self._group: CacheGroup | None = None

    def obey(self, order: Order) -> None:
        match order:
            case Prepare():
                self._prepare(order)
            case Copy():
                assert self._group is not None
                self._group.copy(order.source, order.target, order.count)
            case Run():
                self._run(order)

    def _prepare(self, order: Prepare) -> None:
        stack = self._config.global_
        shape = (2, stack.num_kv_heads // self._size, stack.head_dim)
        pages = -(-order.max_length // order.page_size)
        tables = PageTables(1, order.rows, pages, DeviceQueue(self._device))
        self._group = CacheGroup(
            "global", order.pages, order.page_size, tables, 0, [shape] * stack.num_layers, self._dtype, stack.window
        )
        self._attended = GroupAttention(self._group, stack, order.max_length, self._device, order.tiled)

    @torch.inference_mode()
    def _run(self, order: Run) -> None:
        group = self._group
        assert group is not None
        owners = np.frombuffer(order.owners, np.int32)
        table = np.frombuffer(order.table, np.int32).reshape(len(owners), -1)
        group.table[owners, : table.shape[1]] = table
        group.tables.send_whole()
        # Copied: torch wants memory that it may write to.
        columns = np.frombuffer(order.columns, np.int32).reshape(3, -1).copy()
        of, positions, highs = torch.from_numpy(columns).to(self._device).unbind()
        vectors = torch.empty(columns.shape[1], self._width, dtype=self._dtype, device=self._device)
        dist.broadcast(vectors, 0)
        self._transformer(vectors, self._attended.attend(Rows(of, positions, positions, highs, order.spans)))


def _end_with_parent() -> None:
    """End this process with its parent, even when it is stopped or within a pass."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
