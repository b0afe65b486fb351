"""What a client may send over one connection, right or wrong, and how it goes about it."""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.faults.faulty import SAFE

_PATHS = [
    "/v1/completions", "/tokenize", "/detokenize", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/x",
    "/version", "/load", "/openapi.json", "/tokenizer_info", "/", "/v1", "*", "http://x/health", "//", "/%00", "/%ff",
    "/v1/completions?a=b", "/v1/completions/", "/..", "/\u00e9",
]  # fmt: skip
_METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "CONNECT", "PATCH", "get", "X"]
_HEADERS = [
    b"connection: close", b"connection: keep-alive", b"connection: upgrade\r\nupgrade: websocket", b"upgrade: h2c",
    b"expect: 100-continue", b"expect: 200-ok", b"content-encoding: gzip", b"content-encoding: identity",
    b"origin: https://page.example", b"access-control-request-method: POST", b"authorization: Bearer x",
    b"transfer-encoding: chunked", b"transfer-encoding: gzip", b"content-length: 5", b"content-length: 99999999999",
    b"content-length: -1", b"content-length: 5, 5", b"host: y", b"x-request-id: \xff\xfe", b"x: " + b"y" * 5000,
    b" folded: header", b"no colon", b"x:", b": x", b"traceparent: 00-0-0-0", b"cookie: a=b", b"range: bytes=0-1",
    b"content-type: text/plain", b"accept: text/event-stream", b"te: trailers", b"trailer: x", b"x\x00y: z",
]  # fmt: skip

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = [
    "max_tokens", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "stream",
    "logprobs", "prompt_logprobs", "echo", "logit_bias", "decoding", "stream_options", "utf8", "response_format",
    "structured_outputs", "priority", "cache_salt", "suffix", "user", "model", "prompt", "prompt_encoding",
    "presence_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "return_token_ids", "nothing",
]  # fmt: skip
_texts = st.text(min_size=1, max_size=40)
_prompts = _texts | st.lists(_texts, min_size=1, max_size=5) | st.lists(st.integers(4, 259), min_size=1, max_size=9)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Mostly a completion that is served, or nearly one."""
    kind = draw(st.sampled_from(["good", "good", "good", "good", "field", "field", "tokens", "json", "bytes"]))
    if kind == "json":
        return json.dumps(draw(_json)).encode()
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    body: dict[str, Any] = {"prompt": draw(_prompts), "max_tokens": draw(st.integers(1, 8)), **SAFE}
    body["stream"] = draw(st.booleans())
    if kind == "tokens":
        body["tokens"] = draw(st.lists(st.integers(-1, 261), max_size=20))
    if kind == "field":
        body |= draw(st.dictionaries(st.sampled_from(_FIELDS), _json, min_size=1, max_size=3))
    return json.dumps(body).encode()


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    body = draw(bodies())
    lines = [
        f"{draw(st.sampled_from(_METHODS))} {draw(st.sampled_from(_PATHS))} HTTP/1.{draw(st.sampled_from('11110'))}"
    ]
    head = [lines[0].encode(), b"host: x", b"content-type: application/json"]
    framing = draw(
        st.sampled_from(["length", "length", "length", "length", "chunks", "chunks", "none", "short", "long"])
    )
    if framing == "chunks":
        size = draw(st.integers(1, 64))
        head.append(b"transfer-encoding: chunked")
        pieces = [body[i : i + size] for i in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    elif framing != "none":
        wrong = {"length": 0, "short": -3, "long": 40}[framing]
        head.append(b"content-length: %d" % max(len(body) + wrong, 0))
    if draw(st.integers(0, 2)) == 0:
        head += draw(st.lists(st.sampled_from(_HEADERS), max_size=2))
    if draw(st.integers(0, 14)) == 0:
        head.pop(draw(st.integers(0, len(head) - 1)))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Conversation:
    """`data` is sent in pieces of `piece` bytes, `pause` seconds apart. Then the client reads for `patience` seconds,
    and goes in a way of `leave`.
    """

    data: bytes
    piece: int
    pause: float
    patience: float
    leave: str

    def hold(self, port: int) -> bytes:
        """What the server answers."""
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            try:
                for start in range(0, len(self.data), self.piece):
                    sock.sendall(self.data[start : start + self.piece])
                    time.sleep(self.pause)
                if self.leave == "half":
                    sock.shutdown(socket.SHUT_WR)
                end = time.monotonic() + self.patience
                while (left := end - time.monotonic()) > 0:
                    sock.settimeout(left)
                    if not (data := sock.recv(1 << 16)):
                        break
                    answer += data
                if self.leave == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # The server has closed it, or says nothing more.
        return answer


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    data = b"".join(draw(st.lists(requests(), min_size=1, max_size=3)))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=3)) + data[place + draw(st.integers(0, 2)) :]
    if draw(st.integers(0, 7)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    pieces = draw(st.sampled_from([1 << 20, 1 << 20, 200, 40]))
    return Conversation(
        data,
        max(pieces, len(data) // 50),
        draw(st.sampled_from([0.0, 0.0, 0.002])),
        draw(st.sampled_from([0.0, 0.02, 0.1, 0.3])),
        draw(st.sampled_from(["close", "half", "reset"])),
    )
