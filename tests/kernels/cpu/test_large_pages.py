from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from fastblt.kernels.cpu.large_pages import LARGE, empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (LARGE,), (3, LARGE // 3, 2), (5, LARGE + 1)])
def test_all_of_it_can_be_used(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = empty(shape, dtype), empty(shape, dtype)
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    assert first.nbytes == math.prod(shape) * dtype.itemsize
    first.fill_(3), second.fill_(4)
    assert bool((first == 3).all())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_it_takes_no_more_memory_than_asked_for_and_gives_it_back() -> None:
    gc.collect()
    before = resident()
    each = LARGE + LARGE // 8
    tensors = [empty((each,), torch.int8).fill_(1) for _ in range(30)]
    assert resident() - before < 1.1 * 30 * each
    del tensors
    assert resident() - before < 0.2 * 30 * each
