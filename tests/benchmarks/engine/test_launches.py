"""Copies and launches of a pass, counted on a tiny model's Triton kernels in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastblt.models.checkpoint import save_checkpoint
from tests.tiny import shallow_model


def test_one_copy_back_a_pass(tmp_path: Path) -> None:
    save_checkpoint(shallow_model(3), tmp_path / "model")
    file = tmp_path / "launches.json"
    few = ["--passes", "4", "--requests", "1", "--json", str(file)]
    command = [sys.executable, "-m", "fastblt.benchmarks.engine.launches", "--model", str(tmp_path / "model"), *few]
    environment = os.environ | {"FASTBLT_KERNELS": "triton", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    methods = json.loads(file.read_text())["methods"]
    assert len(methods) == 4
    for name, parts in methods.items():
        # BLT-D cannot know beforehand which step fills a block: the scan that follows is a copy of its own.
        assert parts["all"]["to host"] == 1.0 or (name.startswith("blt-d-") and parts["all"]["to host"] < 2.0), name
        for part in ("encode", "decode", "choose", "entropies", "upstream"):
            assert "to host" not in parts.get(part, {}), (name, part)
        assert parts["decode"]["triton"] > 0 and parts["choose"]["triton"] in (1.0, 1.5, 2.0), name
