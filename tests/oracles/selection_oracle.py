"""Scalar references of selection, noise, unmasking and verification: one row at a time, plain Python.

Scores (penalties, bias, division by the temperature) are followed in fp32, since exact ties are decided there;
probabilities are float64. `margin` says how far the nearest decision that depends on rounded probabilities was from
falling the other way: below about 1e-5 an fp32 implementation may differ, everything else is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WORD = 2**32
INF = math.inf
#: What `bad` may be.
NOT_FINITE, NOTHING_LEFT = 1, 2


def splitmix64(seed: int, number: int) -> int:
    """Output `number` (from 0) of the splitmix64 generator started at `seed`, as a signed 64-bit integer."""
    state = seed % 2**64
    out = 0
    for _ in range(number + 1):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        out = state
        out = ((out ^ (out // 2**30)) * 0xBF58476D1CE4E5B9) % 2**64
        out = ((out ^ (out // 2**27)) * 0x94D049BB133111EB) % 2**64
        out = out ^ (out // 2**31)
    return out - 2**64 if out >= 2**63 else out


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def gumbel(seed: int, position: int) -> list[float]:
    """The noise of the 260 ids, rounded to fp32."""
    key = (seed % WORD, (seed // WORD) % WORD)
    noise = []
    for block in range(65):
        for word in philox((block, 0, position % WORD, (position // WORD) % WORD), key):
            u = (word // 512 + 0.5) / 2**23
            noise.append(float(np.float32(-math.log(-math.log(u)))))
    return noise


@dataclass
class Row:
    """The parameters of one row."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    forbid_eos: bool = False
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    counts: Sequence[int] = field(default_factory=lambda: [0] * 260)
    prompt_seen: Sequence[bool] = field(default_factory=lambda: [False] * 260)
    bias: Sequence[float] = field(default_factory=lambda: [0.0] * 260)
    allowed: Sequence[bool] = field(default_factory=lambda: [True] * 260)


@dataclass
class Choice:
    id: int
    logprob: float
    confidence: float
    entropy: float
    bad: int
    margin: float


def log_softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = math.fsum(math.exp(score - top) for score in scores)
    return [score - top - math.log(total) for score in scores]


def first_best(values: Sequence[float]) -> int:
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return best


def penalize(logits: Sequence[float], row: Row) -> list[np.float32]:
    """fp32 scores after penalties, bias, and ids that are forbidden or not allowed."""
    scores = []
    for index, logit in enumerate(logits):
        score = np.float32(logit)
        if row.prompt_seen[index] or row.counts[index] > 0:
            rate = np.float32(row.repetition)
            score = score / rate if score > 0 else score * rate
        spent = np.float32(row.frequency) * np.float32(row.counts[index])
        if row.counts[index] > 0:
            spent = spent + np.float32(row.presence)
        score = (score - spent) + np.float32(row.bias[index])
        if index in (0, 1, 3) or (index == 2 and row.forbid_eos) or not row.allowed[index]:
            score = np.float32(-INF)
        scores.append(score)
    return scores


def truncate(scores: Sequence[float], row: Row) -> tuple[list[float], float]:
    """Scores with the removed ids at -inf, and the margin."""
    margin = INF
    kept = [score > -INF for score in scores]
    if row.top_k > 0:
        boundary = sorted(scores, reverse=True)[min(row.top_k, len(scores)) - 1]
        kept = [keep and score >= boundary for keep, score in zip(kept, scores, strict=True)]
    p = [math.exp(x) for x in log_softmax([s if keep else -INF for s, keep in zip(scores, kept, strict=True)])]
    if np.float32(row.top_p) < 1:
        bound = float(np.float32(row.top_p))
        mass, reached = 0.0, False
        for place, index in enumerate(sorted(range(len(scores)), key=lambda index: (-scores[index], index))):
            if reached:
                kept[index] = False
            mass += p[index]
            if place < len(scores) - 1:
                margin = min(margin, abs(mass - bound))
            reached = reached or mass >= bound
    if row.min_p > 0:
        floor = float(np.float32(row.min_p)) * max(p)
        for index in range(len(scores)):
            # The most probable id and its equals pass exactly.
            if kept[index] and p[index] < max(p):
                margin = min(margin, abs(p[index] / floor - 1))
                kept[index] = p[index] >= floor
    return [score if keep else -INF for score, keep in zip(scores, kept, strict=True)], margin


def select(logits: Sequence[float], row: Row) -> Choice:
    if any(math.isnan(logit) or logit == INF for logit in logits) or max(logits[2], *logits[4:]) == -INF:
        return Choice(2, math.nan, math.nan, math.nan, NOT_FINITE, INF)
    with np.errstate(over="ignore", invalid="ignore"):
        scores = penalize(logits, row)
    if any(np.isnan(score) or score == INF for score in scores) or max(scores) == -INF:
        return Choice(2, math.nan, math.nan, math.nan, NOTHING_LEFT, INF)
    temperature = np.float32(row.temperature) if row.temperature > 0 else np.float32(1)
    with np.errstate(over="ignore"):
        largest = np.float32(max(scores))
        off = np.float32(0) if np.isfinite(largest / temperature) else largest
        scaled = [float((score - off) / temperature) for score in scores]
    logp = log_softmax([float(score) for score in scores])
    entropy = -math.fsum(math.exp(x) * x for x in logp if x > -INF)
    margin = INF
    if row.temperature > 0:
        left, margin = truncate(scaled, row)
        noise = gumbel(row.seed, row.position)
        noisy = [x + g for x, g in zip(log_softmax(left), noise, strict=True)]
        chosen = first_best(noisy)
        second = max((x for index, x in enumerate(noisy) if index != chosen), default=-INF)
        margin = min(margin, noisy[chosen] - second)
    else:
        chosen = first_best([float(score) for score in scores])
    raw = log_softmax([float(logit) for logit in logits])
    return Choice(chosen, raw[chosen], math.exp(max(logp)), entropy, 0, margin)


def pick(
    confidence: Sequence[float],
    entropy: Sequence[float],
    masked: Sequence[bool],
    rule: int,
    bound: float,
    last_step: bool,
) -> list[int]:
    """The positions of one block to fix, given each position's statistics."""
    places = [place for place, hidden in enumerate(masked) if hidden]
    if last_step or rule == 3 or not places:
        return places
    if rule == 0:
        exceeding = [place for place in places if confidence[place] > bound]
        return exceeding or [min(places, key=lambda place: (-confidence[place], place))]
    ascending = sorted(places, key=lambda place: (entropy[place], place))
    size = 0
    for k in range(1, len(ascending) + 1):
        spent = [entropy[place] for place in ascending[:k]]
        # The terms are fp32 values, so removing one and adding the rest is as exact as adding them all.
        total = sum(spent) if rule == 1 else sum(sorted(spent)[:-1])
        if total <= bound:
            size = k
    return sorted(ascending[: max(size, 1)])


def verify(targets: Sequence[int], drafts: Sequence[int], length: int) -> tuple[int, int]:
    accepted = 0
    while accepted < length and drafts[accepted] == targets[accepted]:
        accepted += 1
    return accepted, targets[accepted]
