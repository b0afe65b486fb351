from __future__ import annotations

import torch
from torch import Tensor

from fastblt.server.engine.device.cuda_graphs import CudaGraphs


def test_a_key_replays_its_first_function_over_new_columns() -> None:
    graphs = CudaGraphs(torch.device("cpu"))
    made: list[str] = []

    def double(columns: Tensor) -> Tensor:
        made.append("double")
        return columns * 2

    def never(columns: Tensor) -> Tensor:
        raise AssertionError("the key has a function already")

    first = torch.arange(4, dtype=torch.int32)
    assert graphs.run(("a", 4), first, double).tolist() == [0, 2, 4, 6]
    assert graphs.run(("a", 4), first + 1, never).tolist() == [2, 4, 6, 8]
    # Another key is another shape, and what was captured has kept nothing of the caller's memory.
    assert graphs.run(("a", 2), first[:2], double).tolist() == [0, 2]
    first.zero_()
    assert graphs.run(("a", 4), torch.full((4,), 5, dtype=torch.int32), never).tolist() == [10] * 4
