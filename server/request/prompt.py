"""One prompt with its parameters: what the engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from fastblt.models.vocabulary import EOS_ID, VOCAB_SIZE, encode, with_bos
from fastblt.server.request.checks import InvalidRequestError
from fastblt.server.request.results import BYTE_LOGPROBS_SIZE, ROUND_SIZE
from fastblt.server.request.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt and one completion."""

    request_id: str
    #: What the model reads: BOS in front (see `read_prompt`).
    prompt_ids: list[int]
    params: SamplingParams
    #: `time.monotonic()`.
    arrival: float
    #: Numbers the completions of one prompt; it is mixed into the seed.
    choice: int = 0
    #: Cached prefixes are shared by requests of the same salt only.
    cache_salt: str | None = None
    #: Of the requests that wait, those of the lowest value run first.
    priority: int = 0

    @property
    def logprob_bytes(self) -> int:
        """Memory that its log-probabilities and rounds take at most where they are kept until somebody reads them."""
        params = self.params
        asked = ((params.logprobs, params.max_tokens), (params.prompt_logprobs, len(self.prompt_ids)))
        rounds = params.max_tokens * ROUND_SIZE if params.return_rounds else 0
        return rounds + sum(count * (BYTE_LOGPROBS_SIZE + 6 * top) for top, count in asked if top is not None)


_ANY_ID = frozenset(range(VOCAB_SIZE))


def read_prompt(prompt: str | bytes | list[int]) -> list[int]:
    """What the model reads for a prompt: its ids, BOS in front. Raises InvalidRequestError."""
    if isinstance(prompt, str):
        prompt = prompt.encode("utf-8", "surrogatepass")
    if isinstance(prompt, bytes):
        ids = encode(prompt)
    elif isinstance(prompt, list) and set(map(type, prompt)) <= {int}:
        ids = prompt
    else:
        raise InvalidRequestError("a prompt must be a text or a list of byte ids", "prompt")
    if not ids:
        raise InvalidRequestError("the prompt is empty; [1], BOS alone, asks for an unconditional sample", "prompt")
    if not set(ids) <= _ANY_ID:
        raise InvalidRequestError(f"prompt ids must be at least 0 and below {VOCAB_SIZE}", "prompt")
    if EOS_ID in ids:
        raise InvalidRequestError(f"a prompt must not contain EOS (id {EOS_ID})", "prompt")
    return with_bos(ids)
