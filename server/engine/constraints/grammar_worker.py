"""The grammar processes, one for each grammar, and the process that they are forked from.

The cost of a grammar cannot be predicted from its text, and native code cannot be interrupted. So a separate process
with limited memory does the work, within the processor time that the request has left. When that is used up, the
system ends the process.

Run as a program, this module is the process that the others are forked from. A fork takes a millisecond, a start a
tenth of a second. This process never handles a grammar. Its standard input is a socket that receives orders of five
bytes (`ORDER`): `FORK`, `KILL` or `LOWER` (the scheduling priority), and the number of the process concerned. `FORK`
comes with the new process's socket as a file descriptor.
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

#: Processor seconds for compiling a grammar, and bytes that a process may allocate beyond what it starts with.
COMPILE_SECONDS = 1.0
MEMORY_BYTES = 2**27

#: Where the grammar allows only one byte, the answer goes on along such forced bytes, up to this many.
_FORCED = 16

_CHUNK = 1 << 16

#: Processor seconds of an answer behind which no other waits to be sent.
_SLOW_SECONDS = 2e-4

ORDER = struct.Struct(">cI")
FORK, KILL, LOWER = b"f", b"k", b"l"


class Compile(Message):
    """The first message, and the first after the engine has let go of the grammar before; answered by Compiled."""

    structured: StructuredOutput


class Walk(Message):
    """Asks for the masks after the bytes of completion `key` and along `path`, drafted bytes; answered by Walked.

    `fixed` has the bytes of the completion that this process has not been sent; with `fresh`, all of them. The first
    `known` masks are there. `seconds` is the processor time that the answer may take. `apart`: the answers before it
    are sent first, and its own before the next one is begun.
    """

    key: int
    fresh: bool
    fixed: bytes
    path: bytes
    known: int
    seconds: float
    apart: bool


class Forget(Message):
    """A completion has ended. There is no answer."""

    key: int


class Compiled(Message):
    """`refusal` says why the grammar cannot be used, or is None. Compiling took `seconds` of processor time."""

    refusal: str | None
    seconds: float


class Walked(Message):
    """The masks after the fixed bytes and after each prefix of `tape`, but for the first `known`, which were there. A
    mask has a byte, 0 or 1, for each of 260 ids.

    `tape` is the allowed part of the path, followed by forced bytes, where the grammar allows only one. `problem` says
    why there is no mask after the whole of `tape`. `seconds` is the processor time that was used.
    """

    known: int
    masks: list[bytes]
    tape: bytes
    seconds: float
    problem: str | None = None


Command = Compile | Walk | Forget
Answer = Compiled | Walked


def serve(sock: socket.socket) -> None:
    """Work on one grammar until the socket is closed.

    Answers to what came together are sent together, but those before and of one that may take long are not kept back.
    """
    from fastblt.server.engine.constraints.grammar import Grammars

    grammars = Grammars(bound=1)
    structured: StructuredOutput | None = None
    states: dict[int, GrammarState] = {}
    #: Completions whose last answer took long.
    slow: set[int] = set()
    unpacker: Unpacker[Command] = Unpacker(Command)
    answers: list[Answer] = []

    def send() -> None:
        if answers:
            sock.sendall(pack(answers))
            answers.clear()

    while data := sock.recv(_CHUNK):
        for command in unpacker.feed(data):
            match command:
                case Forget():
                    states.pop(command.key, None)
                    slow.discard(command.key)
                case Compile():
                    structured = command.structured
                    states.clear()
                    slow.clear()
                    # SIGPROF ends the process by default, even inside native code.
                    signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)
                    refusal, began = None, time.thread_time()
                    try:
                        grammars.start(structured)
                    except InvalidRequestError as error:
                        refusal = str(error)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    answers.append(Compiled(refusal, time.thread_time() - began))
                    if refusal is not None:
                        send()
                        return
                case Walk():
                    assert structured is not None
                    if alone := command.apart or command.fresh or command.key in slow:
                        send()
                    signal.setitimer(signal.ITIMER_PROF, command.seconds)
                    began = time.thread_time()
                    if command.fresh:
                        states[command.key] = grammars.start(structured)
                    path = encode(command.path)
                    masks, tape, problem = follow(states[command.key], encode(command.fixed), path, _FORCED)
                    seconds = time.thread_time() - began
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    text = bytes(token - BYTE_OFFSET for token in tape)
                    known = command.known if problem is None and len(masks) > command.known else 0
                    answers.append(Walked(known, [mask.tobytes() for mask in masks[known:]], text, seconds, problem))
                    (slow.add if seconds > _SLOW_SECONDS else slow.discard)(command.key)
                    if alone:
                        send()
        send()


def follow(
    state: GrammarState, fixed: list[int], path: list[int], forced: int = 0
) -> tuple[list[np.ndarray], list[int], str | None]:
    """The masks (bool [260] each), tape (ids) and problem of a Walked, with up to `forced` bytes beyond the path."""
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
        # The error occurred after the next byte of the path, or after a forced byte: include that byte.
        tape.append(path[len(tape)] if len(tape) < len(path) else only)
    return masks, tape, state.problem


def main() -> None:
    """Fork processes as ordered, until the socket is closed. Then end them all."""
    from fastblt.server.engine.constraints.grammar import load_library

    load_library()
    # These objects are never freed. Without freezing them, the garbage collector would write to them, and so copy the
    # memory pages that the forked processes share.
    gc.freeze()
    control = socket.socket(fileno=os.dup(0))
    # Forked processes must not keep the control socket open as their standard input.
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
                # The engine sees that the other end of the socket is closed.
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
    """Collect processes that have ended. Until then the system does not reuse their ids."""
    for number, pid in list(children.items()):
        if os.waitpid(pid, os.WNOHANG)[0]:
            del children[number]


def _limit_memory() -> None:
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        # A system without /proc does not enforce this limit either.
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


if __name__ == "__main__":
    main()
