"""Completions of every kind in one engine: each ends once, none blames the model, and what verifies equals BLT.

By hand, longer: `make fuzz`, or FASTBLT_FUZZ=1000 for so many examples of each test, new ones each time.
"""

from __future__ import annotations

import asyncio
import json
import time
from functools import cache
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from fastblt.server.api.bodies import Bodies
from fastblt.server.api.completions import _Completion
from fastblt.server.api.errors import ApiError
from fastblt.server.api.schemas import CompletionRequest
from fastblt.server.engine.engine import Engine
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import DecodingMethod, ErrorCode, FinishReason, InvalidRequestError, Request
from tests.fuzz.completions import BLOCKS, DRAFTING, bodies
from tests.fuzz.settings import few, timeout
from tests.server.harness import Finished, least_memory, model, run, settings

pytestmark = timeout

#: Engines that differ in the model's shape and in what they have room for.
ENGINES: list[dict[str, Any]] = [
    {},
    {"max_running": 3, "max_pass_rows": 24},
    {"max_passes_per_beat": 2},
    {"full": True},
]


@cache
def engine(which: int, kind: int) -> Engine:
    """They go on from example to example, with what earlier ones left in the prefix cache."""
    options = dict(ENGINES[kind])
    if options.pop("full", False):
        options["cache_bytes"] = 2 * least_memory(which, 300)
    return Engine(model(which), settings(**options))


def completion(body: dict[str, Any], name: str, max_model_len: int) -> _Completion:
    """Raises InvalidRequestError, or what pydantic does."""
    parsed = CompletionRequest.model_validate(body)
    made = _Completion(parsed, "tiny", parsed.take_prompts(max_model_len), [])
    made.requests = [_renamed(request, name, at) for at, request in enumerate(made.requests)]
    made._choices = dict(zip([r.request_id for r in made.requests], made._choices.values(), strict=True))
    return made


def _renamed(request: Request, name: str, at: int) -> Request:
    return Request(**{**vars(request), "request_id": f"{name}-{at}", "arrival": time.monotonic()})


async def answer(made: _Completion, results: dict[str, Finished]) -> dict[str, Any]:
    """What a client would get, from the deltas of all choices."""
    stream = DeltaStream(lambda *_: None, made.requests, whole=True)
    for request in made.requests:
        for delta in results[request.request_id].deltas:
            stream.push(delta)
    bodies = Bodies()
    try:
        rendered: dict[str, Any] = json.loads(await made.answer(stream, bodies))
    finally:
        bodies.close()
    return rendered


def check_end(request: Request, result: Finished) -> None:
    """What holds of every request that was taken."""
    params, last = request.params, result.deltas[-1]
    assert last.error_code not in (ErrorCode.NOT_FINITE, ErrorCode.NOTHING_LEFT, ErrorCode.PASS_FAILED), result.error
    assert result.reason in (FinishReason.STOP, FinishReason.LENGTH), (result.reason, result.error)
    assert len(result.ids) <= params.max_tokens
    assert not {0, 1, 3} & set(result.ids) and (2 not in result.ids or params.include_stop_str_in_output)
    if result.reason == FinishReason.LENGTH and params.structured_output is None:
        assert len(result.ids) == params.max_tokens
    if params.structured_output is None:
        assert len(result.ids) + (last.stop_reason is not None) * 1024 >= params.min_tokens
    values = [value for delta in result.deltas for value in delta.logprobs or ()]
    assert len(values) == (0 if params.logprobs is None else len(result.ids))
    assert all(value.logprob <= 1e-6 and len(value.top) == params.logprobs for value in values)
    if params.utf8 == "strict":
        bytes(i - 4 for i in result.ids).decode()


def told(result: Finished) -> tuple[list[int], str, Any]:
    return result.ids, result.reason, result.deltas[-1].stop_reason


@few
@given(
    which=st.integers(0, 5),
    kind=st.integers(0, len(ENGINES) - 1),
    asked=st.lists(bodies(), min_size=1, max_size=3),
    drafting=st.sampled_from(DRAFTING),
    blocks=st.sampled_from(BLOCKS),
    spread=st.integers(0, 12),
)
def test_lossless_methods_agree_and_every_request_ends(
    which: int,
    kind: int,
    asked: list[dict[str, Any]],
    drafting: dict[str, Any],
    blocks: dict[str, Any],
    spread: int,
) -> None:
    one = engine(which, kind)
    methods = {"blt": {"method": "blt"}, "drafting": drafting, "auto": {"method": "auto"}, "blocks": blocks}
    methods |= {name: {"method": name} for name in ("blt-s", "blt-dv")}
    taken: dict[tuple[int, str], _Completion] = {}
    for number, body in enumerate(asked):
        refused = []
        for name, decoding in methods.items():
            try:
                made = completion(body | {"decoding": decoding}, f"{number}-{name}", one.max_model_len)
                for request in made.requests:
                    one.add(request)
                    one.abort(request.request_id)
                while one.has_work():
                    one.step()
                taken[number, name] = made
            except InvalidRequestError as error:
                refused.append(name)
                note(f"{number} {name}: {error}")
        # What a lossless method refuses, all of them do.
        assert not set(refused) - {"blocks"} or len(refused) == len(methods)
    requests = [request for made in taken.values() for request in made.requests]
    arrivals = [at * spread // 4 for at in range(len(requests))]
    results = run(one, requests, arrivals)
    for request in requests:
        check_end(request, results[request.request_id])
    for (number, name), made in taken.items():
        rendered = asyncio.run(answer(made, results))
        assert len(rendered["choices"]) == len(made.requests)
        if name == "blocks":
            continue
        for own, other in zip(made.requests, taken[number, "blt"].requests, strict=True):
            assert told(results[own.request_id]) == told(results[other.request_id]), (asked[number], methods[name])
            assert own.params.decoding.method is DecodingMethod(methods[name]["method"])


@few
@given(body=bodies(), which=st.integers(0, 5))
def test_company_changes_no_byte(body: dict[str, Any], which: int) -> None:
    """Alone in an engine with nothing cached, and in one that has served all examples so far."""
    try:
        made = completion(body | {"decoding": {"method": "blt"}}, "a", engine(which, 0).max_model_len)
        there = run(engine(which, 0), made.requests)
    except InvalidRequestError:
        return
    alone = run(Engine(model(which), settings(prefix_cache=False)), made.requests)
    for name, result in there.items():
        assert told(result) == told(alone[name])
        own, other = (
            [value.logprob for delta in one.deltas for value in delta.logprobs or ()] for one in (result, alone[name])
        )
        assert own == pytest.approx(other, abs=1e-5)


def test_a_failed_choice_is_an_error_of_its_call() -> None:
    """The harness above would notice: an answer of which a choice failed is none."""
    made = completion({"prompt": "a", "max_tokens": 3}, "a", 300)
    results = run(engine(0, 0), made.requests)
    last = results["a-0"].deltas[-1]
    last.finish_reason, last.error_code = FinishReason.ERROR, ErrorCode.NOTHING_LEFT
    with pytest.raises(ApiError) as failed:
        asyncio.run(answer(made, results))
    assert failed.value.status == 400 and failed.value.code == "nothing_left"
