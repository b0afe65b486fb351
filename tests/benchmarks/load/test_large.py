from __future__ import annotations

import os

import numpy as np

from fastblt.benchmarks.load.large import descendants, own_memory


def test_memory_of_a_process_is_counted_without_files() -> None:
    before = own_memory(os.getpid())
    block = np.ones(2**28, dtype=np.uint8)
    assert own_memory(os.getpid()) - before > 0.9 * block.nbytes
    assert own_memory(2**22 + 1) == 0


def test_descendants_of_this_process_are_none_of_others() -> None:
    assert os.getpid() in descendants(os.getppid()) and os.getpid() not in descendants(os.getpid())
