"""Turns every error into OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastblt.server.api import elsewhere
from fastblt.server.process.client import EngineState, EngineUnavailableError
from fastblt.server.request import Delta, ErrorCode, InvalidRequestError, QueueFullError

logger = logging.getLogger("fastblt.api")

#: Characters of a message at most: it may quote what a client sent.
MAX_MESSAGE = 500
RETRY_AFTER_SECONDS = 1

#: OpenAI's client retries after any 5xx unless it is told not to.
_NO_RETRY = {"x-should-retry": "false"}
RETRY = {"retry-after": str(RETRY_AFTER_SECONDS)}

_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "maxLength": MAX_MESSAGE},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
#: FastAPI's `responses` of every route, for /openapi.json.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": f"{who} error", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, who in (("4XX", "The client's"), ("5XX", "The server's"))
}


class ApiError(Exception):
    """An answer other than 200. `code` is a short word for programs, and the label under which metrics count it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        taken: bool = False,
    ) -> None:
        super().__init__(message)
        #: Whether the engine had accepted the request, which failed later.
        self.taken = taken
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return error_object(self.status, self.message, self.code, self.param)


def error_object(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error. The message is bounded in size, and characters that UTF-8 cannot encode are escaped."""
    text = message.encode("utf-8", "backslashreplace").decode()
    if len(text) > MAX_MESSAGE:
        text = text[: MAX_MESSAGE - 3] + "..."
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": _TYPES.get(status, fallback), "param": param, "code": code}}


def check_model(asked: str | None, served: Sequence[str]) -> None:
    """Raises ApiError (404) if `asked` is none of the model's names. None stands for the model that is served."""
    if asked is not None and asked not in served:
        names = " or ".join(map(repr, served))
        message = f"the model {asked[:200]!r} is not served here; ask for {names}, or leave `model` out"
        raise ApiError(404, message, code="model_not_found", param="model")


def failure(delta: Delta) -> ApiError:
    """The error that a client gets for a request that ended in FinishReason.ERROR."""
    code = delta.error_code or ErrorCode.PASS_FAILED
    message = delta.error or "the request failed"
    match code:
        case ErrorCode.QUEUE_TIMEOUT:
            status, headers = 503, RETRY
        case ErrorCode.REQUEST_TIMEOUT:
            status, headers = 504, _NO_RETRY
        case ErrorCode.GRAMMAR_TOO_COMPLEX | ErrorCode.NOTHING_LEFT:
            status, headers = 400, {}
        case ErrorCode.NOT_FINITE | ErrorCode.OUT_OF_MEMORY:
            # The same request would fail again.
            status, headers = 500, _NO_RETRY
        case ErrorCode.ENGINE_DIED:
            # No hint to retry: /ready says when another engine is there.
            status, headers = 503, {}
        case _:
            status, headers = 500, {}
    # A request's own doing is no fault of the server. What a lost engine or the load ends is logged where that is seen.
    level = {400: logging.INFO, 500: logging.ERROR}.get(status, logging.WARNING)
    logger.log(level, "%s ended with an error: %s", delta.request_id, message)
    return ApiError(status, message, code=code, headers=headers, taken=True)


def to_api_error(error: Exception) -> ApiError:
    """The error that a client gets for any exception. An unexpected exception reveals no details."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return ApiError(400, str(error), code="invalid_value", param=error.param)
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", headers=RETRY)
        case EngineUnavailableError(state=EngineState.DEAD):
            return ApiError(503, f"the engine is dead: {error}", code="dead", headers=_NO_RETRY)
        case EngineUnavailableError():
            return ApiError(503, str(error), code=error.state, headers=RETRY)
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        case _:
            # Starlette raises the exception again, and the HTTP server then closes the connection. A client that does
            # not know this would send its next request on it, and lose that request.
            headers = {"connection": "close"}
            return ApiError(500, "the server failed to handle this request", code="internal_error", headers=headers)


def _with_advice(problem: ApiError, request: Request) -> ApiError:
    """The same error; for a path or method that there is not, with a message that says what to ask instead."""
    if problem.code == "not_found":
        problem.message = elsewhere.not_found(request.url.path)
    elif problem.code == "method_not_allowed":
        allowed = next((value for name, value in problem.headers.items() if name.lower() == "allow"), "")
        problem.message = elsewhere.wrong_method(request.url.path, request.method, allowed)
    return problem


def install(app: FastAPI) -> None:
    """Make `app` answer every exception with an error object, and count it in the metrics."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # The client has left. This is for the log only.
        problem = _with_advice(to_api_error(error), request)
        if problem.status >= 500 and not problem.taken:
            # It loads, drains or stalls: known, logged when it began, and told to every request meanwhile.
            level = logging.WARNING if problem.status == 503 else logging.ERROR
            logger.log(level, "%s: %s", problem.code, problem.message)
        request.app.state.metrics.count_rejected(problem, request.method)
        headers = dict(problem.headers)
        if problem.status == 500 and (request_id := request.scope.get("request_id")):
            # Starlette's handler for unexpected exceptions runs outside of the middleware that sets this header.
            headers["x-request-id"] = request_id
        return JSONResponse(problem.body, problem.status, headers)

    for kind in (
        ApiError,
        InvalidRequestError,
        QueueFullError,
        EngineUnavailableError,
        HTTPException,
        ClientDisconnect,
        Exception,
    ):
        app.add_exception_handler(kind, answer)
