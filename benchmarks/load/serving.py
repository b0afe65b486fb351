"""Starts servers in processes of their own: this package's, or any other that `python -m` starts."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Seconds that a server has to become ready, and to end.
_START, _END = 300, 60


@dataclass(frozen=True)
class Server:
    """A server process, its port on the loopback interface, and its log file."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """The body of the answer to GET. Raises OSError if there is no answer, or for a status of 400 or more."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read()

    def metrics(self) -> dict[str, float]:
        """The Prometheus samples of `/metrics`. The keys are names with their labels."""
        lines = self.get("/metrics").decode().splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}


@contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[Server]:
    """Run `fastblt serve` with these options. Yields when it is ready. Raises RuntimeError if it does not start."""
    with running(["fastblt", "serve", model, *options], "/ready") as server:
        yield server


@contextmanager
def running(arguments: Sequence[str], ready: str) -> Iterator[Server]:
    """Run a server by `python -m` with these arguments and `--port`. Yields when it answers at the path `ready`.

    Raises RuntimeError if it does not start.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", *arguments, "--port", str(port)]
            server = Server(subprocess.Popen(command, stdout=output, stderr=output), port, log)
        try:
            _await(server, ready)
            yield server
        finally:
            server.process.terminate()
            try:
                server.process.wait(_END)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


def _await(server: Server, ready: str) -> None:
    deadline = time.monotonic() + _START
    while True:
        try:
            server.get(ready)
            return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {server.log.read_text()[-4000:]}") from None
        time.sleep(0.1)
