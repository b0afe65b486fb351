"""POST /v1/completions: from a body to requests, from deltas to an answer, whole or streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.errors import ApiError, failure
from server.api.schemas import MAX_BODY_BYTES, CompletionRequest, parse_completion
from server.api.streaming import DONE, ChoiceText, EventStream, event, until_disconnect
from server.engine.client import EngineClient
from server.engine.stream import DeltaStream
from server.request import DecodingParams, Delta, FinishReason, Ledger, PatchReport
from server.request import Request as EngineRequest

#: Seconds a client has to send its body.
BODY_SECONDS = 60.0

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}},
        }
    },
)
async def create_completion(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    # Before the body is read: nothing in it matters to an engine that is loading or dead.
    model = client.model_name
    body = parse_completion(await _read_body(request))
    if body.model is not None and body.model != model:
        raise ApiError(404, f"the model {body.model!r} is not served here", code="model_not_found", param="model")
    completion = _Completion(body, model, client.max_model_len)
    stream = await client.submit(*completion.requests, whole=not body.stream)
    if body.stream:
        return EventStream(completion.events(stream), stream.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, completion.answer(stream)))
    finally:
        stream.close()


async def _read_body(request: Request) -> bytes:
    """Raises ApiError for a body of another kind, too large or too slow, ClientDisconnect for one that never ends."""
    kind = request.headers.get("content-type", "json").lower()
    if "json" not in kind:
        raise ApiError(415, "the content type must be application/json", code="unsupported_media_type")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s", code="body_timeout") from None
    return bytes(body)


@dataclass
class _Choice:
    text: ChoiceText
    ids: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    patches: PatchReport | None = None
    cached: int = 0


class _Completion:
    """One call: its requests, and what has come of them."""

    def __init__(self, body: CompletionRequest, model: str, max_model_len: int) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._body = body
        self._head = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}
        self.requests = body.requests(self.id, max_model_len, time.monotonic())
        self._choices = [self._choice(request) for request in self.requests]
        self._index = {request.request_id: index for index, request in enumerate(self.requests)}
        self._ledger = Ledger()
        self._decoding = DecodingParams()

    async def answer(self, stream: DeltaStream) -> dict[str, Any]:
        """The whole response. Raises ApiError when a choice failed."""
        texts: list[list[str]] = [[] for _ in self._choices]
        async for news in stream:
            for delta in news:
                if delta.finish_reason is FinishReason.ERROR:
                    raise failure(delta)
                texts[self._index[delta.request_id]].append(self._feed(delta))
        choices = [self._rendered(index, "".join(text)) for index, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self._usage(), "efficiency": self._efficiency()}

    async def events(self, stream: DeltaStream) -> AsyncGenerator[bytes]:
        """The response as server-sent events; one item holds all events that one step made."""
        usage: dict[str, Any] = {}
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            usage = {"usage": None}
        async for news in stream:
            chunks = []
            for delta in news:
                if delta.finish_reason is FinishReason.ERROR:
                    chunks += [event(failure(delta).body), DONE]
                    yield b"".join(chunks)
                    return
                text = self._feed(delta)
                if text or delta.finish_reason is not None:
                    choice = self._rendered(self._index[delta.request_id], text)
                    chunks.append(event({**self._head, "choices": [choice], **usage}))
            if chunks:
                yield b"".join(chunks)
        if usage:
            last = {"choices": [], "usage": self._usage(), "efficiency": self._efficiency()}
            yield event({**self._head, **last})
        yield DONE

    def _choice(self, request: EngineRequest) -> _Choice:
        echo = request.prompt_ids if self._body.echo else ()
        return _Choice(ChoiceText(logprobs=self._body.logprobs is not None, echo=echo))

    def _feed(self, delta: Delta) -> str:
        """Account for a delta; the text it completes."""
        choice = self._choices[self._index[delta.request_id]]
        choice.ids += len(delta.ids)
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
        choice.patches = delta.patches
        choice.cached = delta.cached
        if delta.ledger is not None:
            self._ledger.add(delta.ledger)
        self._decoding = delta.decoding or self._decoding
        return choice.text.feed(delta.ids, delta.logprobs, final=delta.finish_reason is not None)

    def _rendered(self, index: int, text: str) -> dict[str, Any]:
        choice = self._choices[index]
        rendered = {
            "index": index,
            "text": text,
            "logprobs": choice.text.take_logprobs(),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        return rendered if choice.patches is None else rendered | {"patches": asdict(choice.patches)}

    def _usage(self) -> dict[str, Any]:
        # BOS stands in front of every prompt and is not the user's.
        first = [index for index, request in enumerate(self.requests) if request.choice == 0]
        prompt = sum(len(self.requests[index].prompt_ids) - 1 for index in first)
        completion = sum(choice.ids for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._choices[index].cached for index in first)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self._ledger.kept,
                "rejected_prediction_tokens": self._ledger.drafted - self._ledger.kept,
            },
        }

    def _efficiency(self) -> dict[str, Any]:
        """What the choices cost, as if each had run alone, and the decoding that really ran."""
        ledger = self._ledger
        settings = {name: value for name, value in vars(self._decoding).items() if value is not None}
        return {
            "method": settings.pop("method", None),
            "settings": settings,
            "nfe": {
                "patcher": ledger.patcher,
                "encoder": ledger.encoder,
                "global": ledger.global_,
                "decoder": ledger.decoder,
            },
            "rounds": ledger.rounds,
            "denoising_steps": ledger.steps,
            "drafted": ledger.drafted,
            "accepted": ledger.accepted,
            "wasted": ledger.wasted,
            "patches": ledger.patches,
            "bytes_per_patch": ledger.bytes_per_patch,
            "gb_paper": ledger.gb_paper,
            "gb": ledger.gb,
        }
