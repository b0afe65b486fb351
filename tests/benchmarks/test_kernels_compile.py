"""Every Triton kernel compiles for real GPUs without one, and moves hardly more bytes than it must."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import compile_all, faults

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")


def test_kernels_compile_for_both_makers() -> None:
    """No spills, and matrix instructions and asynchronous copies where they should be."""
    results = compile_all(["sm_90", "gfx942"])
    assert {result["target"] for result in results} == {"sm_90", "gfx942"}
    assert not [(result["kernel"], result["target"], faults(result)) for result in results if faults(result)]
    names = {result["kernel"].split()[0] for result in results}
    assert names == {"select", "unmask", "verify", "attend", "write", "merge", "hash"}


def test_kernels_read_their_arguments_about_once() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--traffic"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 9
