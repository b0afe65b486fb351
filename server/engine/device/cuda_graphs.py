"""Captured graphs: a pass of one shape as one launch.

A decoder pass is over a hundred kernels, most of them shorter than their launch. With rows padded to buckets there are
few shapes, and all that differs between two passes of one shape are the staged integers, which always lie at one
address. So the first pass of a shape is captured, and later ones replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Runs before a capture: compiles kernels, and lets libraries allocate what a capture may not.
_WARM_UPS = 2


#: What a function of a graph makes.
Made = tuple[Tensor, ...]


@dataclass
class _Captured:
    result: Made
    replay: Callable[[], None]


class CudaGraphs:
    """Functions, captured once per key. On a device without graphs the same calls run one by one.

    A function given under a key must do the same for every call: all it reads lies at addresses that stay
    (`staging.Staging`), and the shapes of all it makes follow from the key. All graphs share their memory: a result is
    good until the next call.
    """

    def __init__(self, device: torch.device) -> None:
        self._capture = self._one_by_one
        if device.type == "cuda":
            self._capture = self._on_cuda
            self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Hashable, _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: Hashable, function: Callable[[], Made]) -> Made:
        """`function()`."""
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(function)
        captured.replay()
        return captured.result

    def _on_cuda(self, function: Callable[[], Made]) -> _Captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return _Captured(result, graph.replay)

    def _one_by_one(self, function: Callable[[], Made]) -> _Captured:
        result = function()

        def replay() -> None:
            # The first call's function over the memory that stays, as a graph would.
            for kept, new in zip(result, function(), strict=True):
                kept.copy_(new)

        return _Captured(result, replay)
