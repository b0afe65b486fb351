"""Requests, their parameters and their outputs: the words that every floor of the server shares."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, VOCAB_SIZE, encode, with_bos

#: Bounds of what one request may ask for.
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_DRAFT_LENGTH = 32
MAX_BLOCK_SIZE = 32
MAX_GRAMMAR_BYTES = 64 * 2**10


class InvalidRequestError(ValueError):
    """A request that can never be served as it stands. `param` names the field; the message says what to do."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(RuntimeError):
    """The waiting queue is at its bound; try again later."""


def _within(value: float | None, low: float, high: float, name: str, *, open_low: bool = False) -> None:
    """Raise InvalidRequestError unless value is None or a finite number in [low, high] (or (low, high])."""
    if value is None:
        return
    # An int may be too large for isfinite, never for the comparison below.
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise InvalidRequestError(f"{name} must be a finite number", name)
    if value > high or value < low or (open_low and value == low):
        raise InvalidRequestError(
            f"{name} must be {'above' if open_low else 'at least'} {low} and at most {high}", name
        )


def _member(value: str | None, kind: type[StrEnum], name: str) -> StrEnum | None:
    """A member of `kind` from its name, or None. Raises InvalidRequestError with the names there are."""
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        raise InvalidRequestError(f"{name} must be one of {', '.join(kind)}, not {value!r}", name) from None


class DecodingMethod(StrEnum):
    BLT = "blt"
    BLT_D = "blt-d"
    BLT_S = "blt-s"
    BLT_DV = "blt-dv"
    AUTO = "auto"


class Unmasking(StrEnum):
    CONFIDENCE = "confidence"
    ENTROPY = "entropy"
    ONE_STEP = "one_step"


class EntropyRule(StrEnum):
    INCLUSIVE = "inclusive"
    EXCLUSIVE_MAX = "exclusive_max"


class Utf8(StrEnum):
    """What bytes a completion may hold: any (where they are no UTF-8, text shows U+FFFD), or whole characters only."""

    REPLACE = "replace"
    STRICT = "strict"


