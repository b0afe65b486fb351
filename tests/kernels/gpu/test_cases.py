"""The Triton kernels under their interpreter, in processes of their own: it must be chosen before triton is imported.

By hand: FASTBLT_KERNELS=triton python -m pytest tests/kernels/gpu/cases/selection_cases.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")


def run(*names: str, device: str = "cpu") -> None:
    """Run cases in a process of their own, on the CPU under the interpreter."""
    environment = os.environ | {"FASTBLT_KERNELS": "triton", "FASTBLT_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = str(int(device == "cpu"))
    # The outer run's plugin settings are not for the inner one.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--durations=5"]
    done = subprocess.run(
        [*command, *(str(CASES / f"{name}_cases.py") for name in names)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_selection_unmasking_and_verification() -> None:
    run("selection", "unmasking", "verification")


def test_attention_and_hash_embedding() -> None:
    run("attention", "hash_embedding")


def test_merged_modules_and_rounds() -> None:
    run("merged", "rounds", "filtering", "row_draws")


def test_the_whole_engine() -> None:
    run("engine")
