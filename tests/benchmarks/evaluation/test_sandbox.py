from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from fastblt.benchmarks.evaluation import sandbox as module
from fastblt.benchmarks.evaluation.humaneval import problems
from fastblt.benchmarks.evaluation.sandbox import PROBES, Limits, Sandbox, SandboxError
from fastblt.benchmarks.evaluation.seccomp import SeccompUnavailableError

LIMITS = Limits(cpu_seconds=1, wall_seconds=10.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    "program",
    [
        "assert sum(range(10)) == 45",
        "print('é'); import sys; sys.stderr.write('x' * 10**7)",
        "import collections, decimal, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing",
        "assert 'ä'.encode('idna') and 'ä'.encode('utf-16')",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
        "assert len(bytearray(100 * 2**20))",
        "open('/dev/null').read()",
    ],
)
def test_what_passes(sandbox: Sandbox, program: str) -> None:
    verdict = sandbox.run(program)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os\nwhile True: os.fork()", "forbidden"),
        ("import subprocess\nsubprocess.run(['true'])", "not permitted"),
        ("import os\nos.system('true')", "forbidden"),
        ("import os\nos.execv('/bin/true', ['true'])", "forbidden"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "not permitted"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "forbidden"),
        ("import socket\nsocket.socketpair()", "forbidden"),
        ("open('file', 'w').write('x')", "forbidden"),
        ("open('/dev/null', 'wb')", "forbidden"),
        ("import tempfile\ntempfile.TemporaryFile()", "forbidden"),
        ("import os\nos.unlink('/etc/hostname')", "forbidden"),
        ("import os\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass", "forbidden"),
        ("import os\ntry: os.setuid(0)\nexcept OSError: pass", "forbidden"),
        ("while True: pass", "processor time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "processor time"),
        ("x = []\nwhile True: x.append(bytes(2**20))", "MemoryError"),
        ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", ""),
        ("import os\nos._exit(0)", "by itself"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("raise SystemExit", "SystemExit"),
        ("assert False, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError"),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", ""),
        ("'\udc80'", ""),
        ("\0", ""),
    ],
)
def test_what_fails(sandbox: Sandbox, program: str, reason: str) -> None:
    verdict = sandbox.run(program)
    assert not verdict.passed and reason in verdict.reason, verdict


@pytest.mark.parametrize("program", list(PROBES.values()), ids=list(PROBES))
def test_probes_pass_where_nothing_is_forbidden(program: str) -> None:
    """They would not tell a missing protection from one that is there."""
    if "getuid" in program and os.geteuid() != 0:
        pytest.skip("is not root")
    if "2**40" in program:
        program = program.replace("2**40", "2**20")
    with Sandbox(Limits(memory=2**34, file_size=2**20), workers=1, allow_weak=True) as sandbox:
        sandbox._filter = None
        sandbox._uids.get()
        sandbox._uids.put(None)
        verdict = sandbox.run(program)
    assert verdict.passed, verdict.reason


def test_sleep_is_ended_by_the_clock() -> None:
    with Sandbox(Limits(wall_seconds=1.0)) as sandbox:
        clock = time.monotonic()
        verdict = sandbox.run("import time\ntime.sleep(60)")
        assert not verdict.passed and "1 s" in verdict.reason
        assert time.monotonic() - clock < 6


def test_a_flood_into_every_descriptor_is_bounded() -> None:
    program = "import os\nfor fd in range(64):\n try: os.write(fd, b'x' * 10**5)\n except OSError: pass"
    with Sandbox(Limits(wall_seconds=1.0)) as short:
        assert not short.run(program).passed


def test_nothing_is_left(sandbox: Sandbox) -> None:
    assert not list(sandbox._folder.iterdir())
    folder = sandbox._folder
    with Sandbox(LIMITS) as another:
        assert another._folder != folder
        folder = another._folder
    assert not folder.exists()


def test_what_cannot_be_enforced_is_said_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bytes:
        raise SeccompUnavailableError("no seccomp filter: no library")

    monkeypatch.setattr(module, "compile_filter", unavailable)
    with pytest.raises(SandboxError, match=r"processes.*sockets.*no library.*--allow-weak-sandbox"):
        Sandbox(LIMITS)
    with Sandbox(LIMITS, allow_weak=True) as weak:
        assert {"processes", "sockets", "other programs"} <= set(weak.missing)
        assert weak.run("assert True").passed and not weak.run("while True: pass").passed
        assert not {"memory", "root"} & set(weak.missing)


def test_canonical_solutions_pass_and_broken_ones_do_not(sandbox: Sandbox) -> None:
    """A few here; `fastblt eval sandbox` runs all."""
    for problem in problems()[::24]:
        assert sandbox.run(problem.solved()).passed, problem.name
        assert not sandbox.run(problem.broken()).passed, problem.name