class GrammarKind(StrEnum):
    """What the text of a structured output is; `grammar` is Lark's notation or GBNF."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


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
    OUT_OF_MEMORY = "out_of_memory"
    GRAMMAR_TOO_COMPLEX = "grammar_too_complex"
    QUEUE_TIMEOUT = "queue_timeout"
    REQUEST_TIMEOUT = "request_timeout"
    ENGINE_DIED = "engine_died"


@dataclass(frozen=True)
class DecodingParams:
    """How to decode (design §8). None leaves a field to the server's default, and that to the method's.

    `confidence_threshold` is a probability, `entropy_bound` is in nats, `block_size` and `draft_length` in bytes.
    """

    method: DecodingMethod | None = None
    block_size: int | None = None
    draft_length: int | None = None
    unmasking: Unmasking | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    entropy_rule: EntropyRule | None = None
    max_steps: int | None = None
    align_blocks: bool | None = None
    paper_accounting: bool | None = None

    def __post_init__(self) -> None:
        for name, kind in (("method", DecodingMethod), ("unmasking", Unmasking), ("entropy_rule", EntropyRule)):
            object.__setattr__(self, name, _member(getattr(self, name), kind, f"decoding.{name}"))
        _within(self.block_size, 1, MAX_BLOCK_SIZE, "decoding.block_size")
        _within(self.draft_length, 1, MAX_DRAFT_LENGTH, "decoding.draft_length")
        _within(self.confidence_threshold, 0.0, 1.0, "decoding.confidence_threshold")
        _within(self.entropy_bound, 0.0, 1e6, "decoding.entropy_bound")
        _within(self.max_steps, 1, MAX_BLOCK_SIZE, "decoding.max_steps")


@dataclass(frozen=True)
class StructuredOutput:
    """A grammar that a completion must satisfy, as text: a JSON schema, a regular expression, a JSON list of strings to
    choose from, or a grammar. The engine compiles it and says what is wrong with it.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(self.kind, GrammarKind, "structured_outputs"))
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError:
            raise InvalidRequestError(
                f"the {self.kind} has half of a surrogate pair, which no text can hold", "structured_outputs"
            ) from None
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                f"the {self.kind} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", "structured_outputs"
            )

    @classmethod
    def json(cls, schema: dict[str, Any] | bool) -> StructuredOutput:
        """JSON that satisfies `schema`; {"type": "object"} is any object."""
        return cls(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> StructuredOutput:
        """Text that matches the whole of `pattern` (Rust's syntax: no look-around, no back-references)."""
        return cls(GrammarKind.REGEX, pattern)

    @classmethod
    def choice(cls, texts: list[str]) -> StructuredOutput:
        """One of `texts`."""
        return cls(GrammarKind.CHOICE, json.dumps(texts, ensure_ascii=False))

    @classmethod
    def grammar(cls, text: str) -> StructuredOutput:
        """Text that a context-free grammar derives."""
        return cls(GrammarKind.GRAMMAR, text)


@dataclass(frozen=True)
class SamplingParams:
    """What to draw and when to stop. Counts are bytes; `temperature` 0 is greedy; `top_k` 0 means all.

    `stop` holds strings or bytes; they are matched as bytes, exactly. `logprobs` asks for that many alternatives beside
    the chosen byte (0: the chosen one only), `prompt_logprobs` for the same of every prompt byte, `return_patches` for
    a PatchReport at the end. Under `utf8` strict the output is whole characters, wherever it ends; stops that could cut
    one are refused.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[bytes, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_patches: bool = False
    utf8: Utf8 = Utf8.REPLACE
    structured_output: StructuredOutput | None = None
    decoding: DecodingParams = DecodingParams()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str | bytes) else tuple(self.stop or ())
        encoded = tuple(s.encode("utf-8", "surrogatepass") if isinstance(s, str) else s for s in stop)
        object.__setattr__(self, "stop", encoded)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _within(self.max_tokens, 1, 2**31, "max_tokens")
        _within(self.min_tokens, 0, self.max_tokens, "min_tokens")
        _within(self.temperature, 0.0, 100.0, "temperature")
        _within(self.top_k, 0, 2**31, "top_k")
        _within(self.top_p, 0.0, 1.0, "top_p", open_low=True)
        _within(self.min_p, 0.0, 1.0, "min_p")
        _within(self.seed, -(2**63), 2**63 - 1, "seed")
        _within(self.presence_penalty, -2.0, 2.0, "presence_penalty")
        _within(self.frequency_penalty, -2.0, 2.0, "frequency_penalty")
        _within(self.repetition_penalty, 0.0, 100.0, "repetition_penalty", open_low=True)
        _within(self.logprobs, 0, MAX_LOGPROBS, "logprobs")
        _within(self.prompt_logprobs, 0, MAX_LOGPROBS, "prompt_logprobs")
        for key, value in self.logit_bias.items():
            _within(key, 0, 259, "logit_bias")
            _within(value, -100.0, 100.0, "logit_bias")
        for token in self.stop_token_ids:
            _within(token, 0, 259, "stop_token_ids")
        if len(encoded) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(encoded)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop"
            )
        if any(not 1 <= len(s) <= MAX_STOP_BYTES for s in encoded):
            raise InvalidRequestError(f"each stop string must have 1 to {MAX_STOP_BYTES} bytes", "stop")
        object.__setattr__(self, "utf8", _member(self.utf8, Utf8, "utf8") or Utf8.REPLACE)
        if self.utf8 == Utf8.STRICT:
            self._check_stops()

    def _check_stops(self) -> None:
        """Raise InvalidRequestError where a stop could cut a character of strict UTF-8."""
        for stop in self.stop:
            try:
                stop.decode()
            except UnicodeDecodeError:
                raise InvalidRequestError("under utf8 strict, stop strings must be valid UTF-8", "stop") from None
        if any(token >= BYTE_OFFSET + 128 for token in self.stop_token_ids):
            raise InvalidRequestError(
                "under utf8 strict, stop_token_ids must be ASCII: another byte is part of a character",
                "stop_token_ids",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def penalizes(self) -> bool:
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or bool(self.logit_bias)
        )


@dataclass(frozen=True)
class Request:
    """One prompt and one completion. `prompt_ids` are what the model reads: BOS in front (see `with_bos`).

    `choice` numbers the completions of one prompt and is mixed into the seed. `arrival` is `time.monotonic()`. Of
    the requests that wait, those of the lowest `priority` run first. Cached prefixes are shared by requests of the same
    `cache_salt` only.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float
    choice: int = 0
    cache_salt: str | None = None
    priority: int = 0


@dataclass(frozen=True)
class ByteLogprobs:
    """Log-softmax of the raw model at one byte: the value of the id that stands there and the `top` (id, value) pairs.

    `rank` counts the ids that are at least as likely, itself included; it is known for a prompt's bytes only.
    """

    logprob: float
    top: list[tuple[int, float]]
    rank: int | None = None


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


def read_prompt(prompt: str | bytes | list[int]) -> list[int]:
    """What the model reads for a prompt: its ids, BOS in front. Raises InvalidRequestError."""
    if isinstance(prompt, str):
        prompt = prompt.encode("utf-8", "surrogatepass")
    if isinstance(prompt, bytes):
        ids = encode(prompt)
    elif isinstance(prompt, list) and all(type(i) is int for i in prompt):
        ids = prompt
    else:
        raise InvalidRequestError("a prompt must be a text or a list of byte ids", "prompt")
    if not ids:
        raise InvalidRequestError("the prompt is empty; [1], BOS alone, asks for an unconditional sample", "prompt")
    if not all(0 <= i < VOCAB_SIZE for i in ids):
        raise InvalidRequestError(f"prompt ids must be at least 0 and below {VOCAB_SIZE}", "prompt")
    if EOS_ID in ids:
        raise InvalidRequestError(f"a prompt must not contain EOS (id {EOS_ID})", "prompt")
    return with_bos(ids)
