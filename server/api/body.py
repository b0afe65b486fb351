"""From what a client sends to a checked object: bounded, in UTF-8, JSON, of the right types."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from fastblt.server.api.errors import ApiError

MAX_BODY_BYTES = 8 * 2**20
#: Seconds a client has to send its body.
BODY_SECONDS = 60.0

#: The fields without a meaning here that a response tells of, and characters of their names.
_MAX_IGNORED = 16
_MAX_NAME = 64
#: Names of such fields that the log tells of, over the server's life.
_MAX_LOGGED = 256

logger = logging.getLogger("fastblt.api")

Schema = TypeVar("Schema", bound=BaseModel)

_logged: set[str] = set()


async def read_body(request: Request) -> bytes:
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


def parse_body(body: bytes, schema: type[Schema], required: str) -> tuple[Schema, list[str]]:
    """The object, and the names of fields that mean nothing here.

    Raises ApiError (400) unless `body` is JSON, in UTF-8, with fields of the right types, `required` among them.
    """
    data = _parse_json(body)
    if not isinstance(data, dict):
        refuse("the body must be a JSON object")
    if data.get(required) is None:
        refuse(f"{required} is required", required)
    return _validate(schema, without_nulls(data)), _ignored(data, schema)


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """Clients send null for what they leave at its default."""
    return {key: value for key, value in data.items() if value is not None}


def refuse(message: str, param: str | None = None) -> NoReturn:
    raise ApiError(400, message, code="invalid_body", param=param)


def _parse_json(body: bytes) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"the body is not valid UTF-8 at byte {error.start}")
    try:
        data = json.loads(text, parse_constant=refuse_constant, parse_float=_number)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair has no UTF-8, and would fail wherever it is written out.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        refuse("the body is nested too deeply")
    except UnicodeEncodeError:
        refuse("the body has a string with half of a surrogate pair")
    except ValueError as error:
        refuse(f"the body is not valid JSON: {error}")
    return data


def _number(text: str) -> int | float:
    """JSON has one kind of number: 5.0 is the integer 5."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _validate(schema: type[Schema], data: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Names of unions' members and validators are no part of what the client sent.
        path = [str(part) for part in first["loc"]]
        param = ".".join(path[:2] if path[:1] in (["decoding"], ["stream_options"]) else path[:1])
        refuse(f"{param[:64]}: {first['msg']}", param[:64] or None)


def _ignored(data: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    """Fields of `data` that the schema has not, of bounded number and length, in ASCII; each is logged once."""
    unknown = [key for key, value in data.items() if key not in schema.model_fields and value is not None]
    names = [key[:_MAX_NAME].encode("ascii", "backslashreplace").decode() for key in unknown[:_MAX_IGNORED]]
    # Fit for a header's value and for a line of the log.
    names = ["".join(c if "!" <= c <= "~" and c != "," else "?" for c in name) or "?" for name in names]
    if fresh := set(names) - _logged:
        if len(_logged) < _MAX_LOGGED:
            logger.warning("requests have fields that mean nothing here: %s", ", ".join(sorted(fresh)))
        _logged.update(list(fresh)[: _MAX_LOGGED - len(_logged)])
    return names
