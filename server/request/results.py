"""What comes back for a request: deltas of its output, and what it cost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fastblt.server.request.decoding import DecodingParams


class FinishReason(StrEnum):
    """Every accepted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ErrorCode(StrEnum):
    """Why a request ended in FinishReason.ERROR."""

    PASS_FAILED = "pass_failed"
    NOT_FINITE = "not_finite"
    NOTHING_LEFT = "nothing_left"
    OUT_OF_MEMORY = "out_of_memory"
    GRAMMAR_TOO_COMPLEX = "grammar_too_complex"
    QUEUE_TIMEOUT = "queue_timeout"
    REQUEST_TIMEOUT = "request_timeout"
    ENGINE_DIED = "engine_died"


#: Bytes of memory that a ByteLogprobs takes with its id, beside 6 for each of its alternatives (measured:
#: tests/server/process/test_memory.py).
BYTE_LOGPROBS_SIZE = 208


@dataclass(frozen=True, slots=True)
class ByteLogprobs:
    """Log-softmax of the raw model at one byte: of the id that stands there, and of the likeliest ids.

    The latter are packed, for a server keeps many: `ids` are uint16, `values` float32, the largest first. `rank` counts
    the ids that are at least as likely as the one that stands there, itself included; it is known for a prompt's bytes
    only.
    """

    logprob: float
    ids: bytes = b""
    values: bytes = b""
    rank: int | None = None

    @classmethod
    def of(cls, logprob: float, top: Sequence[tuple[int, float]], rank: int | None = None) -> ByteLogprobs:
        """From (id, value) pairs."""
        ids, values = array("H", [token for token, _ in top]), array("f", [value for _, value in top])
        return cls(logprob, ids.tobytes(), values.tobytes(), rank)

    @property
    def top(self) -> list[tuple[int, float]]:
        """The likeliest ids and their values, as pairs."""
        return list(zip(memoryview(self.ids).cast("H"), memoryview(self.values).cast("f"), strict=True))


@dataclass(frozen=True)
class PatchReport:
    """Where the patches of a completion begin, and why; offsets count its bytes.

    `entropies` (nats) are those of the rows before each byte, which decide whether it starts a patch. `steps` has the
    denoising step, counted from 1 in its block, that fixed each byte; 1 for bytes that a causal row gave. The last
    block of BLT-D never runs causally: no starts are known there, and its entropies, but for the first, are None.
    """

    starts: list[int]
    entropies: list[float | None]
    steps: list[int]


@dataclass
class Ledger:
    """Network function evaluations by module, and what drafting did. Of one request, or of the engine (design §6.6).

    `rounds` are drafts with their verification, or blocks; `steps` are denoising steps. `drafted` and `accepted` bytes
    are those of verified drafts; `kept` ones of them are in the output, and `wasted` bytes of any kind were fixed
    beyond its end. The last five are known when a request has ended: `bytes` of output; `patches` that began among the
    `patched_bytes` of them of which that is known (all, but for the last block of BLT-D); gigabytes of weights read,
    by the paper's estimate and by all passes.
    """

    patcher: int = 0
    encoder: int = 0
    global_: int = 0
    decoder: int = 0
    rounds: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    kept: int = 0
    wasted: int = 0
    bytes: int = 0
    patched_bytes: int = 0
    patches: int = 0
    gb_paper: float = 0.0
    gb: float = 0.0

    @property
    def bytes_per_patch(self) -> float | None:
        """Of the output; None where no patch began."""
        return self.patched_bytes / self.patches if self.patches else None

    def add(self, other: Ledger) -> None:
        """Add another ledger's counts to these."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Timings:
    """Monotonic seconds of a request's life; None for what never happened."""

    arrival: float
    scheduled: float | None = None
    first_byte: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class Delta:
    """News of one request: bytes that are verified and past every stop string that could still match.

    `ids` may be empty; `finish_reason` is set exactly once, on the last delta, which also carries the ledger, the
    timings, the decoding that really ran (every setting that its method has), and the patches where asked for.
    `ending`, where logprobs are asked for, is the EOS or stop id that ended the request and is no part of the output.
    `prompt_logprobs` come with the first delta and are those of the prompt's ids but for its first, BOS.
    `cached` counts the prompt's bytes that need not be computed, for an earlier request had done so.
    `stop_reason` is the stop string or id that matched. `error` explains FinishReason.ERROR, and `error_code` is the
    word for it.
    """

    request_id: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[ByteLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    ledger: Ledger | None = None
    timings: Timings | None = None
    decoding: DecodingParams | None = None
    patches: PatchReport | None = None
    cached: int = 0
    prompt_logprobs: list[ByteLogprobs] | None = None
    ending: tuple[int, ByteLogprobs] | None = None
