"""Settings of every test, and which of them are slow."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Tiny models lose far more to the hand-over between threads than they gain, the more so on a shared machine.
torch.set_num_threads(1)

HERE = Path(__file__).parent

#: Folders and files whose tests are slow: they start Python processes, import transformers, train, or decode with the
#: reference, which has no cache. `make quick` leaves them out (`-m "not slow"`).
SLOW = (
    "benchmarks",
    "browser",
    "compat",
    "deploy/test_monitoring.py",
    "deploy/ray/test_app.py",
    "docs/test_examples.py",
    "docs/test_life.py",
    "faults",
    "fuzz",
    "gpu",
    "kernels/cpu/test_build.py",
    "kernels/cpu/test_sanitizers.py",
    "kernels/gpu/test_cases.py",
    "models/pretrained",
    "models/training",
    "models/test_parity.py",
    "models/test_reference.py",
    "server/api",
    "server/cli/test_cli.py",
    "server/decoding/test_against_reference.py",
    "server/decoding/test_mixed_load.py",
    "server/engine/constraints/test_constraint.py",
    "server/engine/constraints/test_grammar_pool.py",
    "server/engine/device/test_ranks.py",
    "server/engine/test_masked_steps.py",
    "server/engine/test_slow_constraints.py",
    "server/process",
    "server/test_logs.py",
    "test_package.py",
)

_runs_a_quick_test = False


def pytest_configure(config: pytest.Config) -> None:
    # Shells start background jobs with SIGINT ignored. Then nothing that a test starts could be interrupted either.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: in one of the places that tests/conftest.py names")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = [HERE / place for place in SLOW]
    assert all(place.exists() for place in slow), [str(place) for place in slow if not place.exists()]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _runs_a_quick_test
    _runs_a_quick_test = item.get_closest_marker("slow") is None


_start = subprocess.Popen.__init__


def _checked_start(process: Any, args: Any, *more: Any, **options: Any) -> None:
    program = args if isinstance(args, str) else args[0]
    if _runs_a_quick_test and str(program) == sys.executable:
        raise AssertionError("a test that starts a Python process is slow: name its place in tests/conftest.py")
    _start(process, args, *more, **options)


# So that `make quick` stays quick.
subprocess.Popen.__init__ = _checked_start  # type: ignore[method-assign]
