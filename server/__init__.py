"""FastBLT's server. `LLM` and the parameters are imported when they are asked for: torch takes seconds."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.llm import LLM, Completion
    from server.request import DecodingParams, SamplingParams, StructuredOutput, Utf8

__all__ = ["LLM", "Completion", "DecodingParams", "SamplingParams", "StructuredOutput", "Utf8"]

_HOMES = {
    "LLM": "server.llm",
    "Completion": "server.llm",
    "DecodingParams": "server.request",
    "SamplingParams": "server.request",
    "StructuredOutput": "server.request",
    "Utf8": "server.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
