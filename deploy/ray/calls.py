"""Messages between the front and a replica: one HTTP request, and its answer in pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

#: The replica is chosen by this many characters (or ids) from the start of a prompt. A conversation keeps its start.
AFFINITY_LENGTH = 256


@dataclass(frozen=True)
class Call:
    """A request with its body. `headers` are lower-case names, and values as received."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True)
class Head:
    """The first piece of an answer. The pieces after it are bytes of its body."""

    status: int
    headers: list[tuple[bytes, bytes]]


class _Affinity(msgspec.Struct):
    prompt: Any = None
    cache_salt: Any = None


_decoder = msgspec.json.Decoder(_Affinity)


def affinity(call: Call) -> str:
    """A key that is equal for requests that may share a cached prefix; empty if the request has no usable prompt."""
    if call.method != "POST":
        return ""
    try:
        asked = _decoder.decode(call.body)
    except msgspec.DecodeError:
        return ""  # The replica answers with the error.
    prompt = asked.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str | list) or not prompt:
        return ""
    begin = repr((asked.cache_salt, prompt[:AFFINITY_LENGTH]))
    return hashlib.blake2b(begin.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
