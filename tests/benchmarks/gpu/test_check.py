"""`make gpu-check` where there is no GPU: it says at once what it would do, and its parts run at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastblt.benchmarks.gpu import check


def test_a_dry_run_takes_a_second(tmp_path: Path) -> None:
    began = time.process_time()
    command = [sys.executable, "-m", "fastblt.benchmarks.gpu.check", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Processor time of this process alone says little; that nothing large is loaded says more.
    assert time.process_time() - began < 5
    for part in check.parts("cuda", "1b", None, tmp_path, quick=False):
        assert part.name in done.stdout
    assert "torch" not in sys.modules or "import torch" not in Path(check.__file__).read_text()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.missing
    monkeypatch.setattr(check, "missing", lambda names: [*real(names), "msgspec", "pytest"])
    planned = check.plan(check.parts("cuda", "1b", None, tmp_path, quick=False), gpu=False)
    lacking = {part.name: names for part, names in planned}
    assert "msgspec" in lacking["engine"] and {"msgspec", "pytest"} <= set(lacking["tests"])
    assert "cuda" in lacking["kernels"]


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "has_gpu", lambda: False)
    assert check.main(["--out", str(tmp_path)]) == 1


def test_parts_run_at_toy_size_and_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contact = ("-m", "fastblt.benchmarks.gpu.contact", "--device", "cpu", "--quick", "--only", "graphs", "--json")
    some = [
        check.Part("broken", 60, ("-c", "raise SystemExit('no such thing')")),
        check.Part("slow", 1, ("-c", "import time; time.sleep(30)")),
        check.Part("engine", 300, (*contact, str(tmp_path / "engine.json"))),
    ]
    monkeypatch.setattr(check, "parts", lambda *_, **__: some)
    assert check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {name: one["state"] for name, one in found.items()} == {
        "broken": "failed with status 1",
        "slow": "out of time",
        "engine": "passed",
    }
    assert found["engine"]["result"]["graphs"]["captured = eager"] is True
    assert "no such thing" in (tmp_path / "gpu-check.md").read_text()
