"""The cost of HTTP and streaming: a server under closed-loop load, and the engine alone on the same prompts, in turns.

    python -m fastblt.benchmarks.load.front    32 streams, 96 prompts of 256 bytes, 128 bytes each

The client runs on the same cores, and its time counts as part of the HTTP front's. So it does as little as possible:
answers are read, but neither parsed nor timed. An answer must begin with status 200, report its number of tokens in a
chunk near its end, and end with `[DONE]`.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

from fastblt.benchmarks.command import command
from fastblt.benchmarks.load.names import Dataset
from fastblt.benchmarks.load.offline import throughput
from fastblt.benchmarks.load.serving import serving
from fastblt.benchmarks.load.workload import prompts
from fastblt.server.llm import LLM
from fastblt.server.request import DecodingMethod, DecodingParams
from fastblt.server.settings import PRETRAINED

#: Bytes kept from the end of an answer, which contain its last chunks.
_TAIL = 4096
#: Generated text cannot match this, since its quotes are escaped.
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
#: The last event, and the end of a chunked body.
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"

#: Seconds after which a run without any new data fails.
PATIENCE = 60.0


class _Answer:
    """One streamed completion, on its own connection."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
        self.sock.sendall(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + content)
        self.sock.setblocking(False)
        self._first = b""
        self._tail = b""

    def read(self) -> bool:
        """Read what has arrived. Returns False at the end of the answer."""
        data = self.sock.recv(1 << 16)
        self._first = self._first or data
        self._tail = (self._tail + data)[-_TAIL:]
        return bool(data)

    def tokens(self) -> int:
        """The number of tokens that the answer reports. Raises RuntimeError unless the answer is complete."""
        counts = _TOKENS.findall(self._tail)
        if not self._first.startswith(b"HTTP/1.1 200 ") or not self._tail.endswith(_END) or not counts:
            raise RuntimeError(f"no complete answer: {self._first[:500]!r} ... {self._tail[-500:]!r}")
        return int(counts[-1])


def stream_all(
    port: int, bodies: Sequence[dict[str, Any]], concurrency: int, patience: float = PATIENCE
) -> tuple[float, list[int]]:
    """Stream completions, `concurrency` at once. Returns the seconds for all, and their tokens in the order of ending.

    Raises RuntimeError if an answer is not a complete stream, or nothing arrives for `patience` seconds, OSError if a
    connection is refused or reset.
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


def compare(model: str, streams: int, count: int, length: int, rounds: int, method: str) -> dict[str, Any]:
    """Bytes per second of server and engine in every round, and the median share of time that HTTP takes."""
    decoding = DecodingParams(DecodingMethod(method))
    asked = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "decoding": {"method": method}}
    served: list[float] = []
    alone: list[float] = []
    with serving(model, ["--max-running", str(streams), "--no-prefix-cache"]) as server:
        llm = LLM(model, max_running=streams, prefix_cache=False)
        for seed in range(rounds):
            texts = [text for text, _ in prompts(Dataset.HELD_OUT, count, 256, seed)]
            bodies = [{"prompt": text, **asked} for text in texts]
            stream_all(server.port, bodies[:1], 1)
            seconds, tokens = stream_all(server.port, bodies, streams)
            if set(tokens) != {length}:
                raise RuntimeError(f"completions of {length} bytes were asked for; {sorted(set(tokens))} came")
            served.append(sum(tokens) / seconds)
            result = throughput(llm, [text.encode() for text in texts], length, decoding)
            alone.append(result["output_bytes_per_second"])
    share = statistics.median(1 - one / other for one, other in zip(served, alone, strict=True))
    return {"method": method, "streams": streams, "served": served, "alone": alone, "front_share": share}


def measure(
    *,
    model: str = str(PRETRAINED),
    streams: int = 32,
    num_prompts: int = 96,
    length: int = 128,
    rounds: int = 5,
    method: Sequence[str] = ("blt", "auto"),
) -> dict[str, Any]:
    """The loss of bytes per second through HTTP, by method."""
    rows = []
    for name in method:
        rows.append(compare(model, streams, num_prompts, length, rounds, name))
        served, alone = (statistics.median(rows[-1][where]) for where in ("served", "alone"))
        share = 100 * rows[-1]["front_share"]
        print(f"{name}: {served:.0f} B/s served, {alone:.0f} alone; the front takes {share:.1f} %", flush=True)
    return {"runs": rows}


app = command(measure)

if __name__ == "__main__":
    app()
