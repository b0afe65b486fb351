"""Bodies of every kind that takes long to read, as large as the server takes them, or larger."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

MIB = 2**20


def filled(head: bytes, piece: bytes, tail: bytes, size: int) -> bytes:
    """`head`, `piece` as often as fits into `size` bytes, and `tail`."""
    return head + piece * ((size - len(head) - len(tail)) // len(piece)) + tail


def large_bodies(max_model_len: int) -> Iterator[tuple[str, str, bytes]]:
    """A name, a path and a body each."""
    completions, size = "/v1/completions", 6 * MIB
    text = filled(b'{"prompt": "', b"x", b'"}', size)
    yield "a text", completions, text
    yield "a text for /tokenize, with names", "/tokenize", b'{"return_token_strs": true, ' + text[1:]
    most = {"return_token_strs": True, "prompt": "\u00e9" * (MIB // 2)}
    yield "the longest text for /tokenize", "/tokenize", json.dumps(most).encode()
    yield "escapes", completions, filled(b'{"prompt": "', b"\\u00e9", b'"}', size)
    yield "ids", completions, filled(b'{"prompt": [', b"5,", b"5]}", size)
    yield "ids for /detokenize", "/detokenize", filled(b'{"tokens": [', b"200,", b"5]}", 4 * MIB)
    yield "numbers as ids", completions, filled(b'{"prompt": [', b"5.5,", b"5]}", size)
    yield "numbers in an unknown field", completions, filled(b'{"prompt": "a", "x": [', b"1.5,", b"1]}", size)
    yield "lists in an unknown field", completions, filled(b'{"prompt": "a", "x": [', b"[],", b"1]}", size)
    yield "lists as a prompt", completions, filled(b'{"prompt": [', b"[],", b"[]]}", size)
    yield "empty prompts", completions, filled(b'{"prompt": [', b'"",', b'""]}', size)
    yield "lists in lists", completions, filled(b'{"prompt": [', b"[[[[[[]]]]]],", b"[]]}", size)
    yield "nesting", completions, filled(b'{"prompt": ', b"[", b"", size)
    yield "nesting in an unknown field", completions, filled(b'{"x": ', b'{"a":', b"", size)
    keys = b",".join(b'"%06x":1' % i for i in range(size // 12))
    yield "keys", completions, b'{"prompt": "a", ' + keys + b"}"
    yield "few enough keys", completions, b'{"prompt": "a", ' + keys[:250_000].rpartition(b",")[0] + b"}"
    yield "small lists in a field", completions, filled(b'{"prompt": "a", "logit_bias": [', b"[],", b"1]}", 250_000)
    yield "small stops", completions, filled(b'{"prompt": "a", "stop": [', b'"",', b'""]}', 250_000)
    yield "digits", completions, filled(b'{"prompt": "a", "seed": ', b"9", b"}", 250_000)
    yield "many digits", completions, filled(b'{"prompt": "a", "x": ', b"9", b"}", size)
    yield "white space", completions, filled(b'{"prompt": "a"', b" ", b"}", size)
    yield "no UTF-8", completions, filled(b'{"prompt": "', b"x", b'\xff"}', size)
    # What the limits allow in full: as many prompts as long as they may be, each with a byte of completion.
    one = max_model_len - 8
    whole = min(128, MIB // (one + 1))
    prompts = [f"{i:04d}" + "y" * (one - 4) for i in range(whole)]
    refused = {"max_tokens": 1, "decoding": {"method": "blt", "block_size": 4}}
    yield "whole prompts", completions, json.dumps({"prompt": prompts, **refused}).encode()
    ids = [[ord(c) + 4 for c in prompt] for prompt in prompts]
    yield "whole prompts as ids", completions, json.dumps({"prompt": ids, **refused}).encode()
    yield (
        "an echo",
        completions,
        json.dumps(
            {
                # Patches close in it, so that the choices share its pages.
                "prompt": "".join(random.Random(0).choices("abcdefgh .\n", k=one)),
                "n": 16,
                "echo": True,
                "max_tokens": 0,
                "return_token_ids": True,
                "return_base64": True,
            }
        ).encode(),
    )
    scored = {"prompt": "z" * (2**18 // 21 - 1), "prompt_logprobs": 20, "max_tokens": 0}
    yield "logprobs of a prompt", completions, json.dumps(scored).encode()
    yield (
        "logprobs of a prompt, alone",
        completions,
        json.dumps(
            {"prompt": ["z" * (one // 2)] * (2**18 // one), "echo": True, "logprobs": 0, "max_tokens": 0}
        ).encode(),
    )
