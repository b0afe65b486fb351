"""Captured graphs: a pass of one shape as one launch.

A decoder pass is some 170 kernels, most of them shorter than their launch. With rows padded to buckets there are few
shapes, and all that differs between two passes of one shape are the staged integers. So the first pass of a shape is
captured over a buffer that stays, and later ones copy their integers there and replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Runs before a capture: compiles kernels, and lets libraries allocate what a capture may not.
_WARM_UPS = 2


@dataclass
class _Captured:
    columns: Tensor
    result: Tensor
    replay: Callable[[], None]


class CudaGraphs:
    """Functions of staged columns, captured once per key. On a device without graphs the same calls run one by one.

    A function given under a key must do the same for every call: what it reads besides its columns lies at addresses
    that stay, and the shapes of all it makes follow from the key. All graphs share their memory: a result is good until
    the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self._capture = self._one_by_one
        if device.type == "cuda":
            self._capture = self._on_cuda
            self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, _Captured] = {}

    def run(self, key: Hashable, columns: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function(columns)`."""
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(columns.clone(), function)
        captured.columns.copy_(columns)
        captured.replay()
        return captured.result

    def _on_cuda(self, columns: Tensor, function: Callable[[Tensor], Tensor]) -> _Captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function(columns)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function(columns)
        return _Captured(columns, result, graph.replay)

    def _one_by_one(self, columns: Tensor, function: Callable[[Tensor], Tensor]) -> _Captured:
        result = function(columns)

        def replay() -> None:
            # The first call's function over the buffer that stays, as a graph would.
            result.copy_(function(columns))

        return _Captured(columns, result, replay)
