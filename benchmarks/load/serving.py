"""Servers in processes of their own: one of this package, or any that `python -m` starts."""

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

#: Seconds in which a server must be ready, and in which it must have ended.
_START, _END = 300, 60


@dataclass(frozen=True)
class Server:
    """A process, its port on the loopback interface, and the file of its log."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> bytes:
        """The answer's body. Raises OSError where there is none, or a status of 400 or more."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read()

    def metrics(self) -> dict[str, float]:
        """Prometheus samples of `/metrics`; a name has its labels."""
        lines = self.get("/metrics").decode().splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if not ln.startswith("#"))}


@contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[Server]:
    """`fastblt serve` with these options, once it is ready. Raises RuntimeError where it does not start."""
    with running(["fastblt", "serve", model, *options], "/ready") as server:
        yield server


@contextmanager
def running(arguments: Sequence[str], ready: str) -> Iterator[Server]:
    """A server that `python -m` starts with `--port`, once it answers at the path `ready`. Raises RuntimeError."""
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
