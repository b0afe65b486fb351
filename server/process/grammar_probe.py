"""Grammars are tried in a process that may fail, before they reach the engine.

A schema of a hundred bytes can ask its compiler for hours, or for more memory than there is, and then the compiler ends
the process (`allOf` of forty patterns, a large `multipleOf`). So the server has every grammar that it has not seen
compiled by a child with little time and memory. What passes costs the engine no more than the child was given.

Run as a program this module is that child: a JSON object a line, the structured output, answered by a line: null, or
why it cannot be used.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from collections import OrderedDict

import msgspec

from fastblt.server.child_process import child_environment
from fastblt.server.request import MAX_GRAMMAR_BYTES, InvalidRequestError, QueueFullError, StructuredOutput

logger = logging.getLogger("fastblt.grammar")

#: Processor time for one grammar, and memory of the whole child.
CPU_SECONDS = 0.25
MEMORY_BYTES = 2**30

#: For the child to answer, also on a machine that does much else.
_WALL_SECONDS = 20.0
#: Grammars that may wait for their turn, and those that passed and need none.
_WAITING = 64
_REMEMBERED = 1024

_COMMAND = (sys.executable, "-P", "-m", "fastblt.server.process.grammar_probe")


class GrammarProbe:
    """The server's end; the child starts with the first grammar. Confined to an event loop."""

    def __init__(self) -> None:
        self._passed: OrderedDict[StructuredOutput, None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._child: asyncio.subprocess.Process | None = None

    async def check(self, structured: StructuredOutput) -> None:
        """Raises InvalidRequestError for what does not compile, or not within bounds; QueueFullError when too many
        wait."""
        if structured in self._passed:
            self._passed.move_to_end(structured)
            return
        if self._waiting >= _WAITING:
            raise QueueFullError(f"{self._waiting} grammars wait to be compiled; try again later")
        self._waiting += 1
        try:
            async with self._turn:
                problem = None if structured in self._passed else await self._ask(structured)
        finally:
            self._waiting -= 1
        if problem is not None:
            raise InvalidRequestError(problem, "structured_outputs")
        self._passed[structured] = None
        if len(self._passed) > _REMEMBERED:
            self._passed.popitem(last=False)

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            if child.returncode is None:
                child.kill()
            await child.wait()

    async def _ask(self, structured: StructuredOutput) -> str | None:
        child = self._child
        if child is None or child.returncode is not None:
            child = await self._start()
        assert child.stdin is not None and child.stdout is not None
        answered = False
        try:
            async with asyncio.timeout(_WALL_SECONDS):
                child.stdin.write(msgspec.json.encode(structured) + b"\n")
                await child.stdin.drain()
                line = await child.stdout.readline()
            answered = line.endswith(b"\n")
        except (TimeoutError, ConnectionError):
            pass
        finally:
            # Also when the asker is gone in the middle: the next one must not read this answer.
            if not answered:
                await self.close()
        if not answered:
            logger.warning("a %s took too much time or memory to compile", structured.kind)
            return (
                f"the {structured.kind} takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB to compile; "
                "make it simpler"
            )
        problem: str | None = msgspec.json.decode(line, type=str | None)
        return problem

    async def _start(self) -> asyncio.subprocess.Process:
        # Threads of numerical libraries, which it does not use, would take their memory from its own.
        environment = {**child_environment(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._child = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            # A terminal's interrupt is the server's to obey.
            start_new_session=True,
        )
        return self._child


def main() -> None:
    """The child: until its input ends."""
    # The library itself must not count against what a grammar may take.
    from fastblt.server.engine.constraints.grammar import compile_grammar

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Each line may be escaped to six times its length.
    for line in iter(lambda: sys.stdin.buffer.readline(8 * MAX_GRAMMAR_BYTES), b""):
        structured = msgspec.json.decode(line, type=StructuredOutput)
        # The signal's default is to end the process, whatever code it is in.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        problem = None
        try:
            compile_grammar(structured)
        except InvalidRequestError as error:
            problem = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(msgspec.json.encode(problem) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
