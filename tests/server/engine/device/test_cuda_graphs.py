from __future__ import annotations

import torch
from torch import Tensor

from fastblt.server.engine.device.cuda_graphs import CudaGraphs


def test_a_key_replays_its_first_function_over_what_it_reads() -> None:
    graphs = CudaGraphs(torch.device("cpu"))
    columns = torch.arange(4, dtype=torch.int32)

    def double() -> tuple[Tensor, ...]:
        return columns * 2, columns + 1

    def never() -> tuple[Tensor, ...]:
        raise AssertionError("the key has a function already")

    assert [made.tolist() for made in graphs.run(("a", 4), double)] == [[0, 2, 4, 6], [1, 2, 3, 4]]
    columns += 1
    assert [made.tolist() for made in graphs.run(("a", 4), never)] == [[2, 4, 6, 8], [2, 3, 4, 5]]
    # Another key is another shape.
    assert graphs.run(("a", 2), lambda: (columns[:2] * 2,))[0].tolist() == [2, 4]
    assert len(graphs) == 2
