"""Grammars that would harm whoever compiles them harm a child, and are refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

import fastblt.server.process.grammar_probe as grammar_probe
from fastblt.server.process.grammar_probe import GrammarProbe
from fastblt.server.request import InvalidRequestError, QueueFullError, StructuredOutput

GOOD = StructuredOutput.json({"type": "object", "properties": {"a": {"type": "integer"}}})
#: The first took the compiler 12 s, the second more than 8 GB.
SLOW = StructuredOutput.json({"type": "integer", "multipleOf": 999983})
LARGE = StructuredOutput.json({"type": "string", "allOf": [{"pattern": f"a{i}"} for i in range(40)]})


@pytest.fixture
async def probe() -> AsyncIterator[GrammarProbe]:
    probe = GrammarProbe()
    yield probe
    await probe.close()


async def test_what_compiles_passes_and_is_remembered(probe: GrammarProbe) -> None:
    await probe.check(GOOD)
    await probe.close()
    await probe.check(GOOD)
    assert probe._child is None


async def test_what_does_not_compile_is_refused_with_the_reason(probe: GrammarProbe) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            await probe.check(StructuredOutput.regex("(a"))
    await probe.check(StructuredOutput.regex("line\nbreaks \u2028 and é"))


@pytest.mark.parametrize("bomb", [SLOW, LARGE], ids=["slow", "large"])
async def test_what_takes_too_much_is_refused_soon_and_the_next_one_passes(
    probe: GrammarProbe, bomb: StructuredOutput
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="make it simpler"):
        await probe.check(bomb)
    assert time.monotonic() - began < 10
    await probe.check(GOOD)


async def test_who_leaves_in_the_middle_does_not_leave_an_answer_for_the_next(probe: GrammarProbe) -> None:
    await probe.check(GOOD)
    asking = asyncio.create_task(probe.check(SLOW))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    with pytest.raises(InvalidRequestError, match="look-around"):
        await probe.check(StructuredOutput.regex("(?=a)b"))


async def test_few_may_wait(probe: GrammarProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_probe, "_WAITING", 2)
    waiting = [asyncio.create_task(probe.check(StructuredOutput.regex(text))) for text in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await probe.check(StructuredOutput.regex("c"))
    await asyncio.gather(*waiting)
    await probe.check(StructuredOutput.regex("c"))


async def test_a_child_that_was_killed_is_replaced(probe: GrammarProbe) -> None:
    await probe.check(GOOD)
    assert probe._child is not None
    probe._child.kill()
    await probe._child.wait()
    await probe.check(StructuredOutput.regex("a+"))
