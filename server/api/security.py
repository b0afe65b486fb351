"""Access: API keys, cross-origin rules, and limits on request headers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastblt.server.api.errors import ApiError, error_object

MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024

#: Paths that are answered without a key, for probes. Every other path needs one, whether it exists or not.
_OPEN = frozenset({"/health", "/ready"})


class Browsers(CORSMiddleware):
    """CORS for pages of other origins. A refused preflight request is answered with an error object."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return JSONResponse(error_object(400, bytes(answer.body).decode(), "cors_refused"), 400, headers)


class Gate:
    """Refuses headers that are too large (431) and, if there are keys, requests without one of them (401).

    `open_paths` need no key either: those of the page, which holds nothing but itself.
    It runs before the router and compares whole paths, so no other spelling of a path avoids the check.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        on_refusal: Callable[[ApiError, str], None],
        open_paths: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._open = _OPEN | set(open_paths)
        self._digests = [_digest(key.encode()) for key in keys]
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        self._on_refusal(problem, scope["method"])
        await JSONResponse(problem.body, problem.status, problem.headers)(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return ApiError(
                431,
                f"the request has more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them",
                code="headers_too_large",
            )
        if not self._digests or scope["path"] in self._open or self._knows(dict(headers).get(b"authorization", b"")):
            return None
        return ApiError(
            401,
            "a valid API key is required, in the header `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # All keys are compared, each in constant time: the time must not tell which key matched, or how far.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
