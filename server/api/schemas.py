"""The body of POST /v1/completions: its fields and their checks, and how it becomes requests for the engine.

Types are checked here and ranges in `fastblt.server.request`. The JSON schemas describe both.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from fastblt.models.vocabulary import BOS_ID
from fastblt.server.api.body import MAX_CHOICES, MAX_PROMPT_IDS
from fastblt.server.api.fields import Bias, Int64, PromptField, Stop, StopIds, bounded_object
from fastblt.server.api.structured import structured_output
from fastblt.server.request import (
    MAX_BLOCK_SIZE,
    MAX_DRAFT_LENGTH,
    MAX_LOGPROBS,
    MIN_REPETITION_PENALTY,
    DecodingMethod,
    DecodingParams,
    EntropyRule,
    InvalidRequestError,
    Request,
    SamplingParams,
    Unmasking,
    Utf8,
    read_prompt,
)

MAX_N = 16
#: Log-probabilities that one call may ask for, alternatives included: those of its prompts, and, if the answer is not
#: streamed, those of all its bytes. All of these are held until they are written at once.
MAX_LOGPROBS_PER_CALL = 2**18
#: Bytes of all choices whose rounds one answer may hold, if it is not streamed.
MAX_ROUND_BYTES = 2**16
MAX_SALT = 256
#: Priorities range from -MAX_PRIORITY to MAX_PRIORITY.
MAX_PRIORITY = 1000


def _range(low: float, high: float) -> dict[str, JsonValue]:
    """A range in a field's JSON schema."""
    return {"minimum": low, "maximum": high}


class DecodingOptions(BaseModel):
    """How to decode; absent or null fields take the server's defaults, and those the method's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    method: Annotated[DecodingMethod, Field(strict=False)] | None = None
    block_size: Int64 | None = Field(default=None, json_schema_extra=_range(1, MAX_BLOCK_SIZE))
    draft_length: Int64 | None = Field(default=None, json_schema_extra=_range(1, MAX_DRAFT_LENGTH))
    unmasking: Annotated[Unmasking, Field(strict=False)] | None = None
    confidence_threshold: float | None = Field(default=None, json_schema_extra=_range(0, 1))
    entropy_bound: float | None = Field(default=None, json_schema_extra=_range(0, 1e6))
    entropy_rule: Annotated[EntropyRule, Field(strict=False)] | None = None
    max_steps: Int64 | None = Field(default=None, json_schema_extra=_range(1, MAX_BLOCK_SIZE))
    align_blocks: bool | None = None
    paper_accounting: bool | None = None


class StreamOptions(BaseModel):
    """`include_usage` adds a last event with the usage, `continuous_usage_stats` the usage so far to every event."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids with BOS in front, and how many of them, from the end, the client sent."""

    ids: list[int]
    sent: int

    @property
    def sent_ids(self) -> list[int]:
        """The client's ids: BOS is among them only if it was sent."""
        return self.ids[len(self.ids) - self.sent :]


