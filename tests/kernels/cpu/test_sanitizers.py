"""The sanitizers find nothing in our code, and do find what is planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastblt.kernels.cpu import build
from tests.kernels.cpu import sanitized
from tests.kernels.cpu.sanitized import ROOT, SANITIZERS, environment


def missing() -> str | None:
    """Why there are no sanitizers here."""
    try:
        environment()
    except (OSError, build.CompilerError, subprocess.SubprocessError) as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no sanitizers: {missing()}")


@pytest.mark.timeout(900)
def test_kernels_and_engines_run_clean() -> None:
    """About a minute on two idle cores."""
    # The outer run's plugin settings are not for the inner one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "tests.kernels.cpu.sanitized"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("int planted(int n) { int *x = malloc(4 * n); int y = x[n]; free(x); return y; }", "heap-buffer-overflow"),
        ("int planted(int n) { return -n << 23; }", "left shift of negative value"),
        ("int planted(int n) { int x[4] = {n}; return x[n + 1]; }", "index 5 out of bounds"),
    ],
)
def test_what_is_planted_is_found(code: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*SANITIZERS, "-O1", "-fPIC"))
    monkeypatch.setattr(build, "LINK_FLAGS", (*SANITIZERS, "-shared"))
    (tmp_path / "planted.c").write_text(f"#include <stdlib.h>\n{code}\n")
    library = sanitized.compile_all(tmp_path, tmp_path)
    call = f"import ctypes; ctypes.CDLL({str(library)!r}).planted(4); print('unseen')"
    done = subprocess.run([sys.executable, "-c", call], env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and found in done.stderr and "unseen" not in done.stdout
