"""Requests, their parameters and their results: the words that every layer of the server shares.

Import them from here; the files of this folder are for reading.
"""

from fastblt.server.request.checks import InvalidRequestError, QueueFullError
from fastblt.server.request.decoding import (
    MAX_BLOCK_SIZE,
    MAX_DRAFT_LENGTH,
    DecodingMethod,
    DecodingParams,
    EntropyRule,
    Unmasking,
)
from fastblt.server.request.prompt import Request, read_prompt
from fastblt.server.request.results import (
    ByteLogprobs,
    Delta,
    ErrorCode,
    FinishReason,
    Ledger,
    Origin,
    PatchReport,
    Round,
    Timings,
)
from fastblt.server.request.sampling import (
    GREEDY_BELOW,
    MAX_GRAMMAR_BYTES,
    MAX_LOGPROBS,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    GrammarKind,
    SamplingParams,
    StructuredOutput,
    Utf8,
)

__all__ = [
    "GREEDY_BELOW",
    "MAX_BLOCK_SIZE",
    "MAX_DRAFT_LENGTH",
    "MAX_GRAMMAR_BYTES",
    "MAX_LOGPROBS",
    "MAX_STOP_BYTES",
    "MAX_STOP_STRINGS",
    "MIN_REPETITION_PENALTY",
    "ByteLogprobs",
    "DecodingMethod",
    "DecodingParams",
    "Delta",
    "EntropyRule",
    "ErrorCode",
    "FinishReason",
    "GrammarKind",
    "InvalidRequestError",
    "Ledger",
    "Origin",
    "PatchReport",
    "QueueFullError",
    "Request",
    "Round",
    "SamplingParams",
    "StructuredOutput",
    "Timings",
    "Unmasking",
    "Utf8",
    "read_prompt",
]
