"""Reads streams and does as little as can be, for benchmarks in which a client's time would pass for the server's.

What arrives is neither parsed nor timed: an answer must begin with status 200 and end with `[DONE]`, after a chunk that
says how many tokens there were.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections.abc import Sequence
from typing import Any

#: Bytes at an answer's end that hold its last chunks.
_TAIL = 4096
#: No text can look like this: its quotes are escaped.
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
#: The last event, and the end of a chunked body.
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"

#: Seconds in which something must arrive.
PATIENCE = 60.0


class _Answer:
    """A connection of its own for one streamed completion."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
        self.sock.sendall(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + content)
        self.sock.setblocking(False)
        self._first = b""
        self._tail = b""

    def read(self) -> bool:
        """Take what has arrived; False at its end."""
        data = self.sock.recv(1 << 16)
        self._first = self._first or data
        self._tail = (self._tail + data)[-_TAIL:]
        return bool(data)

    def tokens(self) -> int:
        """Raises RuntimeError unless the answer is complete."""
        counts = _TOKENS.findall(self._tail)
        if not self._first.startswith(b"HTTP/1.1 200 ") or not self._tail.endswith(_END) or not counts:
            raise RuntimeError(f"no complete answer: {self._first[:500]!r} ... {self._tail[-500:]!r}")
        return int(counts[-1])


def stream_all(
    port: int, bodies: Sequence[dict[str, Any]], concurrency: int, patience: float = PATIENCE
) -> tuple[float, list[int]]:
    """Stream completions, so many at once: seconds for all of them, and their tokens in the order of their ends.

    Raises RuntimeError where an answer is no complete stream, or nothing arrives for `patience` seconds, OSError where
    a connection is refused or reset.
    """
    waiting = list(reversed(bodies))
    tokens: list[int] = []
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            answer = _Answer(port, waiting.pop())
            selector.register(answer.sock, selectors.EVENT_READ, answer)

        began = time.perf_counter()
        try:
            for _ in range(min(concurrency, len(waiting))):
                start()
            while len(tokens) < len(bodies):
                ready = selector.select(patience)
                if not ready:
                    raise RuntimeError(f"nothing has arrived for {patience:g} s")
                for key, _ in ready:
                    answer: _Answer = key.data
                    if answer.read():
                        continue
                    selector.unregister(answer.sock)
                    answer.sock.close()
                    tokens.append(answer.tokens())
                    if waiting:
                        start()
            return time.perf_counter() - began, tokens
        finally:
            for key in selector.get_map().values():
                key.data.sock.close()
