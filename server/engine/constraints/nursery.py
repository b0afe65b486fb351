"""The engine's side of the process that the grammar processes are forked from."""

from __future__ import annotations

import atexit
import itertools
import os
import socket
import subprocess
import sys
from threading import Lock

from fastblt.server.child_process import child_environment
from fastblt.server.engine.constraints.grammar_worker import FORK, ORDER

_COMMAND = (sys.executable, "-P", "-m", "fastblt.server.engine.constraints.grammar_worker")

#: Processes without a grammar that are kept.
_KEPT = 8


class Nursery:
    """The process that forks the grammar processes. It starts with the first grammar, and all engines here share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._owner = 0
        #: Processes that have no grammar any more, with our ends of their sockets.
        self._blank: list[tuple[int, socket.socket]] = []
        atexit.register(self.close)

    def process(self) -> tuple[int, socket.socket]:
        """A process without a grammar. Returns its number, and our end of its socket. If a fork fails, the other end is
        closed.

        Raises OSError.
        """
        with self._lock:
            while self._blank and self._owner == os.getpid():
                number, ours = self._blank.pop()
                if _open(ours):
                    return number, ours
                ours.close()
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                number = next(self._numbers)
                order = ORDER.pack(FORK, number)
                try:
                    socket.send_fds(self._started(), [order], [theirs.fileno()])
                except OSError:
                    # The forking process was killed. Start another.
                    self._end()
                    socket.send_fds(self._started(), [order], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return number, ours

    def take_back(self, number: int, ours: socket.socket) -> None:
        """Keep a process that has nothing to do, for the next grammar: a fork takes longer than most grammars."""
        with self._lock:
            if self._owner == os.getpid() and self._control is not None and len(self._blank) < _KEPT:
                self._blank.append((number, ours))
            else:
                ours.close()

    def tell(self, kind: bytes, number: int) -> None:
        """Send KILL or LOWER for a process."""
        with self._lock:
            try:
                if self._control is not None and self._owner == os.getpid():
                    self._control.sendall(ORDER.pack(kind, number))
            except OSError:
                # The forking process has ended, and its children with it.
                self._end()

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> socket.socket:
        if self._control is None or self._owner != os.getpid():
            ours, theirs = socket.socketpair()
            # Numerical libraries need no threads in that process.
            environment = {**child_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            with theirs:
                # A new session, so that Ctrl-C in the terminal does not reach it.
                self._process = subprocess.Popen(
                    _COMMAND, stdin=theirs.fileno(), stderr=subprocess.DEVNULL, env=environment, start_new_session=True
                )
            # Those of the process that this one was forked from are not ours.
            self._blank.clear()
            self._owner, self._control = os.getpid(), ours
        return self._control

    def _end(self) -> None:
        control, process, self._control, self._process = self._control, self._process, None, None
        for _, ours in self._blank:
            ours.close()
        self._blank.clear()
        if control is not None:
            control.close()
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()


def _open(sock: socket.socket) -> bool:
    """Whether the other end is open, and has sent nothing."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


#: That of this process.
nursery = Nursery()
