"""Completions without a server: `LLM().generate("...")`."""

from __future__ import annotations

import codecs
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastblt.models.vocabulary import decode
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    ByteLogprobs,
    DecodingParams,
    Delta,
    FinishReason,
    InvalidRequestError,
    Ledger,
    PatchReport,
    Request,
    Round,
    SamplingParams,
    read_prompt,
)
from fastblt.server.settings import EngineSettings
from fastblt.server.shared_engine import SharedEngine

Prompt = str | bytes | list[int]


@dataclass
class Completion:
    """The completion of one prompt. `ids` and `data` are exact; `text` has U+FFFD where the bytes are not UTF-8.

    `error` says what happened if `finish_reason` is ERROR. `ledger` counts forward passes (design §6.6), and `decoding`
    has the method and settings that were used.
    """

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[ByteLogprobs] | None = None
    prompt_logprobs: list[ByteLogprobs] | None = None
    error: str | None = None
    ledger: Ledger = field(default_factory=Ledger)
    decoding: DecodingParams | None = None
    patches: PatchReport | None = None
    rounds: list[Round] | None = None

    @property
    def data(self) -> bytes:
        return decode(self.ids)

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(slots=True)
class TextDelta(Delta):
    """A delta, and the characters that it completes: all `text` joined is the completion's."""

    text: str = ""

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return decode(self.ids)


class LLM:
    """An engine in this process. `settings` are the fields of EngineSettings.

    Several generations may be open at once, from one thread or several, and are batched together. A forked child needs
    an LLM of its own. Raises CheckpointError, ConfigError or ValueError if the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        if model is not None:
            settings["model"] = str(model)
        self.engine = Engine.load(EngineSettings(**settings))
        self._shared = SharedEngine(self.engine)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order. A list of ids is one prompt. All prompts are batched together.

        Raises InvalidRequestError for a prompt or parameters that can never be served.
        """
        requests = self._requests(_as_list(prompts), params)
        completions = {request.request_id: Completion() for request in requests}
        for delta in self._shared.run(requests):
            _take(completions[delta.request_id], delta)
        return list(completions.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextDelta]:
        """The deltas of one completion as they arrive, with their text. Raises as `generate` does."""
        return _with_text(self._shared.run(self._requests([prompt], params)))

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if params is None:
            params = SamplingParams()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequestError(f"{len(prompts)} prompts have {len(params)} sets of parameters", "params")
        longest = self.engine.max_model_len
        for prompt in prompts:
            # Checked before the ids are made, which takes minutes for a text of hundreds of megabytes.
            if isinstance(prompt, str | bytes | list) and len(prompt) > longest:
                raise InvalidRequestError(
                    f"the prompt has at least {len(prompt)} bytes, more than the {longest} of max_model_len", "prompt"
                )
        now = time.monotonic()
        return [
            Request(f"offline-{next(self._numbers)}", read_prompt(prompt), one, now)
            for prompt, one in zip(prompts, params, strict=True)
        ]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str | bytes):
        return [prompts]
    if prompts and all(isinstance(i, int) for i in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _with_text(deltas: Iterator[Delta]) -> Iterator[TextDelta]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for delta in deltas:
        text = decoder.decode(decode(delta.ids), delta.finish_reason is not None)
        yield TextDelta(**{one.name: getattr(delta, one.name) for one in fields(delta)}, text=text)


def _take(completion: Completion, delta: Delta) -> None:
    completion.ids += delta.ids
    if delta.logprobs is not None:
        completion.logprobs = completion.logprobs or []
        completion.logprobs += delta.logprobs
    if delta.rounds is not None:
        completion.rounds = (completion.rounds or []) + delta.rounds
    completion.prompt_logprobs = delta.prompt_logprobs or completion.prompt_logprobs
    if delta.finish_reason is not None:
        completion.finish_reason = delta.finish_reason
        completion.stop_reason = delta.stop_reason
        completion.error = delta.error
        completion.ledger = delta.ledger or completion.ledger
        completion.decoding = delta.decoding
        completion.patches = delta.patches
