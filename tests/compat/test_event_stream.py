"""A reader of server-sent events that does what the HTML standard (section 9.2) says, and nothing more lenient."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator

import httpx
import pytest

from tests.compat.conftest import KEY, MODEL


def read(chunks: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    """(type, data, last event id) of every event that is dispatched."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    text = "".join(decoder.decode(chunk) for chunk in chunks) + decoder.decode(b"", True)
    assert not text.startswith("\ufeff")
    kind, data, last_id = "", "", ""
    # Only these three end a line; splitlines knows more.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # What the stream breaks off in is no line, and an event without its empty line is discarded.
    for line in lines[:-1]:
        if line == "":
            if data:
                yield kind or "message", data.removesuffix("\n"), last_id
            kind, data = "", ""
            continue
        if line.startswith(":"):
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                kind = value
            case "data":
                data += value + "\n"
            case "id" if "\0" not in value:
                last_id = value
            case "retry":
                assert value.isascii() and value.isdigit()
            case _:
                raise AssertionError(f"a field that no reader knows: {field!r}")


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_by_the_letter(url: str, size: int) -> None:
    body = {
        "model": MODEL,
        # What an escape that is forgotten would break: every kind of line end, and characters of four bytes.
        "prompt": ["line\nline\r\nline\rline\u2028\u0085\u0000", "data: {}\n\ndata: [DONE]\n\n👋"],
        "max_tokens": 40,
        "echo": True,
        "n": 2,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"authorization": f"Bearer {KEY}", "accept": "text/event-stream"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        *events, done = read(response.iter_raw(size))
    assert done == ("message", "[DONE]", "") and {(kind, last) for kind, _, last in events} == {("message", "")}
    parsed = [json.loads(data) for _, data, _ in events]
    texts = ["", "", "", ""]
    for event in parsed[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    for index, text in enumerate(texts):
        assert text.startswith(body["prompt"][index // 2])  # type: ignore[index]
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"]["completion_tokens"] == 160


def test_an_error_is_no_stream(url: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "accept": "text/event-stream"}
    body = {"prompt": "", "stream": True}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
    assert response.status_code == 400 and response.headers["content-type"] == "application/json"
