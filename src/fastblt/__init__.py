"""FastBLT: an inference server for Byte Latent Transformers.

`LLM` generates without a server; `SamplingParams` and `DecodingParams` say how. They are imported when they are asked
for, since torch takes seconds. The folders beside this file are those of the repository's top level: in a checkout
links, in a wheel the folders themselves.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastblt.server.llm import LLM, Completion
    from fastblt.server.request import DecodingParams, SamplingParams, StructuredOutput, Utf8

__all__ = ["LLM", "Completion", "DecodingParams", "SamplingParams", "StructuredOutput", "Utf8", "__version__"]

try:
    __version__ = version("fastblt")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "LLM": "fastblt.server.llm",
    "Completion": "fastblt.server.llm",
    "DecodingParams": "fastblt.server.request",
    "SamplingParams": "fastblt.server.request",
    "StructuredOutput": "fastblt.server.request",
    "Utf8": "fastblt.server.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
