"""Selection of a byte, one row at a time: the oracle of every faster one (design §2.7, §5). Plain numpy, no torch.

A byte is argmax(log p + noise(seed, position)), or argmax(score) when greedy; see `select` for the order of operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastblt.models.vocabulary import EOS_ID, NEVER_PRODUCED, VOCAB_SIZE

Row = npt.NDArray[np.float32]

#: Temperatures that are as good as 0.
GREEDY_BELOW = 1e-5

_WORD = 2**32 - 1
_LONG = 2**64 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How bytes are drawn. Temperature 0 is greedy, and so is any below GREEDY_BELOW; 0 for top_k, 1 for top_p and 0
    for min_p mean no truncation.

    `choice` is the index of this choice among those of one request; `seed` is any 64-bit integer.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    choice: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Selected:
    """A selected id with the log-probability of the raw model.

    `confidence` (maximum probability) and `entropy` (nats) are those of the row after penalties, bias and forbidden
    ids, before temperature and truncation; `margin` is how far the id was ahead of the next best.
    """

    id: int
    logprob: float
    confidence: float
    entropy: float
    margin: float


def select(
    logits: Row, options: SamplingOptions, prompt: Sequence[int], output: Sequence[int], position: int, produced: int
) -> Selected:
    """Select from raw logits [260] the byte that will stand at absolute `position` (BOS = 0).

    `output` are the ids that penalties count, as they count those of the `prompt`; `produced` is how many come before
    the position, which decides whether EOS is allowed yet. The order: penalties, bias, forbidden ids, temperature,
    top_k, top_p, min_p, noise. Ties go to the lowest id.
    """
    scores = penalized(logits, options, prompt, output)
    for i in forbidden(options, produced):
        scores[i] = -np.inf
    confidence, entropy = _certainty(scores)
    if options.temperature >= GREEDY_BELOW:
        scores = truncated(scores / np.float32(options.temperature), options)
        scores = _log_softmax(scores).astype(np.float32)
        scores = scores + gumbel_row(options.seed, options.choice, position)
    best = int(np.argmax(scores))
    margin = float(scores[best] - np.delete(scores, best).max())
    return Selected(best, float(_log_softmax(logits)[best]), confidence, entropy, margin)


def penalized(logits: Row, options: SamplingOptions, prompt: Sequence[int], output: Sequence[int]) -> Row:
    """Scores after repetition (prompt and output), frequency and presence penalties (output), and bias."""
    scores = logits.astype(np.float32).copy()
    counts = Counter(output)
    for i in set(prompt) | set(output):
        if options.repetition_penalty != 1.0:
            rate = np.float32(options.repetition_penalty)
            scores[i] = scores[i] / rate if scores[i] > 0 else scores[i] * rate
    for i, count in counts.items():
        scores[i] -= np.float32(options.frequency_penalty) * np.float32(count) + np.float32(options.presence_penalty)
    for i, bias in options.logit_bias.items():
        scores[i] += np.float32(bias)
    return scores


def forbidden(options: SamplingOptions, produced: int) -> set[int]:
    """Ids that may not follow `produced` output ids."""
    early = options.ignore_eos or produced < options.min_tokens
    return {*NEVER_PRODUCED, EOS_ID} if early else set(NEVER_PRODUCED)


def truncated(scores: Row, options: SamplingOptions) -> Row:
    """Scores with what top_k, then top_p, then min_p remove at minus infinity."""
    kept = scores.copy()
    if options.top_k > 0:
        smallest = np.sort(kept)[::-1][min(options.top_k, VOCAB_SIZE) - 1]
        kept[kept < smallest] = -np.inf
    if options.top_p < 1.0:
        probabilities = np.exp(_log_softmax(kept))
        total = 0.0
        inside = set()
        for i in sorted(range(VOCAB_SIZE), key=lambda i: (-probabilities[i], i)):
            inside.add(i)
            total += probabilities[i]
            if total >= options.top_p:
                break
        for i in range(VOCAB_SIZE):
            if i not in inside:
                kept[i] = -np.inf
    if options.min_p > 0.0:
        probabilities = np.exp(_log_softmax(kept))
        kept[probabilities < options.min_p * probabilities.max()] = -np.inf
    return kept


def mixed_seed(seed: int, choice: int) -> int:
    """64-bit key of a choice: the splitmix64 finalizer of the seed moved on by choice + 1 golden gammas."""
    z = (seed + (choice + 1) * 0x9E3779B97F4A7C15) & _LONG
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    return z ^ (z >> 31)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words of a counter under a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _WORD, (first >> 32) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gumbel(seed: int, choice: int, position: int, i: int) -> float:
    """Standard Gumbel noise of id `i` at an absolute position, rounded to fp32."""
    key = mixed_seed(seed, choice)
    words = philox4x32((i // 4, 0, position & _WORD, position >> 32), (key & _WORD, key >> 32))
    return _gumbel_of(words[i % 4])


@lru_cache(maxsize=4096)
def gumbel_row(seed: int, choice: int, position: int) -> Row:
    """The noise of all 260 ids at a position; kept, since drafts and their verification ask for the same rows."""
    key = mixed_seed(seed, choice)
    noise: list[float] = []
    for block in range(VOCAB_SIZE // 4):
        words = philox4x32((block, 0, position & _WORD, position >> 32), (key & _WORD, key >> 32))
        noise.extend(_gumbel_of(word) for word in words)
    row = np.array(noise, dtype=np.float32)
    row.flags.writeable = False
    return row


def _gumbel_of(word: int) -> float:
    # 23 bits and a half: never 0 and never 1, so both logarithms are finite.
    u = ((word >> 9) + 0.5) * 2.0**-23
    return float(np.float32(-math.log(-math.log(u))))


def _log_softmax(scores: Row) -> npt.NDArray[np.float64]:
    wide = scores.astype(np.float64)
    wide = wide - wide.max()
    return wide - math.log(float(np.exp(wide).sum()))


def _certainty(scores: Row) -> tuple[float, float]:
    """Maximum probability and entropy in nats."""
    logs = _log_softmax(scores)
    present = logs[logs > -np.inf]
    return float(np.exp(present.max())), float(-(np.exp(present) * present).sum())
