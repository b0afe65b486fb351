"""POST /v1/completions: makes requests of a body, and an answer, whole or streamed, of deltas."""

from __future__ import annotations

import base64
import time
import uuid
from dataclasses import asdict, dataclass, field
from json.encoder import encode_basestring
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fastblt.models.vocabulary import decode
from fastblt.server.api.bodies import Bodies
from fastblt.server.api.body import max_body_bytes, parse_body
from fastblt.server.api.errors import ERROR_RESPONSES, check_model, failure
from fastblt.server.api.fields import request_body
from fastblt.server.api.names import NUMBER_NAMES, TOKEN_NAMES
from fastblt.server.api.schemas import CompletionRequest, Prompt
from fastblt.server.api.streaming import (
    DONE,
    MIN_LOGPROB,
    ChoiceText,
    EventStream,
    event,
    one_line,
    to_json,
    until_disconnect,
)
from fastblt.server.process.client import EngineClient
from fastblt.server.process.stream import DeltaStream
from fastblt.server.request import (
    ByteLogprobs,
    DecodingParams,
    Delta,
    FinishReason,
    InvalidRequestError,
    Ledger,
    PatchReport,
    Round,
)

#: The response header with the names of request fields that were ignored.
IGNORED_HEADER = "x-ignored-fields"

router = APIRouter(responses=ERROR_RESPONSES)


@router.post(
    "/v1/completions",
    openapi_extra=request_body(CompletionRequest),
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}},
)
async def create_completion(request: Request) -> Response:
    client: EngineClient = request.app.state.client
    bodies: Bodies = request.app.state.bodies
    # Before the body is read: these raise EngineUnavailableError while the engine is loading or dead.
    model, max_model_len = client.model_name, client.max_model_len
    names = client.model_names
    held = await bodies.read(request, max_body_bytes(max_model_len))

    def work() -> tuple[_Completion, list[str]]:
        body, ignored = parse_body(held.data, CompletionRequest, "prompt", max_model_len)
        check_model(body.model, names)
        if body.priority != 0 and not request.app.state.priorities:
            message = "priority must be 0: this server was started without --scheduling-policy priority"
            raise InvalidRequestError(message, "priority")
        prompts = body.take_prompts(max_model_len, request.app.state.default_max_tokens)
        return _Completion(body, body.model or model, prompts, ignored), ignored

    try:
        completion, ignored = await bodies.work(len(held.data), work)
    finally:
        held.release()
    body = completion.body
    headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
    try:
        stream = await client.submit(*completion.requests, whole=not body.stream)
    except InvalidRequestError as error:
        if error.param == "structured_outputs" and body.response_format is not None:
            # Name the field in which the client sent the grammar.
            raise InvalidRequestError(str(error), "response_format") from None
        raise
    if body.stream:
        return EventStream(stream, completion, bodies, headers)
    try:
        answer = await until_disconnect(request.receive, completion.answer(stream, bodies))
        return Response(answer, media_type="application/json", headers=headers)
    finally:
        stream.close()


#: About how many bytes of an answer the report of a round takes for each byte of text.
_ROUND_BYTES = 256


def _shown_bytes(top: int | None) -> int:
    """About how many bytes of an answer one byte of text takes, with logprobs and `top` alternatives unless None."""
    return 1 if top is None else 32 * (1 + top)


