"""What comes back for a request: deltas of its output, and what it cost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fastblt.server.request.decoding import DecodingMethod, DecodingParams


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
#: The same of a Round of one byte; larger ones take less for each byte.
ROUND_SIZE = 1000


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


class Origin(StrEnum):
    """How a byte of a completion was made."""

    #: By the whole model, where nothing was drafted, and after a draft of which every byte was accepted.
    CAUSAL = "causal"
    #: Drafted by the decoder, and accepted by the whole model.
    DRAFTED = "drafted"
    #: Drafted by a diffusion block (and, in BLT-DSV, kept by the decoder), and accepted by the whole model.
    BLOCK = "block"
    #: By the whole model, in place of a drafted byte that it refused.
    CORRECTED = "corrected"
    #: Filled by a diffusion block of BLT-D, which nothing verifies.
    FILLED = "filled"


@dataclass(frozen=True, slots=True)
class Round:
    """How one round made some bytes of a completion: a draft with its verification, a block of BLT-D, or one byte.

    `start` counts the completion's bytes before it; `origins` has one for each of `ids`. `draft` is what was drafted,
    refused bytes included, and `accepted` counts its accepted ones. `steps` has the denoising step that filled each
    byte of the draft, or of the block, from 1; 0 for bytes of causal rows.

    `entropies` (nats) and `patches` tell what has become known with this round: the entropies before the completion's
    next bytes, in order (those of a block of BLT-D come a round later), and which of these bytes begin a patch.

    The rest is of the request so far, its prompt included: seconds since it arrived, forward passes by module,
    gigabytes of weights that they read, and those that BLT's passes would have read for the same bytes.
    """

    method: DecodingMethod
    start: int
    ids: list[int]
    origins: list[Origin]
    draft: list[int]
    accepted: int
    steps: list[int]
    entropies: list[float]
    patches: list[int]
    seconds: float
    patcher: int
    encoder: int
    global_: int
    decoder: int
    gb: float
    gb_blt: float


@dataclass
class Ledger:
    """Passes by module (network function evaluations), and what drafting did. Of one request, or of the engine (design
    §6.6).
    """

    #: Passes of the entropy model, the encoder, the global transformer and the decoder.
    patcher: int = 0
    encoder: int = 0
    global_: int = 0
    decoder: int = 0
    #: Drafts with their verification, or blocks; and denoising steps.
    rounds: int = 0
    steps: int = 0
    #: Bytes of verified drafts, how many of them were accepted, and how many of these are in the output.
    drafted: int = 0
    accepted: int = 0
    kept: int = 0
    #: Bytes that BLT-DSV's blocks proposed to the decoder's filter, and how many of them became part of a draft.
    proposed: int = 0
    passed: int = 0
    #: Final bytes of any kind beyond the end of the output.
    wasted: int = 0
    #: Known when a request has ended: bytes of output; those of which it is known whether they begin a patch (all, but
    #: for the last block of BLT-D); and how many do.
    bytes: int = 0
    patched_bytes: int = 0
    patches: int = 0
    #: Known when a request has ended: gigabytes of weights read, by the paper's accounting (arXiv 2605.08044, Eq. 8)
    #: and by that of all passes.
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
    """What one request got from a step: bytes that are final and past every stop string that could still match.

    The last delta has a `finish_reason`, and with it the ledger, the timings, the decoding and the patches.
    """

    request_id: str
    #: The bytes; may be empty. `logprobs`, where asked for, has one for each.
    ids: list[int] = field(default_factory=list)
    logprobs: list[ByteLogprobs] | None = None
    #: Set exactly once, on the last delta.
    finish_reason: FinishReason | None = None
    #: The stop string or id that matched.
    stop_reason: str | int | None = None
    #: What happened, for FinishReason.ERROR, and the word for it.
    error: str | None = None
    error_code: ErrorCode | None = None
    ledger: Ledger | None = None
    timings: Timings | None = None
    #: The decoding that really ran: every setting that its method has.
    decoding: DecodingParams | None = None
    #: Where asked for.
    patches: PatchReport | None = None
    #: Where asked for: of the bytes of all deltas so far, what has not been told yet, whole rounds only.
    rounds: list[Round] | None = None
    #: Bytes of the prompt that were not computed, since an earlier request had done so.
    cached: int = 0
    #: Where asked for, with the first delta: of the prompt's ids but for the first, BOS.
    prompt_logprobs: list[ByteLogprobs] | None = None
    #: Where logprobs are asked for: the EOS or stop id that ended the request and is no part of the output.
    ending: tuple[int, ByteLogprobs] | None = None
