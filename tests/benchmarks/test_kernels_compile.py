"""Every Triton kernel compiles for real GPUs without one: no spills, matrix instructions and asynchronous copies."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.kernels import compile_all, faults


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
def test_kernels_compile_for_both_makers() -> None:
    results = compile_all(["sm_90", "gfx942"])
    assert {result["target"] for result in results} == {"sm_90", "gfx942"}
    assert not [(result["kernel"], result["target"], faults(result)) for result in results if faults(result)]
    names = {result["kernel"].split()[0] for result in results}
    assert names == {"select", "unmask", "verify", "attend", "write", "merge", "hash"}
