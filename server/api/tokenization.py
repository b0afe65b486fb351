"""Routes between texts and ids, and a description of the vocabulary: /tokenize, /detokenize, /tokenizer_info.

A text may have MAX_PROMPT_IDS bytes, even if that exceeds `max_model_len`: tools count first and shorten afterwards.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE, decode, encode
from fastblt.server.api.bodies import Bodies, HeldAnswer
from fastblt.server.api.body import MAX_PROMPT_IDS, max_body_bytes, parse_body
from fastblt.server.api.errors import ERROR_RESPONSES, check_model
from fastblt.server.api.fields import Ids, request_body
from fastblt.server.api.names import SPECIAL_NAMES, TOKEN_NAMES
from fastblt.server.api.streaming import to_json
from fastblt.server.process.client import EngineClient
from fastblt.server.request import InvalidRequestError

router = APIRouter(responses=ERROR_RESPONSES)


class TokenizeRequest(BaseModel):
    """vLLM's. A prompt that is the name of a special, such as `<eos>`, and nothing else has that special's id."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(True, description="whether BOS, which every prompt gets, is in front")
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: Ids


Schema = TypeVar("Schema", bound=BaseModel)


@router.post("/tokenize", openapi_extra=request_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    names, max_model_len = client.model_names, client.max_model_len

    def answer(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model, names)
        if body.prompt in SPECIAL_NAMES:
            ids = [SPECIAL_NAMES.index(body.prompt)]
        else:
            text = body.prompt.encode()
            if len(text) > MAX_PROMPT_IDS:
                raise InvalidRequestError(f"a text may have {MAX_PROMPT_IDS} bytes; this has {len(text)}", "prompt")
            ids = encode(text)
            if body.add_special_tokens:
                ids.insert(0, BOS_ID)
        token_strs = [TOKEN_NAMES[i] for i in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": token_strs}

    return await _answer(request, TokenizeRequest, "prompt", answer)


@router.post("/detokenize", openapi_extra=request_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of ids, with U+FFFD where they are no UTF-8, and their bytes as they are; specials have none."""
    client: EngineClient = request.app.state.client
    names = client.model_names

    def answer(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model, names)
        data = decode(body.tokens)
        return {"prompt": data.decode("utf-8", "replace"), "base64": base64.b64encode(data).decode()}

    return await _answer(request, DetokenizeRequest, "tokens", answer)


async def _answer(
    request: Request, schema: type[Schema], field: str, answer: Callable[[Schema], dict[str, Any]]
) -> Response:
    """The JSON response that `answer` makes of the body. `field` names the body's large field.

    Raises as `Bodies.read` and `parse_body` do.
    """
    bodies: Bodies = request.app.state.bodies
    held = await bodies.read(request, max_body_bytes(MAX_PROMPT_IDS, prompts=1))

    def work() -> bytes:
        body, _ = parse_body(held.data, schema, field, MAX_PROMPT_IDS)
        return to_json(answer(body))

    try:
        content = await bodies.work(len(held.data), work)
        held.hold(len(content))
    except BaseException:
        held.release()
        raise
    return HeldAnswer(content, held)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    return JSONResponse(
        {
            "tokenizer_class": "ByteTokenizer",
            "vocab_size": VOCAB_SIZE,
            "byte_offset": BYTE_OFFSET,
            "bos_token": SPECIAL_NAMES[BOS_ID],
            "eos_token": SPECIAL_NAMES[EOS_ID],
            "pad_token": None,
            "special_tokens": dict(zip(SPECIAL_NAMES, range(len(SPECIAL_NAMES)), strict=True)),
            "add_bos_token": True,
            "chat_template": None,
            "model_max_length": client.max_model_len,
        }
    )
