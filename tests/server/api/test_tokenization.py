from __future__ import annotations

import base64
from typing import Any

import pytest

from fastblt.models.vocabulary import encode
from tests.server.api.running import MAX_MODEL_LEN, MODEL, RunningServer
from tests.server.api.test_bad_requests import assert_error


def tokenize(server: RunningServer, **body: Any) -> dict[str, Any]:
    response = server.http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", ["", "Hello", "naïve 👋🏽\u0000\r\n", "a <eos> in a text", "<eos> "])
def test_a_text_is_its_bytes_and_comes_back(server: RunningServer, text: str) -> None:
    ids = encode(text.encode())
    answer = tokenize(server, prompt=text, add_special_tokens=False, model=MODEL)
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["token_strs"] is None
    assert 0 < answer["max_model_len"] <= MAX_MODEL_LEN
    assert tokenize(server, prompt=text)["tokens"] == [1, *ids]
    back = server.http.post("/detokenize", json={"tokens": [1, *ids, 2]}).json()
    assert back["prompt"] == text and base64.b64decode(back["base64"]) == text.encode()


def test_bytes_that_are_no_text(server: RunningServer) -> None:
    back = server.http.post("/detokenize", json={"tokens": encode(b"\xff\xe2\x82a")}).json()
    assert back["prompt"] == "\ufffd\ufffda" and base64.b64decode(back["base64"]) == b"\xff\xe2\x82a"


def test_specials_by_name(server: RunningServer) -> None:
    info = server.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("<bos>", "<eos>", 260)
    for name, token in info["special_tokens"].items():
        assert tokenize(server, prompt=name)["tokens"] == [token]
        assert tokenize(server, prompt=f"{name}!", add_special_tokens=False)["tokens"] == encode(f"{name}!".encode())
    # Never in a completion's prompt: that text comes from anywhere.
    answer = server.complete(prompt="<eos>", max_tokens=1, ignore_eos=True, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == encode(b"<eos>")


def test_names_of_tokens(server: RunningServer) -> None:
    answer = tokenize(server, prompt="aé", return_token_strs=True)
    assert answer["token_strs"] == ["<bos>", "a", "bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [260]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "model"),
    ],
)
def test_what_is_refused(server: RunningServer, path: str, body: dict[str, Any], status: int, param: str) -> None:
    assert_error(server.http.post(path, json=body), status, param)


def test_the_model_s_card_and_the_version(server: RunningServer) -> None:
    [card] = server.http.get("/v1/models").json()["data"]
    assert card == server.http.get(f"/v1/models/{MODEL}").json()
    assert card["id"] == MODEL and card["max_model_len"] == tokenize(server, prompt="a")["max_model_len"]
    assert server.http.get("/version").json().keys() == {"version"}
