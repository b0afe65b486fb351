"""What a GPU would do, counted by the program itself: few kernels a pass, one wait a round, few copies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastblt.benchmarks.savings import gpu_prediction
from fastblt.kernels.cpu.native import library

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or library() is None, reason="needs Triton and a C compiler"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # In a process of its own: it chooses Triton's interpreter.
    file = tmp_path_factory.mktemp("prediction") / "prediction.json"
    few = ["--shape", "1b", "--chip", "H200", "--batch", "1", "--input-len", "60", "--length", "40"]
    command = [sys.executable, "-m", "fastblt.benchmarks.savings.gpu_prediction", *few, "--json", str(file)]
    environment = os.environ | {"FASTBLT_KERNELS": "triton", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    return json.loads(file.read_text())


def test_requests_too_short_for_a_draft_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--length 8 .* give 33 or more"):
        gpu_prediction.measure(length=8)


def test_kernels_of_a_pass(result: Any) -> None:
    counted = result["kernels"]["1b"]
    assert counted["decode"] <= 125 and counted["upstream"] <= 350
    # A layer is nine kernels, or thirteen with a cross-attention.
    assert counted["scan"] <= 9 * 14 + 6 and counted["encode"] <= 9 + 4


def test_copies_and_waits(result: Any) -> None:
    for name, run in result["runs"].items():
        assert run["copies"] <= run["waits"] + 1, name
        assert run["waits"] < run["bytes"], name


def test_faster_than_before_and_slower_than_reading(result: Any) -> None:
    for name, rates in result["predicted"].items():
        assert 100 < rates["1"] < rates["floor"], name