class CompletionRequest(BaseModel):
    """OpenAI's legacy completion request and the usual extensions. A token is a byte; other fields are ignored, but for
    those that would restrict what is written."""

    #: Fields of other servers without which the answer would be another one, and fields at a wrong place; and what to
    #: send instead.
    REFUSED: ClassVar[dict[str, str]] = {
        "guided_json": 'send structured_outputs: {"json": ...}',
        "guided_regex": 'send structured_outputs: {"regex": ...}',
        "guided_choice": 'send structured_outputs: {"choice": ...}',
        "guided_grammar": 'send structured_outputs: {"grammar": ...}',
        "json_schema": 'send response_format: {"type": "json_schema", ...}',
        "grammar": 'send structured_outputs: {"grammar": ...}',
        "regex": 'send structured_outputs: {"regex": ...}',
        "allowed_token_ids": "send logit_bias, or structured_outputs with a regex",
        "bad_words": "send logit_bias for bytes; whole words cannot be forbidden",
        "messages": "a base model has no chat template: send `prompt`, the text to go on from",
        "input": "send `prompt`, the text to go on from",
        "extra_body": "it is an argument of OpenAI's client: send its fields themselves",
    } | {name: f'send decoding: {{"{name}": ...}}' for name in DecodingOptions.model_fields}

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: PromptField
    prompt_encoding: str = Field(default="utf-8", json_schema_extra={"enum": ["utf-8", "base64"]})
    suffix: str | None = Field(default=None, json_schema_extra={"maxLength": 0})
    echo: bool = False
    n: Int64 = Field(default=1, json_schema_extra=_range(1, MAX_N))
    best_of: Int64 | None = Field(default=None, json_schema_extra=_range(1, MAX_N))
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(bounded_object)] | None = None
    max_tokens: Int64 = Field(default=16, json_schema_extra=_range(0, 2**31))
    max_completion_tokens: Int64 | None = Field(default=None, json_schema_extra=_range(0, 2**31))
    min_tokens: Int64 = Field(default=0, json_schema_extra=_range(0, 2**31))
    temperature: float = Field(default=1.0, json_schema_extra=_range(0, 100))
    top_k: Int64 = Field(default=0, json_schema_extra=_range(-1, 2**31))
    top_p: float = Field(default=1.0, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    min_p: float = Field(default=0.0, json_schema_extra=_range(0, 1))
    seed: Int64 | None = None
    presence_penalty: float = Field(default=0.0, json_schema_extra=_range(-2, 2))
    frequency_penalty: float = Field(default=0.0, json_schema_extra=_range(-2, 2))
    repetition_penalty: float = Field(default=1.0, json_schema_extra=_range(MIN_REPETITION_PENALTY, 100))
    logit_bias: Bias = {}
    stop: Stop = []
    stop_token_ids: StopIds = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Int64 | None = Field(default=None, json_schema_extra=_range(0, MAX_LOGPROBS))
    prompt_logprobs: Int64 | None = Field(default=None, json_schema_extra=_range(0, MAX_LOGPROBS))
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_base64: bool = False
    return_patches: bool = False
    return_rounds: bool = False
    priority: Int64 = Field(default=0, json_schema_extra=_range(-MAX_PRIORITY, MAX_PRIORITY))
    cache_salt: str | None = Field(default=None, json_schema_extra={"minLength": 1, "maxLength": MAX_SALT})
    user: str | None = None
    utf8: Annotated[Utf8, Field(strict=False)] = Utf8.REPLACE
    response_format: Any = Field(default=None, description="OpenAI's: text, json_object or json_schema")
    structured_outputs: Any = Field(default=None, description="vLLM's: json, json_object, regex, choice or grammar")
    decoding: Annotated[DecodingOptions, BeforeValidator(bounded_object)] = DecodingOptions()

    @property
    def scores_prompt(self) -> int | None:
        """How many alternatives to return for every byte of the prompts; None for no logprobs of prompts."""
        echoed = self.logprobs if self.echo else None
        return max((top for top in (echoed, self.prompt_logprobs) if top is not None), default=None)

    @property
    def shows_prompt(self) -> bool:
        """Whether the answer contains the prompts, their ids or their logprobs."""
        return self.echo or self.return_token_ids or self.prompt_logprobs is not None

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequestError for a value out of range."""
        return SamplingParams(
            # The engine makes at least one byte. With max_tokens 0 it is left out of the answer.
            max_tokens=1 if self.max_tokens == 0 else self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # Some clients send -1 for "all".
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            stop=tuple(s.encode() for s in self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.scores_prompt,
            return_patches=self.return_patches,
            return_rounds=self.return_rounds,
            utf8=self.utf8,
            structured_output=structured_output(self.response_format, self.structured_outputs),
            decoding=DecodingParams(**dict(self.decoding)),
        )

    def take_prompts(self, max_model_len: int, default_max_tokens: int = 16) -> list[Prompt]:
        """The prompts. Checks all limits of the call, and drops `self.prompt` to free its memory.

        A `max_tokens` that was left out becomes the default, or less where a prompt leaves less room, but not less than
        OpenAI's 16. Raises InvalidRequestError.
        """
        if (other := self.max_completion_tokens) is not None:
            if "max_tokens" in self.model_fields_set and other != self.max_tokens:
                message = "max_completion_tokens is another name of max_tokens; send one of them"
                raise InvalidRequestError(message, "max_completion_tokens")
            self.max_tokens = other
        self._check()
        prompts = self._prompts(max_model_len)
        self.prompt = None
        if "max_tokens" not in self.model_fields_set:
            room = max_model_len - max(len(prompt.ids) for prompt in prompts)
            self.max_tokens = max(min(default_max_tokens, room), min(default_max_tokens, 16))
        if len(prompts) * self.n > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with n = {self.n} make more than {MAX_CHOICES} choices", "prompt"
            )
        ids = sum(len(prompt.ids) for prompt in prompts) * self.n
        if ids > MAX_PROMPT_IDS:
            raise InvalidRequestError(
                f"the prompts of all choices have {ids} ids; {MAX_PROMPT_IDS} are allowed in one call", "prompt"
            )
        values = 0 if self.scores_prompt is None else ids * (1 + self.scores_prompt)
        if self.logprobs is not None and not self.stream:
            values += self.max_tokens * len(prompts) * self.n * (1 + self.logprobs)
        if self.return_rounds and not self.stream and self.max_tokens * len(prompts) * self.n > MAX_ROUND_BYTES:
            raise InvalidRequestError(
                f"return_rounds for more than {MAX_ROUND_BYTES} bytes is only streamed: set stream, or ask for fewer "
                "choices or max_tokens",
                "return_rounds",
            )
        if values > MAX_LOGPROBS_PER_CALL:
            raise InvalidRequestError(
                f"logprobs of up to {values} ids were asked for, those of alternatives and prompts included; at most "
                f"{MAX_LOGPROBS_PER_CALL} are allowed in one answer: stream it, or ask for fewer choices, alternatives "
                "or max_tokens",
                "logprobs" if self.prompt_logprobs is None else "prompt_logprobs",
            )
        return prompts

    def requests(self, completion_id: str, prompts: list[Prompt], arrival: float) -> list[Request]:
        """One request for each choice; the choices of one prompt are adjacent. Raises InvalidRequestError.

        `arrival` is a monotonic time in seconds.
        """
        params = self.sampling()
        return [
            Request(
                f"{completion_id}-{number * self.n + choice}",
                prompt.ids,
                params,
                arrival,
                choice,
                cache_salt=self.cache_salt,
                priority=self.priority,
            )
            for number, prompt in enumerate(prompts)
            for choice in range(self.n)
        ]

    def _check(self) -> None:
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequestError(f"n must be at least 1 and at most {MAX_N}", "n")
        if abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequestError(f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", "priority")
        if self.best_of not in (None, 1, self.n):
            raise InvalidRequestError("best_of must be 1 or equal to n: choices are not ranked", "best_of")
        if self.suffix:
            raise InvalidRequestError("suffix is not supported: the model only continues a text", "suffix")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may be set only when stream is true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs cannot be streamed; echo with logprobs can", "prompt_logprobs")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequestError("max_tokens may be 0 only with echo or prompt_logprobs", "max_tokens")
        if self.max_tokens == 0 < self.min_tokens:
            raise InvalidRequestError("min_tokens must be at most max_tokens, 0", "min_tokens")
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= MAX_SALT:
            raise InvalidRequestError(f"cache_salt must have 1 to {MAX_SALT} characters", "cache_salt")
        if self.prompt_encoding not in ("utf-8", "base64"):
            raise InvalidRequestError("prompt_encoding must be utf-8 or base64", "prompt_encoding")

    def _prompts(self, max_model_len: int) -> list[Prompt]:
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > MAX_CHOICES:
                raise InvalidRequestError(f"{len(prompt)} prompts; at most {MAX_CHOICES} are allowed", "prompt")
            return [self._read(one, max_model_len) for one in prompt]
        return [self._read(prompt, max_model_len)]

    def _read(self, prompt: Any, max_model_len: int) -> Prompt:
        encoded = isinstance(prompt, str) and self.prompt_encoding == "base64"
        # A cheap check before a long text is turned into ids. The engine checks the exact length.
        if isinstance(prompt, str | list) and len(prompt) > max_model_len * (4 / 3 if encoded else 1) + 4:
            raise InvalidRequestError(f"a prompt of {len(prompt)} exceeds max_model_len {max_model_len}", "prompt")
        if encoded:
            try:
                prompt = base64.b64decode(prompt, validate=True)
            except (binascii.Error, ValueError):
                raise InvalidRequestError("the prompt is not valid base64", "prompt") from None
        ids = read_prompt(prompt)
        sent_bos = isinstance(prompt, list) and prompt[0] == BOS_ID
        return Prompt(ids, len(ids) - (not sent_bos))
