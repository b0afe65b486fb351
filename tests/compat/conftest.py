"""A real server process, for clients that were written for other servers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.api.running import MAX_MODEL_LEN, save_tiny, until

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
KEY = "a-key"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("compat")))


@pytest.fixture(scope="session")
def url(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `fastblt serve` with an API key, ready. It goes through everything without a failure, and ends in order."""
    command = [
        *(sys.executable, "-m", "fastblt", "serve", checkpoint, "--served-model-name", MODEL, "--port", "0"),
        *(
            "--max-model-len",
            str(MAX_MODEL_LEN),
            "--deterministic",
            "--shutdown-timeout",
            "1",
            "--scheduling-policy",
            "priority",
        ),
    ]
    log = Path(tmp_path_factory.mktemp("log")) / "server.log"
    environment = os.environ | {"FASTBLT_SERVE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    try:
        until(lambda: "ready: " in log.read_text() or process.poll() is not None, 60)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        assert found is not None and process.poll() is None, log.read_text()
        yield found.group()
        metrics = httpx.get(f"{found.group()}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        assert not re.search(r'fastblt_http_requests_total\{.*status="500".*\} [^0]', metrics)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
