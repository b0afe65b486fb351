"""What to do instead, for paths of other servers, and for paths that are almost right."""

from __future__ import annotations

_BASE_MODEL = (
    "this server has a base model, which continues a text and has no chat template: "
    "POST /v1/completions with a `prompt`"
)
_NO_VERSION = "the API is under /v1: POST /v1/completions; a client's base URL ends in /v1"

_ADVICE = {
    "chat/completions": _BASE_MODEL,
    "messages": _BASE_MODEL,
    "responses": f"the responses API is not served: {_BASE_MODEL}",
    "api/chat": _BASE_MODEL,
    "api/generate": _BASE_MODEL,
    "embeddings": "a BLT gives no embeddings; this server completes texts: POST /v1/completions with a `prompt`",
    "rerank": "a BLT ranks nothing; this server completes texts: POST /v1/completions with a `prompt`",
    "completions": _NO_VERSION,
    "models": "the list of models is at /v1/models; a client's base URL ends in /v1",
    "tokenize": "it is /tokenize, without /v1",
    "detokenize": "it is /detokenize, without /v1",
    "docs": "there is no page of the API here: /openapi.json has its schema",
    "redoc": "there is no page of the API here: /openapi.json has its schema",
    "v1": "this is the base URL; ask /v1/completions or /v1/models",
    "": "the page is turned off here (--no-page); the API is at /v1/completions",
}


def not_found(path: str) -> str:
    """The message of a 404 for a path that this server does not have."""
    asked = path.strip("/").removeprefix("v1/")
    return _ADVICE.get(asked, "there is nothing at this path; the API is at /v1/completions and /v1/models")


def wrong_method(path: str, method: str, allowed: str) -> str:
    """The message of a 405: a path that is asked in another way."""
    return f"{path[:100]} is not asked with {method[:20]}; use {allowed or 'another method'}"
