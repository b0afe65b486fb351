"""The engine's side of the grammar processes: it starts and ends them, and decides how long to wait for answers."""

from __future__ import annotations

import itertools
import logging
import selectors
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from fastblt.models.vocabulary import encode
from fastblt.server.engine.constraints.cursor import GrammarCursor
from fastblt.server.engine.constraints.grammar import Grammars, GrammarState
from fastblt.server.engine.constraints.grammar_worker import (
    COMPILE_SECONDS,
    KILL,
    LOWER,
    MEMORY_BYTES,
    Answer,
    Command,
    Compile,
    Compiled,
    Forget,
    Walk,
    follow,
)
from fastblt.server.engine.constraints.nursery import nursery
from fastblt.server.engine.constraints.recursion import is_regular
from fastblt.server.framing import Unpacker, pack
from fastblt.server.request import StructuredOutput

logger = logging.getLogger("fastblt.grammar")

#: Seconds that one step may wait for masks in all, and at a time when no other request could go on.
STEP_WAIT_SECONDS, IDLE_SECONDS = 0.004, 0.005

#: Seconds without an answer after which a process gets the lowest scheduling priority.
_LATE_SECONDS = 0.02

#: Processes in addition to those of running requests. They compile the grammars of requests that arrive or wait, and
#: are kept when no completion uses them, because their grammars are compiled.
_SPARE = 16

_CHUNK = 1 << 18

#: Seconds for which the engine's thread looks for an answer before it sleeps: waking it takes as long as a mask.
_LOOK_SECONDS = 3e-4

#: Bytes that a process may be sent before it has answered; a socket holds many times as many.
_AHEAD_BYTES = 1 << 14

#: Seconds of the engine's thread that one answer may take, that all answers for a completion may take, and what is
#: added to the latter for each byte. A completion that takes longer is moved to a process.
_STEP_SECONDS, _SECONDS, _SECONDS_PER_BYTE = 3e-3, 3e-2, 1e-4

#: The budget of the engine's thread for compiling grammars: its most seconds, and how many it gains per second.
_COMPILING_SECONDS, _COMPILING_SHARE = 0.05, 0.1

_TOO_LONG = f"it took more than {COMPILE_SECONDS:g} s or {MEMORY_BYTES >> 20} MiB to compile; make it simpler"


class _Worker:
    """A grammar's process: the cursors that it knows, by key, and its outstanding and queued requests."""

    def __init__(self, structured: StructuredOutput) -> None:
        self.structured = structured
        self.number, self.sock = nursery.process()
        self.unpacker: Unpacker[Answer] = Unpacker(Answer)
        self.members: dict[int, GrammarCursor] = {}
        #: Who waits for the answers that are outstanding, in order. None stands for the answer to Compile.
        self.unanswered: deque[GrammarCursor | None] = deque()
        #: Bytes sent since the last time that no answer was outstanding.
        self.sent = 0
        #: Commands that are not sent yet.
        self.queue: deque[tuple[GrammarCursor | None, Command]] = deque()
        self.since = 0.0
        self.compiled = self.lowered = False

    @property
    def idle(self) -> bool:
        return not self.unanswered and not self.queue


