"""A step never waits on one request: beside grammars that take long, others have their bytes in time."""

from __future__ import annotations

import time

import pytest

from fastblt.models.vocabulary import encode
from fastblt.server.engine.constraints import cursor, grammar_pool
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    ErrorCode,
    FinishReason,
    Request,
    SamplingParams,
    StructuredOutput,
)
from tests.server.harness import model, run, settings

_PAIRS = " | ".join(f"{one} {other}" for one in "abcd" for other in "abcd")
#: One byte of the first takes milliseconds after a hundred, of the second tenths of a second after a dozen; the third
#: takes more than a second for its third one.
DEAR = {
    "ambiguous": 'start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]+/\n',
    "pairs": "start: a\n" + "".join(f'{name}: {_PAIRS} | "x"\n' for name in "abcd"),
    "alternatives": 'start: "x" "x" e\ne: ' + " | ".join(f'e "{i}" e' for i in range(250)) + ' | "x"\n',
}
#: Seconds: far more than a step waits for grammars, and less than any of them takes. Other processes run beside tests.
BOUND = 0.5


def request(name: str, method: DecodingMethod, text: str | None, max_tokens: int) -> Request:
    return Request(
        name,
        [1, *encode(b"x")],
        SamplingParams(
            max_tokens=max_tokens,
            seed=len(name),
            ignore_eos=True,
            logit_bias={2: -100.0},
            structured_output=None if text is None else StructuredOutput.grammar(text),
            decoding=DecodingParams(method),
        ),
        0.0,
    )


@pytest.mark.parametrize("method", [DecodingMethod.BLT, DecodingMethod.BLT_S, DecodingMethod.BLT_DV])
@pytest.mark.parametrize("name", DEAR)
def test_others_go_on_beside_dear_grammars(name: str, method: DecodingMethod) -> None:
    engine = Engine(model(0), settings(max_running=8, max_waiting=16, cache_bytes=96 << 20))
    for number in range(7):
        engine.add(request(f"dear-{number}", method, DEAR[name], 300), wait=False)
    # Let them come to where it is dear.
    until = time.monotonic() + 2
    while time.monotonic() < until and engine.has_work():
        engine.step()
    engine.add(request("free", DecodingMethod.BLT, None, 30), wait=False)
    began, longest, had = time.monotonic(), 0.0, 0
    while had < 30:
        before = time.monotonic()
        had += sum(len(delta.ids) for delta in engine.step() if delta.request_id == "free")
        longest = max(longest, time.monotonic() - before)
    assert longest < BOUND and time.monotonic() - began < 2
    for number in range(7):
        engine.abort(f"dear-{number}")
    engine.step()
    assert not engine.has_work() and engine.balanced()


def test_a_mask_that_never_comes_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs: its request is left out, pass after pass, and can be aborted."""
    engine = Engine(model(0), settings())
    engine.add(request("stuck", DecodingMethod.BLT, DEAR["ambiguous"], 50))
    monkeypatch.setattr(grammar_pool.GrammarPool, "ask", lambda *_: None)
    for _ in range(5):
        engine.step()
    engine.add(request("free", DecodingMethod.BLT, None, 30))
    ids: list[int] = []
    waited = time.monotonic()
    while len(ids) < 30:
        ids += [i for delta in engine.step() if delta.request_id == "free" for i in delta.ids]
    assert time.monotonic() - waited < 5
    engine.abort("stuck")
    [last] = engine.step()
    assert last.finish_reason is FinishReason.ABORT and not engine.has_work()


def test_who_exceeds_ends_with_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor, "SECONDS", 0.05)
    monkeypatch.setattr(cursor, "SECONDS_PER_BYTE", 0.0)
    engine = Engine(model(0), settings())
    done = run(
        engine,
        [
            request("dear", DecodingMethod.BLT, 'start: a\na: a a | "x"\n', 300),
            request("free", DecodingMethod.BLT, None, 30),
        ],
    )
    assert done["free"].error is None and len(done["free"].ids) == 30
    last = done["dear"].deltas[-1]
    assert last.finish_reason is FinishReason.ERROR and last.error_code is ErrorCode.GRAMMAR_TOO_COMPLEX
    assert "processor time" in str(last.error)


def test_dear_requests_leave_places_for_others_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fill what they may have, one without a process goes before those that wait, and nobody of these starves."""
    engine = Engine(model(0), settings(max_running=16, max_waiting=80))
    names = [f"dear-{number}" for number in range(64)]
    for name in names:
        engine.add(request(name, DecodingMethod.BLT, DEAR["ambiguous"], 50), wait=False)
    # From here on they wait for masks that never come.
    monkeypatch.setattr(grammar_pool.GrammarPool, "ask", lambda *_: None)
    monkeypatch.setattr(grammar_pool.GrammarPool, "poll", lambda *_: None)
    engine.step()
    assert engine.started == names[:4]
    engine.add(request("free", DecodingMethod.BLT, None, 3), wait=False)
    deltas = engine.step()
    assert engine.started == ["free"]
    while not any(delta.request_id == "free" and delta.finish_reason for delta in deltas):
        deltas = engine.step()
    # Places go to those that waited longest, also when an ordinary request asks at the same time.
    for at, name in enumerate(names[:-4]):
        engine.abort(name)
        engine.add(request(f"free-{at}", DecodingMethod.BLT, None, 3), wait=False)
        engine.step()
        assert engine.started == [names[at + 4], f"free-{at}"]
        while any(sequence.startswith("free") for sequence in engine._sequences):
            engine.step()
    for name in names[-4:]:
        engine.abort(name)
    engine.step()
    assert not engine.has_work() and engine.balanced()


def test_what_is_followed_on_the_spot_waits_for_no_place() -> None:
    engine = Engine(model(0), settings(max_running=4, max_waiting=16))
    digits = StructuredOutput.regex("[0-9]{20}")
    for number in range(4):
        params = SamplingParams(max_tokens=20, structured_output=digits, decoding=DecodingParams(DecodingMethod.BLT))
        engine.add(Request(f"digits-{number}", [1, *encode(b"x")], params, 0.0))
    engine.step()
    assert len(engine.started) == 4
