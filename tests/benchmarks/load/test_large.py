from __future__ import annotations

import os
import subprocess
import sys

from fastblt.benchmarks.load.large import descendants, own_memory

# A fresh interpreter has no freed memory that the block could lie in, as a process of other tests may have.
BLOCK_OF_256_MIB = "block = b'x' * 2**28; print(len(block), flush=True); input()"


def test_memory_of_a_process_is_counted_without_files() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCK_OF_256_MIB], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        size = int(process.stdout.readline())
        assert size <= own_memory(process.pid) < 1.5 * size
        process.communicate(b"\n")
    assert own_memory(process.pid) == own_memory(2**22 + 1) == 0


def test_descendants_of_this_process_are_none_of_others() -> None:
    assert os.getpid() in descendants(os.getppid()) and os.getpid() not in descendants(os.getpid())
