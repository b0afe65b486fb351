"""Fields of a completion request, one by one, with a real engine behind a real server."""

from __future__ import annotations

import base64
import json

import pytest

from fastblt.models.vocabulary import decode, encode
from fastblt.server.llm import LLM
from fastblt.server.request import SamplingParams
from tests.server.api.running import RunningServer, joined

GOOD = {"prompt": "Hello", "max_tokens": 24, "seed": 1, "ignore_eos": True}
#: What it costs is the same each time too; `auto` may draft otherwise when it is asked again.
REPEATABLE = GOOD | {"decoding": {"method": "blt-s"}}
METHODS = ["blt", "blt-s", "blt-d", "blt-dv"]


def test_echo(server: RunningServer) -> None:
    plain = server.complete(**REPEATABLE)
    echoed = server.complete(**REPEATABLE, echo=True)
    assert echoed["choices"][0]["text"] == "Hello" + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]
    events = server.events(**REPEATABLE, echo=True)
    assert events[0]["choices"][0]["text"].startswith("Hello")
    assert joined(events)[0] == echoed["choices"][0]["text"]


def test_echo_joins_a_character_that_the_prompt_began(server: RunningServer) -> None:
    # The last byte of "é" is forced.
    body = {"prompt": encode("é".encode()[:1]), "max_tokens": 1, "logit_bias": {str(0xA9 + 4): 100}, "temperature": 0}
    assert server.complete(**body)["choices"][0]["text"] == "\ufffd"
    assert server.complete(**body, echo=True)["choices"][0]["text"] == "é"


def test_an_unfinished_character_is_flushed_at_the_end(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 3, "logit_bias": {str(0xF0 + 4): 100}, "temperature": 0}
    assert server.complete(**body)["choices"][0]["text"] == "\ufffd" * 3
    assert joined(server.events(**body))[0] == "\ufffd" * 3


def test_sampling_fields_reach_the_engine(server: RunningServer, reference: LLM) -> None:
    fields = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "seed": -7,
        "ignore_eos": True,
        "max_tokens": 30,
    }
    params = SamplingParams(**fields, logit_bias={69: 2.0}, stop_token_ids=(80,))  # type: ignore[arg-type]
    [expected] = reference.generate("Hello", params)
    answer = server.complete(prompt="Hello", **fields, logit_bias={"69": 2.0}, stop_token_ids=[80])
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == len(expected.ids)


def test_top_k_minus_one_is_all(server: RunningServer) -> None:
    assert server.complete(**GOOD, top_k=-1)["choices"] == server.complete(**GOOD)["choices"]


def test_stop_token_is_named(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 9, "logit_bias": {"70": 100}, "temperature": 0, "stop_token_ids": [70]}
    answer = server.complete(**body)
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["stop_reason"] == 70
    assert answer["usage"]["completion_tokens"] == 0
    events = server.events(**body)
    assert len(events) == 2 and events[0]["choices"][0]["finish_reason"] == "stop"


def test_raw_bytes_in_and_out(server: RunningServer) -> None:
    data = b"\xff\xe2\x82 raw \x00"
    body = {**GOOD, "prompt": encode(data), "logit_bias": {str(0xE2 + 4): 3}, "max_tokens": 40}
    answer = server.complete(**body, return_token_ids=True, return_base64=True)
    [choice] = answer["choices"]
    assert choice["prompt_token_ids"] == encode(data) and len(choice["token_ids"]) == 40
    out = base64.b64decode(choice["base64"])
    assert out == decode(choice["token_ids"]) and out.decode("utf-8", "replace") == choice["text"]
    assert "\ufffd" in choice["text"]
    encoded = {**body, "prompt": base64.b64encode(data).decode(), "prompt_encoding": "base64"}
    assert server.complete(**encoded)["choices"][0]["text"] == choice["text"]
    both = server.complete(**encoded | {"prompt": [encoded["prompt"]] * 2})["choices"]
    assert [c["text"] for c in both] == [choice["text"]] * 2
    chunks = [event["choices"][0] for event in server.events(**body, return_token_ids=True, return_base64=True)[:-1]]
    assert b"".join(base64.b64decode(chunk["base64"]) for chunk in chunks) == out
    assert [i for chunk in chunks for i in chunk["token_ids"]] == choice["token_ids"]
    assert chunks[0]["prompt_token_ids"] == encode(data) and not any(
        "prompt_token_ids" in chunk for chunk in chunks[1:]
    )
    echoed = server.complete(**body, return_base64=True, echo=True)["choices"][0]
    assert base64.b64decode(echoed["base64"]) == data + out


