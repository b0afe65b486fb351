"""Selection in Triton: one program a row, everything a row needs in registers. `selection` has the mathematics.

A row's 260 logits stand in a tile of 512 lanes. Truncation keeps a prefix of the ids in the order (score descending, id
ascending), written as one 41-bit integer an id:

    key = (order-reversing image of the score's 32 bits) * 2^9 + id.

The end of the prefix is found bit by bit, as the greatest key before which there are fewer than k ids (top_k) or less
than top_p of the mass: a masked sum over the tile a bit, in a handful of registers, where sorting the tile would spill.
A row that truncation leaves whole goes through the same sums, in the same order, as in a launch without truncation: its
result does not depend on the booleans.

Only the noise and two sums are float64. Quotients are correctly rounded and products never fused with sums, so that
scores, and with them greedy ids, are those of the torch path bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastblt.kernels.noise import VOCABULARY
from fastblt.kernels.types import NOT_FINITE, NOTHING_LEFT, Selection, SelectionParams

TILE = 512
WARPS = 4

_V = tl.constexpr(VOCABULARY)
_EOS = tl.constexpr(2)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_MOST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def gumbel_row(seed, position, lanes):
    """The Gumbel noise of ids `lanes` (see `noise`): fp32. Every lane computes the whole Philox block of its id."""
    zero = tl.zeros_like(lanes)
    low = (zero + (position & 0xFFFFFFFF)).to(tl.uint32)
    high = (zero + ((position >> 32) & 0xFFFFFFFF)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, (lanes // 4).to(tl.uint32), zero.to(tl.uint32), low, high)
    word = lanes % 4
    x = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    u = ((x >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07
    return (-tl.log(-tl.log(u))).to(tl.float32)


@triton.jit
def _keys(scores, lanes):
    """Keys int64 in [0, 2^41) that ascend as the torch path's stable sort descends; zeros of both signs are equal."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (((~ascending).to(tl.int64) + 2147483648) << 9) | lanes.to(tl.int64)


@triton.jit
def _truncate(keys, e, top_k, top_p, min_p):
    """Which ids stay, int1 [TILE]; `e` are exp(score - largest score), zero outside the vocabulary."""
    one = tl.full((), 1, tl.int64)
    stays = keys >= 0
    if (top_k > 0) & (top_k < _V):
        # An id stays while fewer than k scores are greater than its own, so all of a tie at the boundary do.
        images = keys >> 9
        last = tl.full((), 0, tl.int64)
        for step in range(32):
            further = last | (one << (31 - step))
            if tl.sum((images < further).to(tl.int32), 0) < top_k:
                last = further
        stays = images <= last
    p = tl.where(stays, e, 0.0)
    p = tl.div_rn(p, tl.zeros_like(p) + tl.sum(p, 0))
    least = tl.max(p, 0) * min_p
    if top_p < 1.0:
        # An id stays while the mass before it is below top_p; the first id always does.
        mass = p.to(tl.float64)
        reach = top_p.to(tl.float64)
        last = tl.full((), 0, tl.int64)
        for step in range(41):
            further = last | (one << (40 - step))
            if tl.sum(tl.where(keys < further, mass, 0.0), 0) < reach:
                last = further
        stays = stays & (keys <= tl.maximum(last, tl.min(keys, 0)))
    return stays & (p >= least)


