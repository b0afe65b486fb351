"""Every Triton kernel compiles for real GPUs without one, and moves hardly more bytes than it must."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys

import pytest
import torch

from fastblt.benchmarks.kernels.compile import TARGETS, compile_all, faults
from fastblt.benchmarks.kernels.run import gpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")


def test_kernels_compile_for_every_target() -> None:
    """No spills, and matrix instructions and asynchronous copies where they should be."""
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = compile_all(list(TARGETS))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Two processes at a time: 50 seconds on an idle machine of two cores.
    assert spent.ru_utime + spent.ru_stime - begun.ru_utime - begun.ru_stime < 100
    assert {result["target"] for result in results} == set(TARGETS) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [(result["kernel"], result["target"], faults(result)) for result in results if faults(result)]
    names = {result["kernel"].split()[0] for result in results}
    of_layers = {"norm", "norms", "swiglu", "begin", "finish", "cross", "store", "peak", "pool", "linear", "entropy"}
    of_rounds = {"select", "unmask", "verify", "place", "settle", "row", "turn", "next"}
    assert names == of_layers | of_rounds | {"attend", "write", "merge", "hash"}


#: What `traffic` and `gpu` report, and that no kernel is without a case.
_CODE = """
import importlib, pkgutil
import fastblt.kernels.gpu
from fastblt.benchmarks.kernels.run import speed, traffic
from triton.runtime.interpreter import GridExecutor

launched, launch = set(), GridExecutor.__call__
GridExecutor.__call__ = lambda self, *given, **named: (launched.add(self.fn.__name__), launch(self, *given, **named))
assert traffic()["passed"]
speed(1, lambda: None)
names = [one.name for one in pkgutil.iter_modules(fastblt.kernels.gpu.__path__)]
modules = [importlib.import_module(f"fastblt.kernels.gpu.{name}") for name in names]
assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}, launched
"""


def test_kernels_read_their_arguments_about_once_and_are_timed() -> None:
    """In one process of the interpreter; timed are single calls."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two tables of as many cases.
    assert len(done.stdout.splitlines()) == 2 * (2 + 26)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu() == {"passed": False}
    assert "no GPU" in capsys.readouterr().err