def test_tokens_named_by_their_ids(server: RunningServer) -> None:
    body = {**GOOD, "logprobs": 1, "return_token_ids": True}
    [choice] = server.complete(**body, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)


def test_usage_in_every_event(server: RunningServer) -> None:
    for include in (True, False):
        options = {"include_usage": include, "continuous_usage_stats": True}
        *chunks, done = server.events(**GOOD, stream_options=options)
        assert done == "[DONE]"
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 24
        assert all(chunk["usage"]["prompt_tokens"] == 5 for chunk in chunks)
        assert [not chunk["choices"] for chunk in chunks] == [False] * (len(chunks) - 1) + [include]


def test_every_form_of_a_prompt_in_a_list(server: RunningServer) -> None:
    texts = ["Hello", "Hullo"]
    by_text = server.complete(**GOOD | {"prompt": texts}, n=2, best_of=2)["choices"]
    by_ids = server.complete(**GOOD | {"prompt": [encode(t.encode()) for t in texts]}, n=2)["choices"]
    assert by_text == by_ids and [choice["index"] for choice in by_text] == [0, 1, 2, 3]
    assert by_text[0]["text"] == server.complete(**GOOD)["choices"][0]["text"]


def test_integers_may_be_written_as_floats(server: RunningServer) -> None:
    body = json.dumps(GOOD | {"prompt": encode(b"Hello")}).replace("24", "2.4e1").replace("76", "76.0")
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).json()
    assert "76.0" in body and answer["choices"] == server.complete(**GOOD)["choices"]


def test_salt_priority_and_user_change_no_byte(server: RunningServer) -> None:
    answer = server.complete(**GOOD, cache_salt="s", priority=0, user="somebody")
    assert answer["choices"] == server.complete(**GOOD)["choices"]


def test_ignored_fields_are_told(server: RunningServer) -> None:
    body = {**GOOD, "max_token": 3, "skip_special_tokens": True, "a\r\nb,é": 1, " ": 2, "": 3, "x": None}
    for stream in (False, True):
        response = server.http.post("/v1/completions", json={**body, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "max_token, skip_special_tokens, a??b?\\xe9, ?, ?"
    assert "x-ignored-fields" not in server.http.post("/v1/completions", json=GOOD).headers
    many = {**GOOD, **{f"{i}{'x' * 100}": i for i in range(1000)}}
    assert len(server.http.post("/v1/completions", json=many).headers["x-ignored-fields"]) < 2000


@pytest.mark.parametrize("method", [*METHODS, "blt-dsv", "auto"])
def test_rounds_are_streamed_with_the_bytes_that_they_made(server: RunningServer, method: str) -> None:
    body = GOOD | {"return_rounds": True, "return_token_ids": True, "stop": ["\x00"], "decoding": {"method": method}}
    choice = server.complete(**body)["choices"][0]
    made = [i for one in choice["rounds"] for i in one["token_ids"]]
    assert made == choice["token_ids"]
    events = [event["choices"][0] for event in server.events(**body)[:-1] if event["choices"]]
    streamed = [one for event in events for one in event["rounds"]]
    assert [i for one in streamed for i in one["token_ids"]] == made
    if method != "auto":
        timeless = [{key: value for key, value in one.items() if key != "seconds"} for one in streamed]
        assert timeless == [{key: value for key, value in one.items() if key != "seconds"} for one in choice["rounds"]]
    plain = server.complete(**GOOD | {"decoding": {"method": method}})["choices"][0]
    assert plain["text"] == choice["text"] and "rounds" not in plain
