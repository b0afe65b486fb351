"""One event, one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import logging, sys
from fastblt.server import logs
logs.configure(logs.LogSettings(format=logs.LogFormat(sys.argv[1])))
log = logging.getLogger("fastblt.test")
log.info("plain %d", 1)
logs.request_id.set("abc")
log.info("two\\nlines", extra={"fields": {"status": 200}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("oops")
log.debug("unseen")
print("end")
"""


def run(format: str, stderr: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, format]
    if stderr is None:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    with open(stderr, "w") as sink:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=sink, text=True, timeout=30)


def test_json() -> None:
    first, second, third = map(json.loads, run("json").stderr.splitlines())
    assert first.keys() == {"time", "level", "logger", "message"} and first["message"] == "plain 1"
    assert (second["request_id"], second["status"], second["message"]) == ("abc", 200, "two\nlines")
    assert third["level"] == "error" and "ZeroDivisionError" in third["exception"]


def test_text() -> None:
    lines = run("text").stderr.splitlines()
    assert lines[0].endswith("INFO fastblt.test: plain 1") and lines[1].endswith("two request_id=abc")
    assert lines[3].endswith("oops request_id=abc") and lines[-1].startswith("ZeroDivisionError")


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_full_disk_is_no_reason_to_stop(format: str) -> None:
    result = run(format, "/dev/full")
    assert result.stdout == "end\n"
