"""What systems do to a server: signals under load, and disks that are full."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.faulty import ask, assert_one_end, run, serving


def test_sigterm_under_load(checkpoint: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--shutdown-timeout", "4", pause=0.01) as server:

        async def terminate() -> float:
            while server.metrics()["fastblt_num_requests_waiting"] < 1:
                await asyncio.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            return time.monotonic()

        # Some can finish in the time there is, others cannot, and some still wait.
        bodies = [{"prompt": f"p{i}", "stream": i % 2 == 0, "max_tokens": 10 if i < 8 else 4000} for i in range(24)]
        *outcomes, start = run(*(ask(server, **body) for body in bodies), terminate())
        assert server.process.wait(20) == 0
        assert time.monotonic() - start < 4 + 5
        ends = assert_one_end(outcomes)
        assert ends.keys() == {"length", "abort"} and ends["abort"] >= 16
        assert "Traceback" not in server.log()


def test_a_disk_that_is_full(checkpoint: str, tmp_path: Path) -> None:
    args = ("--access-log", "--log-level", "debug")
    with serving(checkpoint, tmp_path, *args, stderr="/dev/full", raise_at=[20]) as server:
        bodies = [{"prompt": f"p{i}", "stream": i % 2 == 0, "max_tokens": 100} for i in range(4)]
        assert_one_end(run(*(ask(server, **body) for body in bodies)))
        server.assert_sound()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_few_open_files(checkpoint: str, tmp_path: Path) -> None:
    """It says so, serves who comes one after another, and grammars, each of which wants a process with files."""
    with serving(checkpoint, tmp_path, files=64) as server:
        assert "only 1 connections at once: the limit of open files is low; raise it (ulimit -n)" in server.log()
        for number in range(12):
            grammar = f'start: e\ne: "{number}" | "(" e ")"'
            body = {"prompt": "a", "max_tokens": 5, "structured_outputs": {"grammar": grammar}}
            assert server.http.post("/v1/completions", json=body).status_code == 200
        server.assert_sound()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log()


def test_too_little_memory_to_load_is_one_line(checkpoint: str) -> None:
    """By a limit of address space (ulimit -v), as a container's limit would be."""
    command = ["prlimit", f"--as={2 * 10**9}", sys.executable, "-m", "fastblt", "serve", checkpoint, "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "--cache-size", "2GiB"], capture_output=True, text=True, timeout=60, env=env)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("fastblt: cannot serve") and "out of memory; give it more" in last
    assert "Traceback" not in ended.stderr
