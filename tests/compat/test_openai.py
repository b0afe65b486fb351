"""OpenAI's own client against a real server process: every parameter, both kinds of client, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion

from fastblt.models.vocabulary import encode
from tests.compat.conftest import KEY, MODEL

BASE: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 12, "seed": 1}
#: `auto` may draft otherwise when it is asked again, and then reports other passes.
REPEATABLE = {"ignore_eos": True, "decoding": {"method": "blt-s"}}

# Name, parameters of the client's own, and those for `extra_body`.
PARAMETERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("plain", {}, {}),
    ("list of strings", {"prompt": ["Hello", "Bye"]}, {}),
    ("list of ids", {"prompt": encode(b"Hello")}, {}),
    ("list of lists", {"prompt": [encode(b"Hello"), [1]]}, {}),
    ("base64", {"prompt": "/wA="}, {"prompt_encoding": "base64", "return_base64": True}),
    ("n", {"n": 3, "best_of": 3}, {}),
    ("echo", {"echo": True}, {}),
    ("logprobs", {"logprobs": 2}, {}),
    ("echo and logprobs", {"echo": True, "logprobs": 1}, {}),
    ("nothing but the prompt", {"echo": True, "logprobs": 1, "max_tokens": 0}, {}),
    ("stop", {"stop": ["e", "t", "a"]}, {}),
    ("one stop", {"stop": "e"}, {"include_stop_str_in_output": True}),
    ("sampling", {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "min_p": 0.01, "min_tokens": 2}),
    ("penalties", {"presence_penalty": 0.5, "frequency_penalty": 0.1}, {"repetition_penalty": 1.1}),
    ("bias", {"logit_bias": {"70": 2}}, {"stop_token_ids": [99]}),
    ("user", {"user": "me"}, {"priority": -1, "cache_salt": "pepper"}),
    ("ids", {}, {"return_token_ids": True}),
    ("names", {"logprobs": 0}, {"return_tokens_as_token_ids": True}),
    ("method", {}, {"decoding": {"method": "blt-d", "block_size": 4}, "return_patches": True}),
    ("unknown", {}, {"no_such_field": 1}),
]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture
def another(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def choices(answer: Completion) -> list[tuple[str, str | None]]:
    return [(choice.text, choice.finish_reason) for choice in answer.choices]


def joined(chunks: list[Completion], count: int) -> list[tuple[str, str | None]]:
    texts, reasons = [""] * count, [None] * count
    for chunk in chunks:
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "news of a choice that has ended"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason  # type: ignore[call-overload]
    return list(zip(texts, reasons, strict=True))


@pytest.mark.parametrize(("own", "extra"), [pytest.param(*case[1:], id=case[0]) for case in PARAMETERS])
async def test_every_parameter(
    client: openai.OpenAI, another: openai.AsyncOpenAI, own: dict[str, Any], extra: dict[str, Any]
) -> None:
    asked = {**BASE, **own, "extra_body": REPEATABLE | extra}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    answer = client.completions.create(**asked)
    assert answer.model == MODEL and answer.object == "text_completion" and answer.usage is not None
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    if "logprobs" in own:
        for choice in answer.choices:
            assert choice.logprobs is not None and choice.logprobs.tokens is not None
            assert len(choice.logprobs.tokens) == 5 * ("echo" in own) + asked["max_tokens"]
    async with another:
        assert choices(await another.completions.create(**asked)) == choices(answer)
        chunks = [chunk async for chunk in await another.completions.create(**asked, stream=True, stream_options=usage)]
    assert joined(chunks, len(answer.choices)) == choices(answer)
    chunks = list(client.completions.create(**asked, stream=True, stream_options=usage))
    assert joined(chunks, len(answer.choices)) == choices(answer)
    assert chunks[-1].choices == [] and all(chunk.usage is not None for chunk in chunks)
    assert chunks[-1].usage == answer.usage
    chunks = list(client.completions.create(**asked, stream=True))
    assert joined(chunks, len(answer.choices)) == choices(answer)


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(**BASE, extra_body={"prompt_logprobs": 1})
    values = answer.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    assert values[0] is None and len(values) == 5


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    card = client.models.retrieve(MODEL)
    assert card.id == MODEL and card.model_extra is not None and card.model_extra["max_model_len"] > 1000


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "prompt"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"suffix": "the end"}, openai.BadRequestError, "suffix"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"logprobs": 99}, openai.BadRequestError, "logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"decoding": {"method": "magic"}}}, openai.BadRequestError, "decoding.method"),
        ({"extra_body": {"cache_salt": ""}}, openai.BadRequestError, "cache_salt"),
    ],
)
async def test_errors_are_the_client_s_exceptions(
    client: openai.OpenAI,
    another: openai.AsyncOpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**BASE | fields)
    assert caught.value.param == param and caught.value.request_id is not None
    async with another:
        with pytest.raises(kind) as caught:
            await another.completions.create(**BASE | fields)
    assert caught.value.param == param and isinstance(caught.value.code, str)


def test_a_wrong_key(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="another", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.completions.create(**BASE)
