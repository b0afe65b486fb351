"""The processes that do the grammars' work, each for one grammar, and the one that they are forked from.

What a grammar costs cannot be told from its text, and native code cannot be interrupted. So the engine's thread does
none of that work: a process with little memory does it, within the processor time that the request has left, and ends
when that is used up.

Run as a program this module is the process that the others are forked from, which takes a millisecond where a start
takes a tenth of a second. It never sees a grammar. Its standard input is a socket: an order is five bytes, `FORK` with
the new process's socket beside it, `KILL` or `LOWER`, and the number that the process has or is to have.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastblt.models.vocabulary import BYTE_OFFSET, encode
from fastblt.server.framing import Message, Unpacker, pack
from fastblt.server.request import InvalidRequestError, StructuredOutput

if TYPE_CHECKING:
    import numpy as np

    from fastblt.server.engine.constraints.grammar import GrammarState

#: Processor time for compiling a grammar, and memory for a process beyond what it begins with.
COMPILE_SECONDS = 1.0
MEMORY_BYTES = 2**27

#: Bytes that can only be followed by one byte: that many masks are told before anybody asks.
_FORCED = 16

_CHUNK = 1 << 16

ORDER = struct.Struct(">cI")
FORK, KILL, LOWER = b"f", b"k", b"l"


class Compile(Message):
    """The first message; answered by Compiled."""

    structured: StructuredOutput


class Walk(Message):
    """Asks what may follow the bytes of a completion, `key`, and bytes drafted behind them, `path`; answered by Walked.

    `fixed` are all bytes of the completion with `fresh`, else those that were not told yet. `seconds` is the processor
    time that this may take.
    """

    key: int
    fresh: bool
    fixed: bytes
    path: bytes
    seconds: float


class Forget(Message):
    """A completion has ended. There is no answer."""

    key: int


class Compiled(Message):
    """`refusal` says why the grammar cannot be used; compiling took `seconds` of processor time."""

    refusal: str | None
    seconds: float


class Walked(Message):
    """What may follow the fixed bytes, and each beginning of `tape`: a mask has a byte for each of the 260 ids.

    `tape` is the path as far as it is allowed, and the bytes after it that nothing else could stand for. `problem` is
    why there is no mask behind the whole of `tape`; `seconds` the processor time that was used.
    """

    masks: list[bytes]
    tape: bytes
    seconds: float
    problem: str | None = None


Command = Compile | Walk | Forget
Answer = Compiled | Walked


def serve(sock: socket.socket) -> None:
    """Work on one grammar until the socket is closed."""
    from fastblt.server.engine.constraints.grammar import Grammars

    grammars = Grammars(bound=1)
    structured: StructuredOutput | None = None
    states: dict[int, GrammarState] = {}
    unpacker: Unpacker[Command] = Unpacker(Command)
    while data := sock.recv(_CHUNK):
        for command in unpacker.feed(data):
            match command:
                case Forget():
                    states.pop(command.key, None)
                case Compile():
                    structured = command.structured
                    # The signal's default is to end the process, whatever code it is in.
                    signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)
                    refusal, began = None, time.thread_time()
                    try:
                        grammars.start(structured)
                    except InvalidRequestError as error:
                        refusal = str(error)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    sock.sendall(pack([Compiled(refusal, time.thread_time() - began)]))
                    if refusal is not None:
                        return
                case Walk():
                    assert structured is not None
                    signal.setitimer(signal.ITIMER_PROF, command.seconds)
                    began = time.thread_time()
                    if command.fresh:
                        states[command.key] = grammars.start(structured)
                    path = encode(command.path)
                    masks, tape, problem = follow(states[command.key], encode(command.fixed), path, _FORCED)
                    seconds = time.thread_time() - began
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    text = bytes(token - BYTE_OFFSET for token in tape)
                    sock.sendall(pack([Walked([mask.tobytes() for mask in masks], text, seconds, problem)]))


def follow(
    state: GrammarState, fixed: list[int], path: list[int], forced: int = 0
) -> tuple[list[np.ndarray], list[int], str | None]:
    """Masks, tape and problem of a Walked: bool [260] each, and ids. Up to `forced` bytes are told beyond the path."""
    from fastblt.server.engine.constraints.grammar import GrammarError

    try:
        for token in fixed:
            state.commit(token)
    except GrammarError as error:
        return [], [], str(error)
    masks = state.along(path)
    tape = path[: len(masks) - 1]
    if len(tape) == len(path):
        for _ in range(forced):
            allowed = masks[-1].nonzero()[0].tolist()
            if len(allowed) != 1 or allowed[0] < BYTE_OFFSET:
                break
            [only] = allowed
            masks, before = state.along([*tape, only]), len(masks)
            if len(masks) == before:
                break
            tape.append(only)
    if state.problem is not None:
        # It arose behind the next byte of the path, or of those that are forced.
        tape.append(path[len(tape)] if len(tape) < len(path) else only)
    return masks, tape, state.problem


def main() -> None:
    """Fork processes until the socket is closed, and end them then."""
    from fastblt.server.engine.constraints.grammar import load_library

    load_library()
    # What is here by now is never freed; the collector would copy the pages that all processes share.
    gc.freeze()
    control = socket.socket(fileno=os.dup(0))
    # Forked processes must not keep it open.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    children: dict[int, int] = {}
    order = b""
    sockets: list[int] = []
    while True:
        data, received, _, _ = socket.recv_fds(control, ORDER.size - len(order), 1)
        if not data:
            break
        order, sockets = order + data, sockets + received
        if len(order) < ORDER.size:
            continue
        kind, number = ORDER.unpack(order)
        order = b""
        _reap(children)
        if kind == FORK:
            [descriptor] = sockets
            sockets = []
            try:
                pid = os.fork()
            except OSError:
                # Whoever waits at the other end of its socket sees that closed.
                pid = -1
            if pid == 0:
                try:
                    control.close()
                    _limit_memory()
                    serve(socket.socket(fileno=descriptor))
                finally:
                    os._exit(0)
            os.close(descriptor)
            if pid > 0:
                children[number] = pid
        elif number in children and kind == KILL:
            os.kill(children[number], signal.SIGKILL)
        elif number in children and kind == LOWER:
            os.setpriority(os.PRIO_PROCESS, children[number], 19)
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)


def _reap(children: dict[int, int]) -> None:
    """Forget processes that have ended; only then may others have their ids."""
    for number, pid in list(children.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            del children[number]


def _limit_memory() -> None:
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        # A system that does not say so does not keep such a limit either.
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


if __name__ == "__main__":
    main()
