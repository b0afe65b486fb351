"""Asks /health again and again, in a process of its own: a client that is busy otherwise would time itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from types import TracebackType

_PROBE = """
import http.client, json, signal, sys, time

# A handler that only notes the signal: an exception out of one would be lost where Python is ending an object.
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=100)
waits, sleeps = [], []
while not stop:
    start = time.monotonic()
    time.sleep(0.01)
    slept = time.monotonic()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    waits.append(time.monotonic() - slept)
    sleeps.append(slept - start - 0.01)
    if len(waits) == 1:
        print("begun", flush=True)
print(json.dumps([waits, sleeps]))
"""


class Watch:
    """`waits` are the seconds that answers took. `noise` is how much longer than asked for the probe slept at most, for
    the machine does it to everybody.
    """

    waits: list[float]
    noise: float

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> Watch:
        command = [sys.executable, "-c", _PROBE, str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=120)
        if kind is None:
            waits, sleeps = json.loads(output)
            self.waits, self.noise = sorted(waits), max(sleeps)

    @property
    def longest(self) -> float:
        return self.waits[-1]

    def __str__(self) -> str:
        parts = ", ".join(f"{1000 * self.waits[int((len(self.waits) - 1) * part)]:.0f}" for part in (0.5, 0.99, 1))
        return (
            f"/health, {len(self.waits)} times: median, 99 % and most {parts} ms; sleeps of 10 ms took up to "
            f"{1000 * self.noise:.0f} ms more"
        )
