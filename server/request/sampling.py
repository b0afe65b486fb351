"""What a request draws, what its output must look like, and where it stops."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fastblt.models.vocabulary import BYTE_OFFSET
from fastblt.server.request.checks import InvalidRequestError, member, needed, whole, within
from fastblt.server.request.decoding import DecodingParams, as_decoding

#: Bounds of what one request may ask for.
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_GRAMMAR_BYTES = 64 * 2**10

#: Temperatures below it are greedy. The noise is at most 17, so what it could change there is between candidates whose
#: logits differ by less than 2e-4.
GREEDY_BELOW = 1e-5
#: Smaller ones would take scores out of fp32, and tell bytes apart no better.
MIN_REPETITION_PENALTY = 0.01


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


@dataclass(frozen=True)
class StructuredOutput:
    """A grammar that a completion must satisfy, as text: a JSON schema, a regular expression, a JSON list of strings to
    choose from, or a grammar. The engine compiles it and says what is wrong with it.
    """

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", member(self.kind, GrammarKind, "structured_outputs"))
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


def _id(key: Any) -> Any:
    """A key of `logit_bias` as an id: OpenAI's clients write ids as strings."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 3 else key


#: Fields that are always numbers.
_NUMBERS = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class SamplingParams:
    """What to draw and when to stop. Counts are bytes; `temperature` 0 is greedy, and so is any below GREEDY_BELOW;
    `top_k` 0 means all.

    `stop` holds strings or bytes; they are matched as bytes, exactly. `logprobs` asks for that many alternatives to
    the chosen byte (0: the chosen one only), `prompt_logprobs` for the same of every prompt byte, `return_patches` for
    a PatchReport at the end, `return_rounds` for Rounds, which tell how each byte was made, as it comes. Under `utf8`
    strict the output is whole characters, wherever it ends; stops that could cut one are refused. `decoding` may be a
    method's name alone.
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
    return_rounds: bool = False
    utf8: Utf8 = Utf8.REPLACE
    structured_output: StructuredOutput | None = None
    decoding: DecodingParams = field(default_factory=DecodingParams)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoding", as_decoding(self.decoding))
        if isinstance(self.logit_bias, dict):
            object.__setattr__(self, "logit_bias", {_id(key): value for key, value in self.logit_bias.items()})
        self._check_types()
        stop = (self.stop,) if isinstance(self.stop, str | bytes) else tuple(self.stop or ())
        encoded = tuple(s.encode("utf-8", "surrogatepass") if isinstance(s, str) else s for s in stop)
        object.__setattr__(self, "stop", encoded)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        whole(self.max_tokens, 1, 2**31, "max_tokens")
        whole(self.min_tokens, 0, self.max_tokens, "min_tokens")
        within(self.temperature, 0.0, 100.0, "temperature")
        whole(self.top_k, 0, 2**31, "top_k")
        within(self.top_p, 0.0, 1.0, "top_p", open_low=True)
        within(self.min_p, 0.0, 1.0, "min_p")
        whole(self.seed, -(2**63), 2**63 - 1, "seed")
        if self.seed == -1:
            # As in vLLM: draw one.
            object.__setattr__(self, "seed", None)
        within(self.presence_penalty, -2.0, 2.0, "presence_penalty")
        within(self.frequency_penalty, -2.0, 2.0, "frequency_penalty")
        within(self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0, "repetition_penalty")
        whole(self.logprobs, 0, MAX_LOGPROBS, "logprobs")
        whole(self.prompt_logprobs, 0, MAX_LOGPROBS, "prompt_logprobs")
        for key, value in self.logit_bias.items():
            whole(key, 0, 259, "logit_bias")
            within(value, -100.0, 100.0, "logit_bias")
        for token in self.stop_token_ids:
            whole(token, 0, 259, "stop_token_ids")
        if len(encoded) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(encoded)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop"
            )
        if any(not 1 <= len(s) <= MAX_STOP_BYTES for s in encoded):
            raise InvalidRequestError(f"each stop string must have 1 to {MAX_STOP_BYTES} bytes", "stop")
        object.__setattr__(self, "utf8", member(self.utf8, Utf8, "utf8") or Utf8.REPLACE)
        if self.utf8 == Utf8.STRICT:
            self._check_stops()

    def _check_types(self) -> None:
        """Raise InvalidRequestError for what the checks of the values, or the engine, would stumble over."""
        for name in _NUMBERS:
            needed(getattr(self, name), (int, float), name, "a number")
        needed(self.logit_bias, dict, "logit_bias", "a dict from ids to numbers")
        needed(self.stop or (), (str, bytes, list, tuple), "stop", "a string, bytes, or a list of these")
        if not isinstance(self.stop, str | bytes):
            for stop in self.stop or ():
                needed(stop, (str, bytes), "stop", "a string, bytes, or a list of these")
        needed(self.stop_token_ids or (), (list, tuple), "stop_token_ids", "a list of ids")
        for token in [*self.logit_bias, *self.logit_bias.values()]:
            needed(token, (int, float), "logit_bias", "a dict from ids to numbers")
        for token in self.stop_token_ids or ():
            needed(token, int, "stop_token_ids", "a list of ids")
        needed(self.structured_output, (StructuredOutput, type(None)), "structured_output", "a StructuredOutput")
        needed(self.decoding, DecodingParams, "decoding", "a DecodingParams")

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
        return self.temperature < GREEDY_BELOW

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
