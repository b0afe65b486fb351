"""Log-probabilities of prompts over HTTP, against the model itself."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import EOS_ID, encode
from fastblt.server.api.names import TOKEN_NAMES
from fastblt.server.api.schemas import MAX_LOGPROBS_PER_CALL
from tests.server.api.running import RunningServer
from tests.server.api.test_bad_requests import assert_error

TEXT = "naïve 👋 text"
GOOD = {"prompt": TEXT, "max_tokens": 3, "seed": 1, "ignore_eos": True, "echo": True}


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> torch.Tensor:
    """Log-softmax of the rows before the bytes of TEXT, the first of which is BOS's."""
    model = load_checkpoint(Path(checkpoint))
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([[1, *encode(TEXT.encode())]])).logits[0, :-1].float(), -1)


def test_an_echoed_prompt_has_the_model_s_logprobs(server: RunningServer, expected: torch.Tensor) -> None:
    ids = encode(TEXT.encode())
    answer = server.complete(**GOOD, logprobs=2)
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(ids) + 3}
    assert logprobs["tokens"][: len(ids)] == [TOKEN_NAMES[i] for i in ids]
    assert logprobs["text_offset"][: len(ids)] == [at for at, c in enumerate(TEXT) for _ in c.encode()]
    assert choice["text"].startswith(TEXT) and answer["usage"]["prompt_tokens"] == len(ids)
    # Nothing that the client sent stands before the first id.
    assert logprobs["token_logprobs"][0] is None is logprobs["top_logprobs"][0]
    for at in range(1, len(ids)):
        row, top = expected[at], logprobs["top_logprobs"][at]
        assert logprobs["token_logprobs"][at] == pytest.approx(float(row[ids[at]]), abs=1e-4)
        assert top[TOKEN_NAMES[ids[at]]] == logprobs["token_logprobs"][at]
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4) and 2 <= len(top) <= 3
    # The rest is what it is without the prompt.
    plain = server.complete(**GOOD | {"echo": False}, logprobs=2)["choices"][0]["logprobs"]
    assert plain["tokens"] == logprobs["tokens"][len(ids) :]
    assert plain["token_logprobs"] == logprobs["token_logprobs"][len(ids) :]


def test_with_bos_sent_every_byte_is_scored(server: RunningServer, expected: torch.Tensor) -> None:
    ids = [1, *encode(TEXT.encode())]
    answer = server.complete(**GOOD | {"prompt": ids}, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["<bos>", "n"] and logprobs["token_logprobs"][0] is None
    assert len(logprobs["tokens"]) == len(ids) + 3
    want = [float(row[i]) for row, i in zip(expected, ids[1:], strict=True)]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(want, abs=1e-4)
    alone = server.complete(**GOOD | {"prompt": [1]}, logprobs=1)["choices"][0]["logprobs"]
    assert alone["tokens"][0] == "<bos>" and len(alone["tokens"]) == 4


def test_no_byte_but_the_prompt_s(server: RunningServer) -> None:
    body = {**GOOD, "logprobs": 1}
    whole = server.complete(**body)["choices"][0]["logprobs"]
    answer = server.complete(**body | {"max_tokens": 0})
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert choice["logprobs"] == {name: values[: len(TEXT.encode())] for name, values in whole.items()}
    assert answer["usage"]["completion_tokens"] == 0
    events = server.events(**body | {"max_tokens": 0})
    assert [event["choices"][0]["text"] for event in events[:-1]] == [TEXT]
    scored = server.complete(prompt=TEXT, max_tokens=0, prompt_logprobs=0)["choices"][0]
    assert scored["text"] == "" and len(scored["prompt_logprobs"]) == len(TEXT.encode())
    # Also where the byte that nobody wants would be the end.
    ended = server.complete(**body | {"max_tokens": 0, "ignore_eos": False, "logit_bias": {str(EOS_ID): 100}})
    assert ended["choices"] == answer["choices"]


def test_streamed_logprobs_of_a_prompt(server: RunningServer) -> None:
    body = {**GOOD, "logprobs": 2}
    streamed: dict[str, list[Any]] = defaultdict(list)
    events = server.events(**body)
    assert events[0]["choices"][0]["text"].startswith(TEXT)
    for event in events[:-1]:
        for name, values in event["choices"][0]["logprobs"].items():
            streamed[name] += values
    assert streamed == server.complete(**body)["choices"][0]["logprobs"]


def test_prompt_logprobs_in_the_form_of_vllm(server: RunningServer, expected: torch.Tensor) -> None:
    ids = encode(TEXT.encode())
    body = {**GOOD, "echo": False, "prompt_logprobs": 2}
    [choice] = server.complete(**body)["choices"]
    assert choice["logprobs"] is None
    [first, *others] = choice["prompt_logprobs"]
    assert first is None and len(others) == len(ids) - 1
    for token, row, entry in zip(ids[1:], expected[1:], others, strict=True):
        assert 2 <= len(entry) <= 3
        own = entry[str(token)]
        assert own["decoded_token"] == TOKEN_NAMES[token]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert own["rank"] == 1 + int((row > row[token]).sum())
        assert sorted(e["rank"] for e in entry.values())[:2] == [1, 2]
    # Both kinds at once, each with as many alternatives as it asked for.
    both = server.complete(**body | {"echo": True, "logprobs": 1})["choices"][0]
    assert both["prompt_logprobs"] == choice["prompt_logprobs"]
    assert all(len(top) <= 2 for top in both["logprobs"]["top_logprobs"][1:])


def test_several_scored_prompts_keep_their_places(server: RunningServer) -> None:
    texts = ["one", "three", "a longer one"]
    body = {**GOOD, "prompt": texts, "n": 2, "logprobs": 1}
    choices = server.complete(**body)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for choice in choices:
        text = texts[choice["index"] // 2]
        alone = server.complete(**GOOD | {"prompt": text}, logprobs=1)["choices"][0]["logprobs"]
        got = choice["logprobs"]
        assert got["tokens"][: len(text)] == list(text)
        assert got["token_logprobs"][: len(text)] == alone["token_logprobs"][: len(text)]


def test_what_ended_a_completion_has_its_logprob(server: RunningServer) -> None:
    body = {"prompt": "x", "max_tokens": 9, "temperature": 0, "logprobs": 1}
    answer = server.complete(**body, logit_bias={str(EOS_ID): 100})
    assert answer["usage"]["completion_tokens"] == 0
    [choice] = answer["choices"]
    assert choice["logprobs"]["tokens"] == ["<eos>"] and choice["logprobs"]["text_offset"] == [0]
    [choice] = server.complete(**body, logit_bias={"70": 100}, stop_token_ids=[70])["choices"]
    assert choice["logprobs"]["tokens"] == ["B"] and choice["text"] == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"prompt": ["x" * (MAX_LOGPROBS_PER_CALL // 21 // 8)] * 9, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"prompt": ["x" * (MAX_LOGPROBS_PER_CALL // 21 // 8)] * 9, "echo": True, "logprobs": 20}, "logprobs"),
        ({"max_tokens": 300, "n": 16, "logprobs": 20, "prompt": ["x"] * 4}, "logprobs"),
    ],
)
def test_what_cannot_be_scored(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    response = server.http.post("/v1/completions", json={"prompt": "Hello", **fields})
    assert_error(response, 400, param)