@triton.jit
def select_row(
    columns,
    restricted,
    row,
    SAMPLED: tl.constexpr,
    TRUNCATED: tl.constexpr,
    PENALIZED: tl.constexpr,
    TILE: tl.constexpr,
):
    """(id, logprob, confidence, entropy, bad) of one row; `columns` and `restricted` as `columns_of` makes them."""
    (
        logits, stride, temperature, top_k, top_p, min_p, seeds, positions, forbid_eos, repetition, presence, frequency,
        counts, prompt_seen, bias, allowed,
    ) = columns  # fmt: skip
    lanes = tl.arange(0, TILE)
    inside = lanes < _V
    raw = tl.load(logits + row * stride + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    scores = raw
    if PENALIZED:
        many = tl.load(counts + row * _V + lanes, mask=inside, other=0)
        seen = (tl.load(prompt_seen + row * _V + lanes, mask=inside, other=0) != 0) | (many > 0)
        rate = tl.zeros_like(scores) + tl.load(repetition + row)
        scores = tl.where(seen, tl.where(scores > 0, tl.div_rn(scores, rate), scores * rate), scores)
        spent = many.to(tl.float32) * tl.load(frequency + row)
        spent += tl.where(many > 0, tl.load(presence + row), 0.0)
        scores = scores - spent
        scores += tl.load(bias + row * _V + lanes, mask=inside, other=0.0)
    never = (lanes == 0) | (lanes == 1) | (lanes == 3) | ((lanes == 2) & (tl.load(forbid_eos + row) != 0))
    never = never | (tl.load(allowed + row * _V + lanes, mask=inside & (restricted != 0), other=1) == 0)
    # Adding keeps NaN visible and turns +inf at a forbidden id into NaN.
    scores = scores + tl.where(never, float("-inf"), 0.0)
    broken = tl.max(((scores != scores) | (scores == float("inf"))).to(tl.int32), 0)
    top = tl.max(scores, 0)

    bad = (broken != 0) | (top == float("-inf"))
    x = scores - top
    e = tl.where(inside, tl.exp(x), 0.0)
    total = tl.sum(e, 0)
    p = tl.div_rn(e, tl.zeros_like(e) + total)
    confidence = tl.max(p, 0)
    # Where p is 0 its logarithm may be -inf; any finite number gives the right product, 0.
    log_p = tl.maximum(x - tl.log(total), -_MOST)
    entropy = -tl.sum((log_p * p).to(tl.float64), 0)

    wanted = scores
    if SAMPLED:
        heat = tl.load(temperature + row)
        divisor = tl.zeros_like(scores) + tl.where(heat > 0, heat, 1.0)
        # Quotients beyond fp32 would all be equal: then they are taken of what scores lack to the largest.
        within = tl.abs(tl.div_rn(tl.zeros_like(scores) + top, divisor)) <= _MOST
        scaled = tl.div_rn(tl.where(within, scores, x), divisor)
        x = scaled - tl.max(scaled, 0)
        e = tl.where(inside, tl.exp(x), 0.0)
        total = tl.sum(e, 0)
        drawn = x
        if TRUNCATED:
            keys = _keys(scaled, lanes)
            stays = _truncate(keys, e, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row))
            drawn = tl.where(stays, x, float("-inf"))
        noise = gumbel_row(tl.load(seeds + row), tl.load(positions + row), lanes)
        # Renormalizing after truncation would move all of them alike.
        noisy = tl.where(inside, drawn - tl.log(total) + noise, float("-inf"))
        wanted = tl.where(heat > 0, noisy, scores)
    best = tl.max(wanted, 0)
    chosen = tl.min(tl.where(wanted == best, lanes, TILE), 0)
    chosen = tl.where(bad, _EOS, chosen)

    highest = tl.max(raw, 0)
    weight = tl.sum(tl.where(inside, tl.exp(raw - highest), 0.0), 0)
    own = tl.max(tl.where(lanes == chosen, raw, float("-inf")), 0)
    logprob = own - highest - tl.log(weight)
    nan = float("nan")
    possible = raw + tl.where((lanes == 0) | (lanes == 1) | (lanes == 3), float("-inf"), 0.0)
    flawed = tl.max(((possible != possible) | (possible == float("inf"))).to(tl.int32), 0) != 0
    flawed = flawed | (tl.max(possible, 0) == float("-inf"))
    why = tl.where(bad, tl.where(flawed, _NOT_FINITE, _NOTHING_LEFT), 0)
    return chosen, logprob, tl.where(bad, nan, confidence), tl.where(bad, nan, entropy.to(tl.float32)), why


@triton.jit(do_not_specialize=["restricted"])
def select_kernel(
    columns,
    restricted,
    ids,
    logprobs,
    confidences,
    entropies,
    bads,
    SAMPLED: tl.constexpr,
    TRUNCATED: tl.constexpr,
    PENALIZED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program i selects from row i."""
    row = tl.program_id(0).to(tl.int64)
    chosen, logprob, confidence, entropy, bad = select_row(
        columns, restricted, row, SAMPLED, TRUNCATED, PENALIZED, TILE
    )
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(confidences + row, confidence)
    tl.store(entropies + row, entropy)
    tl.store(bads + row, bad.to(tl.uint8))


def columns_of(params: SelectionParams, logits: Tensor) -> tuple[tuple[Tensor | int, ...], int]:
    """The kernels' argument `columns`, contiguous, and whether ids are restricted.

    A penalty left out gets its neutral value. What is never read still passes a pointer of the right type, as every
    launch does.
    """
    rows = logits.shape[0]
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()

    def column(value: Tensor | None, neutral: float) -> Tensor:
        return logits.new_full((rows,), neutral, dtype=torch.float32) if value is None else value.contiguous()

    def table(value: Tensor | None, dtype: torch.dtype) -> Tensor:
        return logits.new_zeros((rows, VOCABULARY), dtype=dtype) if value is None else value.contiguous()

    if params.penalized:
        penalties: tuple[Tensor, ...] = (
            column(params.repetition, 1.0), column(params.presence, 0.0), column(params.frequency, 0.0),
            table(params.counts, torch.int32), table(params.prompt_seen, torch.bool), table(params.bias, torch.float32),
        )  # fmt: skip
    else:
        one = params.temperature
        penalties = (one, one, one, logits.new_empty(1, dtype=torch.int32), params.forbid_eos, one)
    allowed = params.forbid_eos if params.allowed is None else params.allowed.contiguous()
    given: tuple[Tensor, ...] = (
        params.temperature, params.top_k, params.top_p, params.min_p, params.seeds, params.positions, params.forbid_eos,
    )  # fmt: skip
    given = tuple(value.contiguous() for value in given)
    return (logits, logits.stride(0), *given, *penalties, allowed), int(params.allowed is not None)


def select_triton(logits: Tensor, params: SelectionParams, *, need_statistics: bool) -> Selection:
    """As `select_torch`; the statistics cost next to nothing here and are dropped where nobody asked for them."""
    rows = logits.shape[0]
    ids = logits.new_empty(rows, dtype=torch.int64)
    logprobs, confidence, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    bad = logits.new_empty(rows, dtype=torch.uint8)
    if rows:
        select_kernel[(rows,)](
            *columns_of(params, logits),
            ids,
            logprobs,
            confidence,
            entropy,
            bad,
            SAMPLED=params.sampled,
            TRUNCATED=params.truncated and params.sampled,
            PENALIZED=params.penalized,
            TILE=TILE,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    if not need_statistics:
        return Selection(ids, logprobs, None, None, bad)
    return Selection(ids, logprobs, confidence, entropy, bad)
