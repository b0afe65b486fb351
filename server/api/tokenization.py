"""Ids of texts and back, and what a client must know of the vocabulary: /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from fastblt.models.vocabulary import BOS_ID, BYTE_OFFSET, EOS_ID, VOCAB_SIZE, decode, encode
from fastblt.server.api.body import parse_body, read_body
from fastblt.server.api.errors import ERROR_RESPONSES, check_model
from fastblt.server.api.fields import Ids, request_body
from fastblt.server.api.names import SPECIAL_NAMES, token_name
from fastblt.server.process.client import EngineClient

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


@router.post("/tokenize", openapi_extra=request_body(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    body, _ = parse_body(await read_body(request), TokenizeRequest, "prompt")
    check_model(body.model, client.model_name)
    if body.prompt in SPECIAL_NAMES:
        ids = [SPECIAL_NAMES.index(body.prompt)]
    else:
        ids = encode(body.prompt.encode())
        if body.add_special_tokens:
            ids.insert(0, BOS_ID)
    names = [token_name(i) for i in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": client.max_model_len, "tokens": ids, "token_strs": names}
    return JSONResponse(answer)


@router.post("/detokenize", openapi_extra=request_body(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of ids, with U+FFFD where they are no UTF-8, and their bytes as they are; specials have none."""
    client: EngineClient = request.app.state.client
    body, _ = parse_body(await read_body(request), DetokenizeRequest, "tokens")
    check_model(body.model, client.model_name)
    data = decode(body.tokens)
    return JSONResponse({"prompt": data.decode("utf-8", "replace"), "base64": base64.b64encode(data).decode()})


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
