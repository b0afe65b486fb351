"""Runs programs written by a model, each in a process that can do nothing but compute.

    with Sandbox() as sandbox:
        sandbox.run("assert 1 + 1 == 2")        # Verdict(passed=True, ...)

A program has its own process group and an empty folder. If it is started by root, it runs as an unprivileged user. It
can make only the system calls of `seccomp.py`, and its memory, file size, processor time and wall time are limited. It
can read what its user may read, but has no way to send it anywhere. A new sandbox first tests all protections with
programs of its own, and refuses to work if one is missing.

The program and its tests share an interpreter, so a program could be written to find the verdict's token in memory.
This protects the machine from programs, but not a score from cheating.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fastblt.benchmarks.evaluation.seccomp import SeccompUnavailableError, compile_filter

_CHILD = Path(__file__).with_name("sandbox_child.py")
#: The first user id of programs that root starts. Programs that run at the same time have different users, so that
#: none can reach another.
_FIRST_UID = 61_000
_ANSWER_BYTES = 4096


class SandboxError(RuntimeError):
    """A protection is missing. The message names it and says what to do."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program: processor and wall time in seconds, address space and file size in bytes."""

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory: int = 512 * 2**20
    file_size: int = 0
    open_files: int = 64
    threads: int = 16

    def resources(self, uid: int | None) -> dict[str, int]:
        """The limits for setrlimit. Linux counts threads by user: they are limited only if the program has its own."""
        limits = {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_CORE": 0,
        }
        return limits if uid is None else limits | {"RLIMIT_NPROC": self.threads}


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end without an error, and what stopped it if not."""

    passed: bool
    reason: str


#: Programs that must fail, by the protection that stops them.
PROBES = {
    "processes": "import os\nif os.fork() == 0: os._exit(0)\n",
    "other programs": "import os\nos.posix_spawn('/bin/true', ['true'], {})\n",
    "sockets": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n",
    "files": "open('left behind', 'w')\n",
    "files elsewhere": f"import os\nat = {tempfile.gettempdir()!r} + '/%d' % os.getpid()\nos.mkdir(at)\nos.rmdir(at)\n",
    "signals to others": "import os\nos.kill(os.getppid(), 0)\n",
    "memory": "b'x' * 2**40\n",
    "root": "import os\nassert os.getuid() == 0 or os.geteuid() == 0\n",
}
#: A harmless program that must pass. It loads modules late.
_CONTROL = "import hashlib, statistics\nassert 'ä'.encode('utf-16') and hashlib.sha256(b'')\n"


class Sandbox:
    """Runs at most `workers` programs at a time. `run` may be called from several threads.

    If a protection is missing, raises SandboxError, unless `allow_weak` is true; `missing` then names it.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 2, allow_weak: bool = False) -> None:
        self.limits = limits or Limits()
        self.workers = workers
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        self._uids: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for number in range(workers):
            self._uids.put(_FIRST_UID + number if root else None)
        self._folder = Path(tempfile.mkdtemp(prefix="fastblt-sandbox-"))
        # Programs of other users must be able to enter their own folders below it.
        self._folder.chmod(0o711)
        self._filter: str | None = None
        unfiltered = ""
        try:
            self._filter = base64.b64encode(compile_filter()).decode()
        except SeccompUnavailableError as error:
            unfiltered = f" ({error})"
        try:
            self.missing = self._probe()
            if self.missing and not allow_weak:
                raise SandboxError(
                    f"programs cannot be kept from these here: {', '.join(self.missing)}{unfiltered}. Run them on a "
                    "machine that you can lose, and say --allow-weak-sandbox"
                )
        except BaseException:
            self.close()
            raise

    def run(self, program: str) -> Verdict:
        """Run a program to its end or its limits. Whatever it does gives a verdict and no exception."""
        uid = self._uids.get()
        try:
            return self._run(program, uid)
        finally:
            self._uids.put(uid)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _probe(self) -> list[str]:
        """Test the protections; returns those that are missing. Raises SandboxError if a harmless program fails."""
        control = self.run(_CONTROL)
        if not control.passed and self._filter is not None:
            # The kernel may not support seccomp filters, as in some containers.
            self._filter = None
            control = self.run(_CONTROL)
        if not control.passed:
            raise SandboxError(f"a harmless program does not run in the sandbox: {control.reason}")
        return [name for name, program in PROBES.items() if self.run(program).passed]

    def _run(self, program: str, uid: int | None) -> Verdict:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            if uid is not None:
                os.chown(folder, uid, uid)
            return self._wait(program, uid, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _wait(self, program: str, uid: int | None, folder: Path) -> Verdict:
        token = secrets.token_hex(16)
        head = {"token": token, "uid": uid, "filter": self._filter, "limits": self.limits.resources(uid)}
        # The interpreter of the virtual environment's base, which has the standard library only.
        python = getattr(sys, "_base_executable", None) or sys.executable
        deadline = time.monotonic() + self.limits.wall_seconds
        process = subprocess.Popen(
            [python, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        with process.stdout as answers, process.stderr as errors:
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin as to:
                    to.write(json.dumps(head).encode() + b"\n" + program.encode("utf-8", "surrogatepass"))
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return Verdict(False, f"not done after {self.limits.wall_seconds:g} s")
            finally:
                # Kill the whole process group, in case the program has started others.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return _verdict(token, process.returncode, _read(answers.fileno()), _read(errors.fileno()))


def _read(pipe: int) -> bytes:
    """Read what a pipe holds, at most _ANSWER_BYTES, without waiting for writers."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, _ANSWER_BYTES)
    except BlockingIOError:
        return b""


def _verdict(token: str, status: int, answer: bytes, errors: bytes) -> Verdict:
    if status == 0 and answer == token.encode():
        return Verdict(True, "passed")
    if -status in (signal.SIGXCPU, signal.SIGKILL):
        return Verdict(False, "killed: out of processor time")
    if -status == signal.SIGSYS:
        return Verdict(False, "killed: a forbidden system call")
    if status < 0:
        return Verdict(False, f"killed by {signal.Signals(-status).name}")
    if answer:
        return Verdict(False, answer.decode("utf-8", "replace"))
    # An error of the launcher, before the program began.
    last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return Verdict(False, last or f"ended by itself with status {status}")
