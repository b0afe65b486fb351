"""The body of POST /v1/completions: what may stand in it, checked and turned into requests for the engine.

Types are checked here and ranges in `server.request`. Lists and objects of unbounded size are walked by hand, so that a
large wrong body costs one message and not one for each of its elements.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from models.vocabulary import VOCAB_SIZE
from server.api.errors import ApiError
from server.api.structured import structured_output
from server.request import (
    MAX_STOP_STRINGS,
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

MAX_BODY_BYTES = 8 * 2**20
MAX_N = 16
#: Choices of one call, over all its prompts.
MAX_CHOICES = 128
#: More keys than `decoding` has; a bound for the answer to a wrong one.
MAX_DECODING_KEYS = 32
MAX_BIAS = 100

Schema = TypeVar("Schema", bound=BaseModel)


def _bounded_object(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_DECODING_KEYS:
        raise ValueError(f"an object of {len(value)} keys is too large")
    return _without_nulls(value) if isinstance(value, dict) else value


def _string_or_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings[: MAX_STOP_STRINGS + 1]):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"has {len(strings)} strings; at most {MAX_STOP_STRINGS} are allowed")
    return strings


def _ids(value: Any) -> Any:
    if not isinstance(value, list) or len(value) > VOCAB_SIZE or not all(type(i) is int for i in value):
        raise ValueError(f"must be a list of at most {VOCAB_SIZE} byte ids")
    return value


def _biases(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > VOCAB_SIZE:
        raise ValueError(f"must be an object of at most {VOCAB_SIZE} byte ids and numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 3):
            raise ValueError("its keys must be byte ids, written as strings")
        if type(bias) not in (int, float) or not abs(bias) <= MAX_BIAS:
            raise ValueError(f"its values must be numbers from -{MAX_BIAS} to {MAX_BIAS}")
        biases[int(key)] = float(bias)
    return biases


# Wide enough for every field, narrow enough for floating point.
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class DecodingOptions(BaseModel):
    """How to decode; absent or null fields take the server's defaults, and those the method's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    method: Annotated[DecodingMethod, Field(strict=False)] | None = None
    block_size: Int64 | None = None
    draft_length: Int64 | None = None
    unmasking: Annotated[Unmasking, Field(strict=False)] | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    entropy_rule: Annotated[EntropyRule, Field(strict=False)] | None = None
    max_steps: Int64 | None = None
    align_blocks: bool | None = None
    paper_accounting: bool | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """OpenAI's legacy completion request and the usual extensions. A token is a byte; other fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: Any = Field(description="A string, a list of strings, a list of byte ids, or a list of such lists")
    suffix: str | None = None
    echo: bool = False
    n: Int64 = 1
    best_of: Int64 | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int64 = 16
    min_tokens: Int64 = 0
    temperature: float = 1.0
    top_k: Int64 = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: Int64 | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = {}
    stop: Annotated[list[str], BeforeValidator(_string_or_strings)] = []
    stop_token_ids: Annotated[list[Int64], BeforeValidator(_ids)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Int64 | None = None
    return_patches: bool = False
    utf8: Annotated[Utf8, Field(strict=False)] = Utf8.REPLACE
    response_format: Any = Field(None, description="OpenAI's: text, json_object or json_schema")
    structured_outputs: Any = Field(None, description="vLLM's: json, json_object, regex, choice or grammar")
    decoding: Annotated[DecodingOptions, BeforeValidator(_bounded_object)] = DecodingOptions()

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequestError for a value out of range."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # -1 is the other common word for "all".
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
            return_patches=self.return_patches,
            utf8=self.utf8,
            structured_output=structured_output(self.response_format, self.structured_outputs),
            decoding=DecodingParams(**dict(self.decoding)),
        )

    def requests(self, completion_id: str, max_model_len: int, arrival: float) -> list[Request]:
        """One request a choice, those of one prompt side by side. Raises InvalidRequestError."""
        self._check()
        prompts = _prompts(self.prompt, max_model_len)
        if len(prompts) * self.n > MAX_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with n = {self.n} make more than {MAX_CHOICES} choices", "prompt"
            )
        params = self.sampling()
        return [
            Request(f"{completion_id}-{number * self.n + choice}", ids, params, arrival, choice)
            for number, ids in enumerate(prompts)
            for choice in range(self.n)
        ]

    def _check(self) -> None:
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequestError(f"n must be at least 1 and at most {MAX_N}", "n")
        if self.best_of not in (None, 1, self.n):
            raise InvalidRequestError("best_of must be 1 or equal to n: choices are not ranked", "best_of")
        if self.suffix:
            raise InvalidRequestError("suffix is not supported: the model only continues a text", "suffix")
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError("echo together with logprobs is not available yet", "logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options may be set only when stream is true", "stream_options")


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError (400) unless `body` is JSON, in UTF-8, with fields of the right types."""
    data = _parse_json(body)
    if not isinstance(data, dict):
        _refuse("the body must be a JSON object")
    if data.get("prompt") is None:
        _refuse("prompt is required", "prompt")
    return _validate(CompletionRequest, _without_nulls(data))


def _parse_json(body: bytes) -> Any:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(f"the body is not valid UTF-8 at byte {error.start}")
    try:
        data = json.loads(text, parse_constant=refuse_constant)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair has no UTF-8, and would fail wherever it is written out.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        _refuse("the body is nested too deeply")
    except UnicodeEncodeError:
        _refuse("the body has a string with half of a surrogate pair")
    except ValueError as error:
        _refuse(f"the body is not valid JSON: {error}")
    return data


def _validate(schema: type[Schema], data: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Names of unions' members and validators are no part of what the client sent.
        path = [str(part) for part in first["loc"]]
        param = ".".join(path[:2] if path[:1] in (["decoding"], ["stream_options"]) else path[:1])
        _refuse(f"{param[:64]}: {first['msg']}", param[:64] or None)


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """Clients send null for what they leave at its default."""
    return {key: value for key, value in data.items() if value is not None}


def _prompts(prompt: Any, max_model_len: int) -> list[list[int]]:
    """The ids of every prompt, BOS in front. Raises InvalidRequestError."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > MAX_CHOICES:
            raise InvalidRequestError(f"{len(prompt)} prompts; at most {MAX_CHOICES} are allowed", "prompt")
        return [_prompt_ids(one, max_model_len) for one in prompt]
    return [_prompt_ids(prompt, max_model_len)]


def _prompt_ids(prompt: Any, max_model_len: int) -> list[int]:
    # A cheap first look, before ids are made of a long text; the engine has the exact rule.
    if isinstance(prompt, str | list) and len(prompt) > max_model_len:
        raise InvalidRequestError(
            f"a prompt of {len(prompt)} or more bytes exceeds max_model_len {max_model_len}", "prompt"
        )
    return read_prompt(prompt)


def _refuse(message: str, param: str | None = None) -> NoReturn:
    raise ApiError(400, message, code="invalid_body", param=param)