class GrammarPool:
    """Processes for up to `bound` + _SPARE grammars at once. Not thread-safe. Only `wait`, and `poll` with a timeout,
    block.

    A grammar whose steps are certain to be cheap (`is_regular`), and have been so far, is followed in the engine's own
    thread, which takes less time than a request to a process. A process compiles it first, to measure the time.

    A process that owes answers is sent no more than a socket surely holds, so sending never blocks. If it ends, those
    whose answers were due ask another process, to be answered one by one. If that ends too, the one whose answer was
    due is the cause.
    """

    def __init__(self, bound: int = 16) -> None:
        self._bound = bound + _SPARE
        #: The least recently used first.
        self._workers: OrderedDict[StructuredOutput, _Worker] = OrderedDict()
        self._selector = selectors.DefaultSelector()
        self._keys = itertools.count()
        #: Seconds that this step may still wait.
        self._wait_left = STEP_WAIT_SECONDS
        #: Grammars that are followed in this thread. `_compiling` is what is left of the budget for compiling them, in
        #: seconds, as of the time `_compiling_at`.
        self._grammars = Grammars()
        self._compiling, self._compiling_at = _COMPILING_SECONDS, time.monotonic()
        #: States of the cursors that are followed in this thread, by key.
        self._states: dict[int, GrammarState] = {}
        #: Cursors that wait until there is room for another process.
        self._homeless: deque[GrammarCursor] = deque()

    def start(self, structured: StructuredOutput) -> GrammarCursor:
        """A cursor at the grammar's start. Its first mask comes later, or the reason why the grammar cannot be used."""
        return GrammarCursor(self, structured, next(self._keys))

    def poll(self, timeout: float = 0.0) -> None:
        """Take the answers that have arrived. If there are none, wait up to `timeout` seconds for the first."""
        self.send()
        ready, now = self._selector.select(0), time.monotonic()
        looked = now + min(timeout, _LOOK_SECONDS)
        while not ready and now < looked:
            ready, now = self._selector.select(0), time.monotonic()
        for key, _ in ready or self._selector.select(max(timeout - _LOOK_SECONDS, 0.0)):
            self._read(key.data)
        now = time.monotonic()
        for worker in self._workers.values():
            if worker.unanswered and not worker.lowered and now - worker.since > _LATE_SECONDS:
                worker.lowered = True
                nursery.tell(LOWER, worker.number)
        while self._homeless and self._room():
            self._homeless.popleft().ask_again()

    def begin_step(self) -> None:
        """Begin a step of the engine: resets the time that it may wait."""
        self._wait_left = STEP_WAIT_SECONDS
        self.send()

    def send(self) -> None:
        """Send what cursors have asked for since the last time. Together this costs one system call a process."""
        for worker in list(self._workers.values()):
            self._send(worker)

    def wait(self, cursors: Sequence[GrammarCursor], *, alone: bool) -> None:
        """Take answers until none of `cursors` is waiting, or until the time is up.

        The time is what is left of STEP_WAIT_SECONDS for this step, and at most the largest `patience` of the waiting
        cursors. If they are `alone`, that is if no other request could go on, it is IDLE_SECONDS.
        """
        self.poll()
        now = time.monotonic()
        idle_until = now + IDLE_SECONDS
        while late := [cursor for cursor in cursors if cursor.waiting]:
            left = idle_until - now if alone else min(self._wait_left, max(cursor.patience for cursor in late))
            if left <= 0:
                return
            self.poll(left)
            before, now = now, time.monotonic()
            if not alone:
                self._wait_left -= now - before
                for cursor in late:
                    cursor.patience -= now - before

    # Called by cursors.

    def follows(self, cursor: GrammarCursor) -> bool:
        """Whether the cursor is followed on the spot."""
        return cursor.key in self._states

    def knows(self, cursor: GrammarCursor) -> bool:
        """Whether this thread or a process already keeps a state of the cursor."""
        if self.follows(cursor):
            return True
        worker = self._workers.get(cursor.structured)
        return worker is not None and cursor.key in worker.members

    def ask(self, cursor: GrammarCursor, walk: Walk) -> None:
        """Answer `walk` at once, or leave it to the grammar's process, for which the cursor may have to wait. If the
        process is at work, `send` sends it."""
        if walk.fresh and cursor.structured in self._grammars and not cursor.dear:
            self._states[cursor.key] = self._grammars.start(cursor.structured)
        if (state := self._states.get(cursor.key)) is not None:
            self._follow(cursor, state, walk)
            return
        worker = self._workers.get(cursor.structured)
        if worker is None:
            if not self._room():
                self._homeless.append(cursor)
                return
            try:
                worker = _Worker(cursor.structured)
            except OSError as error:
                logger.error("no process for a grammar: %s", error)
                cursor.refuse("no process could be started for it")
                return
            self._workers[cursor.structured] = worker
            self._selector.register(worker.sock, selectors.EVENT_READ, worker)
            worker.queue.append((None, Compile(cursor.structured)))
            self._send(worker)
        self._workers.move_to_end(cursor.structured)
        worker.members[cursor.key] = cursor
        worker.queue.append((cursor, walk))
        if not worker.unanswered:
            # It wakes while the rest is asked for.
            self._send(worker)

    def forget(self, cursor: GrammarCursor) -> None:
        """The completion has ended. A process that is working for this cursor alone is killed."""
        self._states.pop(cursor.key, None)
        if cursor in self._homeless:
            self._homeless.remove(cursor)
        worker = self._workers.get(cursor.structured)
        if worker is None or worker.members.pop(cursor.key, None) is None:
            return
        if worker.unanswered and not worker.members:
            self._drop(worker)
            nursery.tell(KILL, worker.number)
            return
        unsent = [(asker, command) for asker, command in worker.queue if asker is not cursor]
        worker.queue = deque([*unsent, (None, Forget(cursor.key))])
        unused = [worker for worker in self._workers.values() if not worker.members]
        if len(unused) > _SPARE:
            self._drop(unused[0])

    def _follow(self, cursor: GrammarCursor, state: GrammarState, walk: Walk) -> None:
        began = time.thread_time()
        masks, tape, problem = follow(state, encode(walk.fixed), encode(walk.path))
        seconds = time.thread_time() - began
        spent = cursor.seconds + seconds
        if seconds > _STEP_SECONDS or spent > _SECONDS + _SECONDS_PER_BYTE * cursor.length:
            cursor.dear = True
            del self._states[cursor.key]
        cursor.take(0, masks, tape, seconds, problem)

    # Processes

    def _room(self) -> bool:
        """Whether one more process may start. If there are too many, ends the least recently used idle one."""
        if len(self._workers) >= self._bound:
            idle = [worker for worker in self._workers.values() if worker.idle]
            if not idle:
                return False
            self._drop(min(idle, key=lambda worker: bool(worker.members)))
        return True

    def _send(self, worker: _Worker) -> None:
        """Send the queued commands, unless answers are outstanding and the commands too many to be sent beside them.
        While the grammar is compiled nothing is sent: this thread may follow it."""
        if not worker.queue or (worker.unanswered and not worker.compiled):
            return
        data = pack([command for _, command in worker.queue])
        if not worker.unanswered:
            worker.sent, worker.since = 0, time.monotonic()
        elif worker.sent + len(data) > _AHEAD_BYTES:
            return
        worker.sent += len(data)
        worker.unanswered.extend(asker for asker, command in worker.queue if not isinstance(command, Forget))
        worker.queue.clear()
        try:
            worker.sock.sendall(data)
        except OSError:
            self._lost(worker)

    def _read(self, worker: _Worker) -> None:
        try:
            data = worker.sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(worker)
            return
        for answer in worker.unpacker.feed(data):
            asker = worker.unanswered.popleft()
            worker.since = time.monotonic()
            if isinstance(answer, Compiled):
                if answer.refusal is not None:
                    self._drop(worker)
                    for cursor in worker.members.values():
                        cursor.refuse(answer.refusal)
                    return
                worker.compiled = True
                if self._takes(worker.structured, answer.seconds):
                    self._release(worker)
                    for cursor in worker.members.values():
                        cursor.ask_again()
                    return
            elif asker is not None:
                masks = [np.frombuffer(mask, dtype=bool) for mask in answer.masks]
                asker.take(answer.known, masks, encode(answer.tape), answer.seconds, answer.problem)
        self._send(worker)

    def _takes(self, structured: StructuredOutput, seconds: float) -> bool:
        """Whether this thread follows a grammar from now on. A process took `seconds` to compile it."""
        now = time.monotonic()
        self._compiling += _COMPILING_SHARE * (now - self._compiling_at)
        self._compiling, self._compiling_at = min(self._compiling, _COMPILING_SECONDS), now
        # A grammar that is already followed here has a process only for cursors that were too expensive.
        if structured in self._grammars or seconds > self._compiling or not is_regular(structured):
            return False
        self._compiling -= seconds
        self._grammars.start(structured)
        return True

    def _lost(self, worker: _Worker) -> None:
        """A process has ended without being told to."""
        self._drop(worker)
        culprit = worker.unanswered[0] if worker.unanswered else None
        if worker.unanswered and culprit is None:
            logger.warning("a %s took too much time or memory to compile", worker.structured.kind)
            for cursor in worker.members.values():
                cursor.refuse(f"the {worker.structured.kind} cannot be used: {_TOO_LONG}")
            return
        if culprit is not None and culprit.suspect:
            culprit.lose(time.monotonic() - worker.since)
        elif culprit is not None:
            # Answers are sent together, so it may have been any of these.
            for asker in worker.unanswered:
                if asker is not None:
                    asker.suspect = True
        for cursor in worker.members.values():
            if cursor.waiting:
                cursor.ask_again()

    def _release(self, worker: _Worker) -> None:
        """This thread does its work from now on."""
        if worker.lowered:
            self._drop(worker)
            return
        del self._workers[worker.structured]
        self._selector.unregister(worker.sock)
        nursery.take_back(worker.number, worker.sock)

    def _drop(self, worker: _Worker) -> None:
        if self._workers.get(worker.structured) is worker:
            del self._workers[worker.structured]
        self._selector.unregister(worker.sock)
        worker.sock.close()
