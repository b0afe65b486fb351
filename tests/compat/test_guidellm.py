"""guidellm's backend for OpenAI servers against a real server process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.compat.conftest import KEY, MODEL

pytest.importorskip("guidellm", reason="in the extra `compat`")

from guidellm.backends.openai.http import OpenAIHTTPBackend
from guidellm.schemas import GenerationRequest, GenerationResponse, RequestInfo, UsageMetrics
from guidellm.schemas.backends import OpenAIHTTPBackendArgs

#: More than fits into the time between two writes to a stream.
TOKENS = 2000
PROMPTS = ["def f(x):\n", "naïve 👋", "a" * 300]


async def ask(backend: OpenAIHTTPBackend, prompt: str) -> tuple[GenerationResponse, RequestInfo]:
    request = GenerationRequest(columns={"text_column": [prompt]}, output_metrics=UsageMetrics(text_tokens=TOKENS))
    news: list[Any] = [item async for item in backend.resolve(request, RequestInfo())]
    response, info = news[-1]
    assert isinstance(response, GenerationResponse)
    return response, info


@pytest.mark.parametrize("stream", [True, False])
async def test_a_benchmark_s_requests(url: str, stream: bool) -> None:
    backend = OpenAIHTTPBackend(
        OpenAIHTTPBackendArgs(
            target=url,
            request_format="/v1/completions",
            stream=stream,
            api_key=KEY,
            extras={"body": {"temperature": 0}},
        )
    )
    await backend.process_startup()
    try:
        await backend.validate()
        assert await backend.available_models() == [MODEL] == [await backend.default_model()]
        answers = await asyncio.gather(*(ask(backend, prompt) for prompt in PROMPTS))
        for prompt, (response, info) in zip(PROMPTS, answers, strict=True):
            assert response.text
            assert response.input_metrics.text_tokens == len(prompt.encode())
            assert response.output_metrics.text_tokens == TOKENS
            if stream:
                timings = info.timings
                assert timings.first_token_iteration is not None and timings.token_iterations > 1
        alone = await ask(backend, PROMPTS[0])
        assert alone[0].text == answers[0][0].text
    finally:
        await backend.process_shutdown()
