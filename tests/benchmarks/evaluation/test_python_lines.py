from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from fastblt.benchmarks.evaluation.python_lines import (
    first_line,
    humaneval_prompts,
    humaneval_texts,
    measure,
    parses,
    parses_strictly,
)
from fastblt.models.vocabulary import BOS_ID, decode


def test_the_prompts_of_the_package() -> None:
    texts = humaneval_texts()
    assert len(texts) == 164 and all("def " in text for text in texts)
    whole, ends = humaneval_prompts(), humaneval_prompts(100)
    assert decode(whole[0]).decode() == texts[0] and whole[0][0] == BOS_ID
    assert all(ids[0] == BOS_ID and len(ids) <= 101 for ids in ends)
    assert texts[0].encode().endswith(decode(ends[0]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("    return 1\n    more", "    return 1"),
        ("\n  \n    x = 1\n", "\n  \n    x = 1"),
        ("    no end", "    no end"),
        ("", ""),
        (" \n\n", ""),
    ],
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text).strip() == line.strip()
    assert text.startswith(first_line(text))
    assert first_line(text) == line or not line


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("    return 2 * x\n", True),
        ("\n    for y in x:", True),
        ("    try:", True),
        ("    # twice", True),
        ("    return 2 *", False),
        ("    >>> double(2)", False),
        ("        return x", False),
        ("", False),
        ("\n\n", False),
    ],
)
def test_parses(line: str, fits: bool) -> None:
    assert parses('def double(x):\n    """Twice x."""\n', line) is fits


def test_strict_parsing() -> None:
    prompt = 'def f(x):\n    """Doc."""\n'
    assert parses_strictly(prompt, "    return x")
    assert not parses_strictly(prompt, "    for y in x:")
    assert not parses_strictly(prompt, "    >>> f(1)")
    assert not parses_strictly(prompt, "\n   ")


def test_measure_counts_answers_and_errors() -> None:
    prompt = 'def f(x):\n    """Doc."""\n'
    texts = {"a": "    return x\n", "b": "    for y in x:\n", "c": "    >>> f(1)\n"}

    def answer(request: httpx.Request) -> httpx.Response:
        body: dict[str, Any] = json.loads(request.content)
        assert body["temperature"] == 0 and body["decoding"] == {"method": "blt-s"}
        which = body["prompt"].removeprefix(prompt).strip("# \n")
        if which == "d":
            return httpx.Response(429, json={"error": {"message": "full"}})
        if which == "e":
            raise httpx.ConnectError("refused")
        choice = {"text": texts.get(which, ""), "finish_reason": "error" if which == "f" else "length"}
        return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 10}})

    async def run() -> dict[str, Any]:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            prompts = [f"{prompt}    # {which}\n" for which in "abcdef"]
            return await measure(client, prompts, {"temperature": 0, "decoding": {"method": "blt-s"}})

    result = asyncio.run(run())
    assert result["prompts"] == 6 and result["bytes"] == 30
    assert [error.split(":")[0] for error in result["errors"]] == ["status 429", "ConnectError", "finish_reason error"]
    assert (result["strict"], result["lenient"], result["doctest"], result["blank"]) == (1, 2, 1, 3)