@dataclass
class _Choice:
    """The result of one request so far. `fresh` has its ids since the last rendering, if ids are to be shown."""

    index: int
    prompt: Prompt
    text: ChoiceText
    ids: int = 0
    begun: bool = False
    fresh: list[int] = field(default_factory=list)
    shown_prompt: bool = False
    prompt_logprobs: list[ByteLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    patches: PatchReport | None = None
    rounds: list[Round] = field(default_factory=list)
    cached: int = 0


class _Completion:
    """One call: its requests and their results."""

    def __init__(self, body: CompletionRequest, model: str, prompts: list[Prompt], ignored: list[str]) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.body = body
        self._head = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": model}
        self.requests = body.requests(self.id, prompts, time.monotonic())
        names = NUMBER_NAMES if body.return_tokens_as_token_ids else TOKEN_NAMES
        self._choices = {
            request.request_id: _Choice(
                index, prompts[index // body.n], ChoiceText(logprobs=body.logprobs, names=names)
            )
            for index, request in enumerate(self.requests)
        }
        # About how many bytes of the answer one output byte takes, and the prompt of one choice.
        self._byte_size = _shown_bytes(body.logprobs) + (_ROUND_BYTES if body.return_rounds else 0)
        self._prompt_size = 0
        if body.shows_prompt:
            self._prompt_size = max(len(prompt.ids) for prompt in prompts) * _shown_bytes(body.scores_prompt)
        self._shows_ids = body.return_token_ids or body.return_base64
        options = body.stream_options
        self._continuous = options is not None and options.continuous_usage_stats
        usage = options is not None and (options.include_usage or options.continuous_usage_stats)
        self._no_usage: dict[str, Any] = {"usage": None} if usage else {}
        # What stands before and after the text in events that have nothing but text. They are frequent, so they are
        # joined from these parts and not encoded each time.
        self._plain: tuple[bytes, bytes] | None = None
        if not self._continuous and not self._shows_ids and body.logprobs is None and not body.return_rounds:
            before = b"data: " + to_json(self._head)[:-1] + b',"choices":[{"index":'
            after = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'
            self._plain = before, after + (b',"usage":null}' if usage else b"}") + b"\n\n"
        #: What the caller should know, in the answer or with the end of its first choice.
        self._warnings = [f"{name} is no field of this server and was ignored" for name in ignored]
        self.failed = False
        self._ledger = Ledger()
        self._decoding = DecodingParams()
        # Without BOS, which the server puts in front of every prompt.
        self._prompt_bytes = sum(len(prompt.ids) - 1 for prompt in prompts)

    async def answer(self, stream: DeltaStream, bodies: Bodies) -> bytes:
        """The whole response. Raises ApiError when a choice failed."""
        everything: list[Delta] = []
        async for deltas in stream:
            for delta in deltas:
                if delta.finish_reason is FinishReason.ERROR:
                    raise failure(delta)
            everything += deltas
        return await bodies.work(self.size(everything), lambda: self._whole(everything))

    def size(self, deltas: list[Delta]) -> int:
        """About how many bytes of answer `deltas` make."""
        size = sum([len(delta.ids) for delta in deltas]) * self._byte_size
        if self._prompt_size:
            size += self._prompt_size * sum(not self._choices[delta.request_id].begun for delta in deltas)
        return size

    def _whole(self, everything: list[Delta]) -> bytes:
        texts: dict[str, list[str]] = {request_id: [] for request_id in self._choices}
        for delta in everything:
            texts[delta.request_id].append(self._feed(self._choices[delta.request_id], delta))
        choices = [self._rendered(self._choices[request_id], "".join(text)) for request_id, text in texts.items()]
        about = {"usage": self._usage(), "efficiency": self._efficiency(), **self._take_warnings()}
        return to_json({**self._head, "choices": choices, **about})

    def render(self, deltas: list[Delta]) -> bytes:
        """The server-sent events for the deltas of one step. If a choice failed, they end the stream."""
        chunks = []
        for delta in deltas:
            if delta.finish_reason is FinishReason.ERROR:
                self.failed = True
                chunks += [event(failure(delta).body), DONE]
                break
            choice = self._choices[delta.request_id]
            text = self._feed(choice, delta)
            if delta.finish_reason is None:
                if self._plain is not None:
                    if text:
                        before, after = self._plain
                        encoded = f'{choice.index},"text":{encode_basestring(text)}'.encode()
                        chunks += [before, one_line(encoded), after]
                    continue
                if not text and not choice.fresh and not choice.rounds:
                    continue
            more = {"usage": self._usage_so_far()} if self._continuous else self._no_usage
            if delta.finish_reason is not None:
                more = more | self._take_warnings()
            chunks.append(event({**self._head, "choices": [self._rendered(choice, text)], **more}))
        return b"".join(chunks)

    def last(self) -> bytes:
        """The events that follow those of all steps: the usage, if asked for, and [DONE]."""
        if self.failed:
            return b""
        if self.body.stream_options is None or not self.body.stream_options.include_usage:
            return DONE
        last = {"choices": [], "usage": self._usage(), "efficiency": self._efficiency()}
        return event({**self._head, **last}) + DONE

    def _take_warnings(self) -> dict[str, Any]:
        """The field for what the caller should know; nothing where there is nothing, or it was told."""
        warnings, self._warnings = self._warnings, []
        return {"warnings": warnings} if warnings else {}

    def _feed(self, choice: _Choice, delta: Delta) -> str:
        """Record a delta. Returns the text that it completes."""
        text = ""
        if not choice.begun:
            choice.begun = True
            text = self._begin(choice, delta)
        final = delta.finish_reason is not None
        choice.rounds += delta.rounds or ()
        if final:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
            choice.patches = delta.patches
            choice.cached = delta.cached
            self._ledger.add(delta.ledger or Ledger())
            self._decoding = delta.decoding or self._decoding
        if self.body.max_tokens == 0:
            # With max_tokens 0 the engine makes one byte all the same: it is not shown, nor how it ended.
            if delta.finish_reason is FinishReason.STOP:
                choice.finish_reason, choice.stop_reason = FinishReason.LENGTH, None
            return text + choice.text.feed([], None, final=final)
        choice.ids += len(delta.ids)
        if self._shows_ids:
            choice.fresh += delta.ids
        return text + choice.text.feed(delta.ids, delta.logprobs, final=final, ending=delta.ending)

    def _begin(self, choice: _Choice, delta: Delta) -> str:
        """Take the prompt's log-probabilities from the first delta. Returns the prompt's text if it is echoed."""
        sent = choice.prompt.sent_ids
        values: list[ByteLogprobs | None] | None = None
        if self.body.scores_prompt is not None:
            # The first id that the client sent has no logprob. The prompt of an aborted request may have no scores.
            scores = delta.prompt_logprobs or []
            values = [None, *scores[len(scores) - len(sent) + 1 :]] if len(scores) + 1 >= len(sent) else None
            values = values or [None] * len(sent)
            choice.prompt_logprobs = values
        if not self.body.echo:
            return ""
        if self._shows_ids:
            choice.fresh += sent
        return choice.text.feed(sent, values, final=False)

    def _rendered(self, choice: _Choice, text: str) -> dict[str, Any]:
        body = self.body
        rendered = {
            "index": choice.index,
            "text": text,
            "logprobs": choice.text.take_logprobs(),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        fresh, choice.fresh = choice.fresh, []
        if body.return_token_ids:
            rendered["token_ids"] = fresh
            if not choice.shown_prompt:
                choice.shown_prompt = True
                rendered["prompt_token_ids"] = choice.prompt.sent_ids
        if body.return_base64:
            rendered["base64"] = base64.b64encode(decode(fresh)).decode()
        if body.prompt_logprobs is not None:
            rendered["prompt_logprobs"] = self._prompt_logprobs(choice, body.prompt_logprobs)
        if choice.patches is not None:
            rendered["patches"] = asdict(choice.patches)
        if body.return_rounds:
            rounds, choice.rounds = choice.rounds, []
            rendered["rounds"] = [_round(one) for one in rounds]
        return rendered

    def _prompt_logprobs(self, choice: _Choice, top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for every id of the prompt, the top ids with their logprobs, ranks and names."""
        rendered: list[dict[str, Any] | None] = []
        values = choice.prompt_logprobs or []
        for token, value in zip(choice.prompt.sent_ids, values, strict=True):
            if value is None:
                rendered.append(None)
                continue
            ranked = [(i, logprob, rank) for rank, (i, logprob) in enumerate(value.top[:top], 1)]
            if token not in [i for i, _, _ in ranked]:
                ranked.append((token, value.logprob, value.rank or 0))
            rendered.append(
                {
                    str(i): {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": TOKEN_NAMES[i]}
                    for i, logprob, rank in ranked
                }
            )
        return rendered

    def _usage_so_far(self) -> dict[str, Any]:
        completion = sum(choice.ids for choice in self._choices.values())
        return {
            "prompt_tokens": self._prompt_bytes,
            "completion_tokens": completion,
            "total_tokens": self._prompt_bytes + completion,
        }

    def _usage(self) -> dict[str, Any]:
        details = {
            "accepted_prediction_tokens": self._ledger.kept,
            "rejected_prediction_tokens": self._ledger.drafted - self._ledger.kept,
        }
        # Each prompt is counted once and not for each of its n choices, as in `prompt_tokens`.
        cached = sum(choice.cached for choice in self._choices.values() if choice.index % self.body.n == 0)
        return self._usage_so_far() | {
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": details,
        }

    def _efficiency(self) -> dict[str, Any]:
        """The cost of the choices as if each had run alone, and the method and settings that were used."""
        ledger = self._ledger
        settings = {name: value for name, value in vars(self._decoding).items() if value is not None}
        return {
            "method": settings.pop("method", None),
            "settings": settings,
            "nfe": {
                "patcher": ledger.patcher,
                "encoder": ledger.encoder,
                "global": ledger.global_,
                "decoder": ledger.decoder,
            },
            "rounds": ledger.rounds,
            "denoising_steps": ledger.steps,
            "drafted": ledger.drafted,
            "accepted": ledger.accepted,
            "proposed": ledger.proposed,
            "passed": ledger.passed,
            "wasted": ledger.wasted,
            "patches": ledger.patches,
            "bytes_per_patch": ledger.bytes_per_patch,
            "gb_paper": ledger.gb_paper,
            "gb": ledger.gb,
        }


def _round(one: Round) -> dict[str, Any]:
    """How a round made some bytes, as clients get it."""
    return {
        "method": one.method,
        "start": one.start,
        "token_ids": one.ids,
        "origins": one.origins,
        "draft_token_ids": one.draft,
        "accepted": one.accepted,
        "steps": one.steps,
        "entropies": one.entropies,
        "patches": one.patches,
        "seconds": one.seconds,
        "nfe": {"patcher": one.patcher, "encoder": one.encoder, "global": one.global_, "decoder": one.decoder},
        "gb": one.gb,
        "gb_blt": one.gb_blt,
    }
