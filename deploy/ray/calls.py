"""What the front and a replica say to each other: one HTTP request, and its answer in pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

#: Bytes of a prompt, or ids, that decide which replica gets it. A conversation grows at its end.
AFFINITY_LENGTH = 256


@dataclass(frozen=True)
class Call:
    """A request, its body read. `headers` are lower-case names and values as they came."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True)
class Head:
    """The first piece of an answer; what follows are pieces of its body."""

    status: int
    headers: list[tuple[bytes, bytes]]


class _Affinity(msgspec.Struct):
    prompt: Any = None
    cache_salt: Any = None


_decoder = msgspec.json.Decoder(_Affinity)


def affinity(call: Call) -> str:
    """The same word for requests that may share a prefix in a cache; empty where nothing is known of it."""
    if call.method != "POST":
        return ""
    try:
        asked = _decoder.decode(call.body)
    except msgspec.DecodeError:
        return ""  # The replica says what is wrong with it.
    prompt = asked.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str | list) or not prompt:
        return ""
    begin = repr((asked.cache_salt, prompt[:AFFINITY_LENGTH]))
    return hashlib.blake2b(begin.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
