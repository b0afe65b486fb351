"""Every wrong request gets one clear error object, and harms nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastblt.server.api.body import max_body_bytes
from fastblt.server.api.errors import MAX_MESSAGE, failure
from fastblt.server.api.fields import MAX_CHOICES
from fastblt.server.api.schemas import CompletionRequest
from fastblt.server.request import MAX_STOP_BYTES, MAX_STOP_STRINGS, Delta, ErrorCode, FinishReason
from tests.server.api.running import MAX_MODEL_LEN, RunningServer

# (name, body fields beside a good prompt, field that the error must name)
FIELDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("no prompt", {"prompt": None}, "prompt"),
    ("empty string", {"prompt": ""}, "prompt"),
    ("empty list", {"prompt": []}, "prompt"),
    ("list of empty string", {"prompt": [""]}, "prompt"),
    ("list of empty list", {"prompt": [[]]}, "prompt"),
    ("one empty among good", {"prompt": ["a", ""]}, "prompt"),
    ("prompt is a number", {"prompt": 5}, "prompt"),
    ("prompt is an object", {"prompt": {"a": 1}}, "prompt"),
    ("prompt mixes kinds", {"prompt": [65, "a"]}, "prompt"),
    ("prompt holds booleans", {"prompt": [True, False]}, "prompt"),
    ("prompt holds floats", {"prompt": [65.5]}, "prompt"),
    ("prompt nested too deep", {"prompt": [[["a"]]]}, "prompt"),
    ("id too large", {"prompt": [260]}, "prompt"),
    ("negative id", {"prompt": [-1]}, "prompt"),
    ("huge id", {"prompt": [10**30]}, "prompt"),
    ("eos in prompt", {"prompt": [70, 2, 70]}, "prompt"),
    ("prompt too long", {"prompt": "x" * (MAX_MODEL_LEN + 1)}, "prompt"),
    ("prompt and max_tokens too long", {"max_tokens": MAX_MODEL_LEN}, "prompt"),
    ("too many prompts", {"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt"),
    ("too many choices", {"prompt": ["a"] * 33, "n": 4}, "prompt"),
    ("max_tokens zero", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens negative", {"max_tokens": -5}, "max_tokens"),
    ("max_tokens a string", {"max_tokens": "16"}, "max_tokens"),
    ("max_tokens a boolean", {"max_tokens": True}, "max_tokens"),
    ("max_tokens a float", {"max_tokens": 1.5}, "max_tokens"),
    ("max_tokens huge", {"max_tokens": 10**400}, "max_tokens"),
    ("min_tokens above max_tokens", {"min_tokens": 17}, "min_tokens"),
    ("n zero", {"n": 0}, "n"),
    ("n too large", {"n": 17}, "n"),
    ("n huge", {"n": 10**20}, "n"),
    ("best_of not n", {"n": 2, "best_of": 3}, "best_of"),
    ("temperature negative", {"temperature": -0.1}, "temperature"),
    ("temperature a string", {"temperature": "hot"}, "temperature"),
    ("temperature a list", {"temperature": [1]}, "temperature"),
    ("temperature a huge integer", {"temperature": 10**400}, "temperature"),
    ("top_p zero", {"top_p": 0}, "top_p"),
    ("top_p above one", {"top_p": 1.1}, "top_p"),
    ("top_k below -1", {"top_k": -2}, "top_k"),
    ("min_p above one", {"min_p": 2}, "min_p"),
    ("seed beyond 64 bits", {"seed": 2**63}, "seed"),
    ("presence_penalty", {"presence_penalty": 2.1}, "presence_penalty"),
    ("frequency_penalty", {"frequency_penalty": -2.1}, "frequency_penalty"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty"),
    ("repetition_penalty too small", {"repetition_penalty": 1e-40}, "repetition_penalty"),
    ("logprobs negative", {"logprobs": -1}, "logprobs"),
    ("logprobs too many", {"logprobs": 21}, "logprobs"),
    ("logprobs a boolean", {"logprobs": True}, "logprobs"),
    ("logit_bias a list", {"logit_bias": [1]}, "logit_bias"),
    ("logit_bias key no id", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("logit_bias key out of range", {"logit_bias": {"260": 1}}, "logit_bias"),
    ("logit_bias value a string", {"logit_bias": {"70": "1"}}, "logit_bias"),
    ("logit_bias value out of range", {"logit_bias": {"70": 101}}, "logit_bias"),
    ("logit_bias value huge", {"logit_bias": {"70": 10**400}}, "logit_bias"),
    ("logit_bias too large", {"logit_bias": {str(i): 1 for i in range(1000)}}, "logit_bias"),
    ("stop a number", {"stop": 5}, "stop"),
    ("stop of numbers", {"stop": [5]}, "stop"),
    ("stop empty string", {"stop": ""}, "stop"),
    ("stop too many", {"stop": ["x"] * (MAX_STOP_STRINGS + 1)}, "stop"),
    ("stop too long", {"stop": "x" * (MAX_STOP_BYTES + 1)}, "stop"),
    ("stop_token_ids out of range", {"stop_token_ids": [260]}, "stop_token_ids"),
    ("stop_token_ids of strings", {"stop_token_ids": ["a"]}, "stop_token_ids"),
    ("stop_token_ids too many", {"stop_token_ids": [5] * 1000}, "stop_token_ids"),
    ("suffix", {"suffix": "x"}, "suffix"),
    ("salt empty", {"cache_salt": ""}, "cache_salt"),
    ("salt too long", {"cache_salt": "s" * 1000}, "cache_salt"),
    ("salt a number", {"cache_salt": 5}, "cache_salt"),
    ("priority a float", {"priority": 1.5}, "priority"),
    ("priority too large", {"priority": 2**63}, "priority"),
    ("priority where no client has one", {"priority": -1}, "priority"),
    ("prompt_encoding unknown", {"prompt_encoding": "hex"}, "prompt_encoding"),
    ("prompt is no base64", {"prompt_encoding": "base64", "prompt": "a?b"}, "prompt"),
    ("base64 of nothing", {"prompt_encoding": "base64", "prompt": [""]}, "prompt"),
    ("base64 that is no ASCII", {"prompt_encoding": "base64", "prompt": "é"}, "prompt"),
    ("user a number", {"user": 5}, "user"),
    ("echo a string", {"echo": "yes"}, "echo"),
    ("stream a number", {"stream": 1}, "stream"),
    ("stream_options without stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("stream_options a list", {"stream": True, "stream_options": []}, "stream_options"),
    (
        "include_usage a string",
        {"stream": True, "stream_options": {"include_usage": "y"}},
        "stream_options.include_usage",
    ),
    ("model a number", {"model": 5}, "model"),
    ("unknown method", {"decoding": {"method": "magic"}}, "decoding.method"),
    ("method of another kind", {"decoding": {"method": 5}}, "decoding.method"),
    ("unknown key in decoding", {"decoding": {"blocksize": 4}}, "decoding.blocksize"),
    ("decoding a string", {"decoding": "blt"}, "decoding"),
    ("decoding too large", {"decoding": {str(i): i for i in range(1000)}}, "decoding"),
    ("block_size never trained", {"decoding": {"method": "blt-d", "block_size": 5}}, "decoding.block_size"),
    ("block_size out of range", {"decoding": {"method": "blt-d", "block_size": 1000}}, "decoding.block_size"),
    ("draft_length zero", {"decoding": {"method": "blt-s", "draft_length": 0}}, "decoding.draft_length"),
    ("confidence out of range", {"decoding": {"confidence_threshold": 1.5}}, "decoding.confidence_threshold"),
    ("unmasking unknown", {"decoding": {"unmasking": "guess"}}, "decoding.unmasking"),
    ("paper_accounting a string", {"decoding": {"paper_accounting": "yes"}}, "decoding.paper_accounting"),
    ("draft_length of blt", {"decoding": {"method": "blt", "draft_length": 4}}, "decoding.draft_length"),
    ("block_size of blt-s", {"decoding": {"method": "blt-s", "block_size": 4}}, "decoding.block_size"),
    (
        "confidence with unmasking entropy",
        {"decoding": {"method": "blt-d", "unmasking": "entropy", "confidence_threshold": 0.5}},
        "decoding.confidence_threshold",
    ),
    (
        "paper_accounting of blt-d",
        {"decoding": {"method": "blt-d", "paper_accounting": True}},
        "decoding.paper_accounting",
    ),
    ("align_blocks of blt-dv", {"decoding": {"method": "blt-dv", "align_blocks": True}}, "decoding.align_blocks"),
    ("max_steps with one_step", {"decoding": {"method": "blt-dv", "max_steps": 2}}, "decoding.max_steps"),
    ("return_rounds a string", {"return_rounds": "yes"}, "return_rounds"),
    ("rounds of too much at once", {"return_rounds": True, "max_tokens": 2**17}, "return_rounds"),
    ("return_patches a string", {"return_patches": "yes"}, "return_patches"),
    ("half a surrogate pair", {"prompt": "a\ud800b"}, None),
    ("half a pair in stop", {"stop": "\udfff"}, None),
    ("half a pair in model", {"model": "\ud800"}, None),
    ("half a pair in a key", {"\ud800": 1}, None),
]

MAX_BODY_BYTES = max_body_bytes(MAX_MODEL_LEN)
JSON = {"content-type": "application/json"}

# (name, raw body, status)
RAW: list[tuple[str, bytes, int]] = [
    ("empty body", b"", 400),
    ("no JSON", b"prompt=hello", 400),
    ("cut short", b'{"prompt": "hello', 400),
    ("two documents", b'{"prompt": "a"}{"prompt": "b"}', 400),
    ("a list", b"[]", 400),
    ("a string", b'"prompt"', 400),
    ("null", b"null", 400),
    ("a number", b"1e400", 400),
    ("invalid UTF-8", b'{"prompt": "\xff\xfe"}', 400),
    ("UTF-8 of a surrogate", b'{"prompt": "\xed\xa0\x80"}', 400),
    ("UTF-16", '{"prompt": "hi"}'.encode("utf-16"), 400),
    ("NaN", b'{"prompt": "a", "temperature": NaN}', 400),
    ("Infinity", b'{"prompt": "a", "temperature": Infinity}', 400),
    ("minus Infinity", b'{"prompt": "a", "logit_bias": {"70": -Infinity}}', 400),
    ("a float that overflows", b'{"prompt": "a", "temperature": 1e999}', 400),
    ("a bias that overflows", b'{"prompt": "a", "logit_bias": {"70": 1e999}}', 400),
    ("an integer of 5000 digits", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
    ("deep lists", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    ("deep, never closed", b"[" * 1_000_000, 400),
    ("too large", b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
    ("many wrong ids", json.dumps({"prompt": [[260] * 300_000]}).encode(), 400),
    ("many wrong stops", json.dumps({"prompt": "a", "stop": [1] * 300_000}).encode(), 400),
]


def assert_error(response: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < MAX_MESSAGE * 4 + 200
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    assert isinstance(body["error"]["code"], str) and isinstance(body["error"]["type"], str)
    if param is not None:
        assert body["error"]["param"] == param, body
    return body["error"]


def assert_still_good(server: RunningServer) -> None:
    assert len(server.complete(prompt="Hi", max_tokens=2, ignore_eos=True)["choices"]) == 1


@pytest.mark.parametrize(("body", "param"), [pytest.param(*case[1:], id=case[0]) for case in FIELDS])
def test_wrong_fields(server: RunningServer, body: dict[str, Any], param: str | None) -> None:
    content = json.dumps({"prompt": "Hello", **body})
    response = server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert_error(response, 400, param)
    assert_still_good(server)


@pytest.mark.parametrize(("body", "status"), [pytest.param(*case[1:], id=case[0]) for case in RAW])
def test_wrong_bodies(server: RunningServer, body: bytes, status: int) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert_error(response, status)
    assert_still_good(server)


@pytest.mark.parametrize(
    ("body", "half"),
    [
        (rb'{"prompt": "a\ud800b"}', r"\ud800 at byte 13"),
        (rb'{"prompt": "\uDFFF"}', r"\uDFFF at byte 12"),
        (rb'{"prompt": ["a", "\ud83d\ud83d\ude00"]}', r"\ud83d at byte 18"),
        (rb'{"prompt": "a", "stop": ["\\\ud800"]}', r"\ud800 at byte 28"),
        (rb'{"prompt": "a", "structured_outputs": {"choice": ["\ude00\ud83d"]}}', r"\ude00 at byte 51"),
        (rb'{"\ud800": 1, "prompt": "a"}', r"\ud800 at byte 2"),
        (b'{"prompt": "a", "x": "' + b" " * 2**20 + rb'\ud800"}', r"\ud800 at byte 1048598"),
        (b'{"prompt": "' + b" " * (2**20 - 15) + rb'\ud83d\ude00\ud800"}', r"\ud800 at byte 1048585"),
        *((b'{"prompt": "' + b" " * (2**20 - 12 - i) + rb"\ud83d\ude00}", None) for i in range(12)),
        # What stands there is no escape, and the body is wrong for another reason.
        (rb'{"prompt": "\\ud800}', None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_half_a_surrogate_pair_is_named(server: RunningServer, body: bytes, half: str | None) -> None:
    message = assert_error(server.http.post("/v1/completions", content=body, headers=JSON), 400)["message"]
    assert ("half of a surrogate pair" in message) == (half is not None), message
    if half is not None:
        assert f"the body has {half}: " in message and "send both halves" in message


def test_a_chunked_body_is_bounded_too(server: RunningServer) -> None:
    chunks = (b"x" * 2**20 for _ in range(MAX_BODY_BYTES // 2**20 + 2))
    assert_error(server.http.post("/v1/completions", content=chunks, headers=JSON), 413)
    assert_still_good(server)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        # A page may send these without asking: a blob without a type has no header at all.
        (None, 415),
        ("text/plain; x=json", 415),
        ("text/plain;application/json", 415),
        ("application/jsonp", 415),
        ("application/x-json", 415),
        ("multipart/form-data; boundary=application/json", 415),
        ("", 415),
        ("application/json, text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain", 415),
    ],
)
def test_content_types(server: RunningServer, kind: str | None, status: int) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = server.http.post("/v1/completions", content=b'{"prompt": "Hi", "max_tokens": 1}', headers=headers)
    assert response.status_code == status
    if status != 200:
        assert_error(response, status)


def test_unknown_model(server: RunningServer) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "Hi", "model": "gpt-5"})
    assert assert_error(response, 404, "model")["code"] == "model_not_found"
    response = server.http.post("/v1/completions", json={"prompt": "Hi", "model": "m" * 10**5})
    assert_error(response, 404, "model")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/v1/models/other/model", 404),
    ],
)
def test_wrong_paths(server: RunningServer, method: str, path: str, status: int) -> None:
    assert_error(server.http.request(method, path), status)


def test_harmless_extras_and_nulls_are_ignored(server: RunningServer) -> None:
    nulls = dict.fromkeys(("stop", "logit_bias", "seed", "max_tokens", "n", "suffix", "stream_options", "decoding"))
    extras = {"user": "me", "service_tier": "auto", "repetition_penalty": 1.0, "no_such_field": {"a": [1]}}
    answer = server.complete(prompt="Hi", ignore_eos=True, **nulls, **extras)
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("name", sorted(CompletionRequest.REFUSED))
def test_fields_that_would_restrict_the_answer_are_not_ignored(server: RunningServer, name: str) -> None:
    body = {"prompt": "Hi", "max_tokens": 1, name: ["a"]}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    assert "send " in response.json()["error"]["message"]
    assert server.http.post("/v1/completions", json=body | {name: None}).status_code == 200


@pytest.mark.parametrize(
    ("code", "level"),
    [
        (ErrorCode.GRAMMAR_TOO_COMPLEX, "INFO"),
        (ErrorCode.NOTHING_LEFT, "INFO"),
        (ErrorCode.QUEUE_TIMEOUT, "WARNING"),
        (ErrorCode.REQUEST_TIMEOUT, "WARNING"),
        (ErrorCode.ENGINE_DIED, "WARNING"),
        (ErrorCode.PASS_FAILED, "ERROR"),
        (ErrorCode.NOT_FINITE, "ERROR"),
        (ErrorCode.OUT_OF_MEMORY, "ERROR"),
        (None, "ERROR"),
    ],
)
def test_only_faults_of_the_server_are_logged_as_errors(
    code: ErrorCode | None, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "fastblt.api"):
        problem = failure(Delta("one", finish_reason=FinishReason.ERROR, error="why", error_code=code))
    assert [record.levelname for record in caplog.records] == [level]
    assert (problem.status < 500) == (level == "INFO")


def test_what_clients_do_wrong_is_not_logged_as_an_error(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither when a request is read, nor when its grammar turns out to be too much in the middle of its output."""
    endless = {"grammar": 'root ::= "a" root\n'}
    with caplog.at_level("INFO"):
        answer = server.http.post("/v1/completions", json={"prompt": "a", "structured_outputs": endless})
        assert assert_error(answer, 400)["code"] == "grammar_too_complex"
        for body in (b"", b"{", b'{"prompt": "a", "structured_outputs": {"regex": "("}}', b'{"prompt": 1}'):
            assert server.http.post("/v1/completions", content=body, headers=JSON).status_code == 400
        assert server.http.get("/nowhere").status_code == 404
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]
    assert "grammar became too complex" in caplog.text
