"""Routes for operators and their tools: health, readiness, models, version, load, metrics."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fastblt.server.api.errors import ERROR_RESPONSES, check_model, error_object
from fastblt.server.process.client import EngineClient, EngineState

router = APIRouter(responses=ERROR_RESPONSES)

_STARTED = int(time.time())


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether this server is of use: 503 while it loads and once its engine is dead. The engine is not asked."""
    client: EngineClient = request.app.state.client
    return _state(client, client.state in (EngineState.READY, EngineState.DRAINING))


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether to send requests here: unlike health, not while draining."""
    client: EngineClient = request.app.state.client
    return _state(client, client.state is EngineState.READY)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    return JSONResponse({"object": "list", "data": [_card(client, name) for name in client.model_names]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    client: EngineClient = request.app.state.client
    check_model(model, client.model_names)
    return JSONResponse(_card(client, model))


@router.get("/version")
async def server_version() -> Response:
    try:
        return JSONResponse({"version": version("fastblt")})
    except PackageNotFoundError:
        return JSONResponse({"version": "unknown"})  # Run from a tree that was never installed.


@router.get("/load")
async def load(request: Request) -> Response:
    """vLLM's measure: the requests that the engine has, queued ones included."""
    return JSONResponse({"server_load": request.app.state.client.load})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _state(client: EngineClient, good: bool) -> Response:
    if good:
        return JSONResponse({"status": client.state})
    # Returned and not raised: the metrics must not count a probe as a rejected request.
    return JSONResponse(error_object(503, client.reason, client.state), 503)


def _card(client: EngineClient, name: str) -> dict[str, Any]:
    """OpenAI's model object under one of the model's names, with the settings of the checkpoint that decide its patches
    and block sizes."""
    config = client.config
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "fastblt",
        "root": client.model_name,
        "parent": None,
        "max_model_len": client.max_model_len,
        "patching_threshold": config.patching_threshold,
        "max_patch_length": config.max_patch_length,
        "block_sizes": list(config.block_sizes),
    }
