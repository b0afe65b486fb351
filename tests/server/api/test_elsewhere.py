"""Clients of other servers: paths, fields and names that are not served are answered with what to do."""

from __future__ import annotations

import pytest

from fastblt.server.process.client import EngineClient
from fastblt.server.settings import HttpSettings
from tests.server.api.running import MODEL, RunningServer, tiny_settings


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/chat/completions", "base model"),
        ("/chat/completions", "base model"),
        ("/v1/responses", "base model"),
        ("/v1/messages", "base model"),
        ("/v1/embeddings", "no embeddings"),
        ("/completions", "base URL ends in /v1"),
        ("/v1/", "base URL"),
        ("/nothing", "/v1/completions"),
    ],
)
def test_paths_that_are_not_served_say_what_to_ask(server: RunningServer, path: str, words: str) -> None:
    answer = server.http.post(path, json={"messages": [{"role": "user", "content": "Hi"}]})
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["code"] == "not_found"
    assert words in error["message"] and "/v1" in error["message"]


def test_a_wrong_method_names_the_right_one(server: RunningServer) -> None:
    answer = server.http.get("/v1/completions")
    assert answer.status_code == 405 and "use POST" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/health", "/v1/models", "/metrics", "/version"])
def test_head_is_answered_where_get_is(server: RunningServer, path: str) -> None:
    answer, got = server.http.head(path), server.http.get(path)
    assert answer.status_code == got.status_code == 200 and answer.content == b"" and got.content
    assert answer.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("name", ["method", "draft_length", "block_size", "unmasking", "max_steps", "messages"])
def test_misplaced_fields_are_refused_with_their_place(server: RunningServer, name: str) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "Hi", name: 1})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == name
    assert "prompt" in error["message"] if name == "messages" else f'decoding: {{"{name}"' in error["message"]


def test_unknown_fields_are_told_in_the_answer_and_at_the_end_of_a_stream(server: RunningServer) -> None:
    body = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True, "no_such_field": 1, "user": "me"}
    answer = server.complete(**body)
    assert answer["warnings"] == ["no_such_field is no field of this server and was ignored"]
    events = server.events(**body, n=2)
    told = [event["warnings"] for event in events[:-1] if "warnings" in event]
    assert told == [answer["warnings"]]
    assert "warnings" not in server.complete(prompt="Hi", max_tokens=5)


def test_max_completion_tokens_is_max_tokens(server: RunningServer) -> None:
    body = {"prompt": "Hi", "ignore_eos": True}
    assert server.complete(**body, max_completion_tokens=7)["usage"]["completion_tokens"] == 7
    assert server.complete(**body, max_completion_tokens=7, max_tokens=7)["usage"]["completion_tokens"] == 7
    answer = server.http.post("/v1/completions", json={**body, "max_completion_tokens": 7, "max_tokens": 8})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "max_completion_tokens"


def test_messages_are_in_our_words(server: RunningServer) -> None:
    for body, words in (
        ({"decoding": {"blocksize": 4}}, "decoding has no field blocksize; its fields are method, block_size"),
        ({"echo": "yes"}, "echo must be true or false"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"utf8": "loose"}, "utf8 must be 'replace' or 'strict'"),
        ({"stop": 5}, "stop must be a string or a list of strings"),
    ):
        answer = server.http.post("/v1/completions", json={"prompt": "Hi", **body})
        assert answer.json()["error"]["message"].startswith(words), answer.text


def test_another_model_is_told_which_there_is(server: RunningServer) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "Hi", "model": "gpt-4"})
    assert answer.status_code == 404 and f"ask for '{MODEL}'" in answer.json()["error"]["message"]


def test_a_server_with_other_defaults(checkpoint: str) -> None:
    """Its names, the length of requests that say nothing of it, and no page."""
    client = EngineClient(tiny_settings(checkpoint), name="first", aliases=("second",))
    http = HttpSettings(shutdown_timeout=0.0, default_max_tokens=300, page=False)
    with RunningServer(client, http) as server:
        assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["first", "second"]
        assert server.http.get("/v1/models/second").json()["id"] == "second"
        answer = server.complete(prompt="Hi", model="second", ignore_eos=True)
        assert answer["model"] == "second" and answer["usage"]["completion_tokens"] == 300
        # As much as there is room for; but what was asked for is asked for.
        room = client.max_model_len - 1 - 4000
        assert server.complete(prompt="x" * 4000, ignore_eos=True)["usage"]["completion_tokens"] == min(300, room)
        assert server.http.post("/v1/completions", json={"prompt": "x" * 4000, "max_tokens": 300}).status_code == 400
        page = server.http.get("/")
        assert page.status_code == 404 and "--no-page" in page.json()["error"]["message"]
        assert server.http.get("/page/main.js").status_code == 404
