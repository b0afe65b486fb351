"""Selection of one id for each row of logits: penalties, temperature, truncation, sampling and statistics.

z [N, 260] are the raw logits and c the counts of produced ids. All parameters are values of the row:

    s = z;  s = s / r if s > 0 else s * r      for ids in the prompt or produced (repetition)
    s = s - (frequency * c + presence * [c > 0]) + bias
    s = -inf for BOE, BOS and BPE, for EOS if forbidden, and for ids that are not allowed
    t = 0:  id = argmax(s)
    t > 0:  s = s / t (or (s - max s) / t where s / t exceeds fp32), then set to -inf by, in this order,
            top_k   ids below the k-th largest score (ties at the boundary stay)
            top_p   ids after the smallest prefix, descending, ties lowest id first, whose probability reaches top_p,
                    probabilities renormalized after top_k; the first id always stays
            min_p   ids with p < min_p * max p
            id = argmax(log_softmax(s) + gumbel(seed, position, id))

Ties go to the lowest id. `logprobs` is log_softmax(z) at the id: the raw model's. `confidence` (maximum probability)
and `entropy` (nats) are those of softmax(s) before temperature and truncation: they measure how sure the model is, not
how the byte is drawn. A row is `bad`, and its id is EOS, in two cases. NOT_FINITE: its logits contain NaN or +inf, or
have no finite value at an id that can be produced. NOTHING_LEFT: the logits are sound, but penalties, bias and masks
leave no finite score or make an infinite one.

A row's result is bit-identical whatever the other rows, N and the three batch-wide booleans are. A vectorized loop and
the scalar loop over its remainder may round a transcendental function differently, and the place of the remainder
depends on N. So exp and log occur only in softmax and log_softmax over the last dimension, which handle each row alone,
and in the noise, which is correctly rounded (`noise.py`). All else is IEEE arithmetic, comparison, sorting, or a sum
along a row. The C and Triton kernels compute each row alone.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu import structs
from fastblt.kernels.cpu.native import library
from fastblt.kernels.noise import VOCABULARY, gumbel
from fastblt.kernels.types import NOT_FINITE, NOTHING_LEFT, Selection, SelectionParams

EOS = 2
#: BOE, BOS and BPE are never produced.
NEVER = (0, 1, 3)

_INF = float("inf")
_MOST = torch.finfo(torch.float32).max


@lru_cache(maxsize=16)
def _allowances(device: torch.device) -> tuple[Tensor, Tensor]:
    """0 or -inf to add to the scores [260], without and with EOS. Built once for each device, never in a pass."""
    with torch.inference_mode(False):
        without = torch.zeros(VOCABULARY)
        without[[*NEVER, EOS]] = -_INF
        with_eos = without.clone()
        with_eos[EOS] = 0.0
        return without.to(device), with_eos.to(device)


def _penalized(logits: Tensor, params: SelectionParams) -> Tensor:
    """Scores after penalties and bias: a new tensor, or `logits` itself if there are none."""
    scores, counts = logits, params.counts
    produced = None if counts is None else counts > 0
    if params.repetition is not None:
        seen = params.prompt_seen
        if produced is not None:
            seen = produced if seen is None else seen | produced
        if seen is not None:
            rate = params.repetition.unsqueeze(-1)
            scores = torch.where(seen, torch.where(scores > 0, scores / rate, scores * rate), scores)
    if counts is not None and produced is not None:
        # Products and sums are separate operations: a fused multiply-add would round differently.
        penalty = None if params.frequency is None else counts * params.frequency.unsqueeze(-1)
        if params.presence is not None:
            present = produced * params.presence.unsqueeze(-1)
            penalty = present if penalty is None else penalty.add_(present)
        if penalty is not None:
            scores = scores - penalty
    return scores if params.bias is None else scores + params.bias


def _truncated(scores: Tensor, params: SelectionParams) -> Tensor:
    """Scores [N, 260] with the ids that top_k, top_p and min_p remove at -inf."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    last = torch.where(params.top_k > 0, params.top_k, VOCABULARY).clamp_(max=VOCABULARY).sub_(1)
    kept = ordered >= ordered.gather(1, last.unsqueeze(-1))
    p = ordered.masked_fill(~kept, -_INF).softmax(-1)
    # An id stays while the sum of those before it is below top_p. Rounding may take that sum to 1 too early, so
    # top_p = 1 (off) becomes a bound that no sum reaches.
    mass = p.cumsum(-1, dtype=torch.float64)
    reach = torch.where(params.top_p < 1, params.top_p, _INF)
    kept[:, 1:].logical_and_(mass[:, :-1] < reach.unsqueeze(-1))
    kept.logical_and_(p >= p[:, :1] * params.min_p.unsqueeze(-1))
    removed = torch.zeros_like(kept).scatter_(1, order, kept).logical_not_()
    return scores.masked_fill(removed, -_INF)


def select_torch(logits: Tensor, params: SelectionParams, *, need_statistics: bool) -> Selection:
    """One id for each row of fp32 logits [N, 260], which are not modified. See the module for the rules."""
    # Adding -inf, instead of filling with it, keeps NaN and turns +inf at a forbidden id into NaN, so bad rows show.
    allowance = torch.where(params.forbid_eos.unsqueeze(-1), *_allowances(logits.device))
    if params.allowed is not None:
        allowance.masked_fill_(params.allowed.logical_not(), -_INF)
    scores = allowance.add_(_penalized(logits, params) if params.penalized else logits)
    top, ids = scores.max(-1)
    flawed = (logits + _allowances(logits.device)[1]).amax(-1).isfinite().logical_not_()
    bad = top.isfinite().logical_not_()
    if params.sampled:
        # Greedy rows divide by 1, and choose among the scores themselves: log_softmax could round two to one value.
        # Quotients beyond fp32 would all be infinite: then the largest score is subtracted first.
        sampling, top = params.temperature > 0, top.unsqueeze(-1)
        heat = torch.where(sampling, params.temperature, 1.0).unsqueeze(-1)
        scaled = (scores - torch.where((top / heat).isfinite(), 0.0, top)) / heat
        if params.truncated:
            scaled = _truncated(scaled, params)
        noisy = scaled.log_softmax(-1) + gumbel(params.seeds, params.positions)
        ids = torch.where(sampling.unsqueeze(-1), noisy, scores).argmax(-1)
    ids.masked_fill_(bad, EOS)
    logprobs = logits.log_softmax(-1).gather(1, ids.unsqueeze(-1)).squeeze(-1)
    confidence = entropy = None
    if need_statistics:
        p = scores.softmax(-1)
        confidence = p.amax(-1)
        # Where p is 0, log p may be -inf; clamped to a finite number, the product is 0 as it should be. The sum is in
        # float64 because a device may choose the order of summation by N.
        entropy = scores.log_softmax(-1).clamp_(min=-_MOST).mul_(p).sum(-1, dtype=torch.float64).neg_().float()
        confidence.masked_fill_(bad, float("nan"))
        entropy.masked_fill_(bad, float("nan"))
    return Selection(ids, logprobs, confidence, entropy, torch.where(flawed, NOT_FINITE, NOTHING_LEFT * bad).byte())


def select(logits: Tensor, params: SelectionParams, *, need_statistics: bool) -> Selection:
    """Like `select_torch`, by the implementation for the logits' device. Takes any floating dtype."""
    if use_triton(logits.device):
        from fastblt.kernels.gpu.selection import select_triton

        return select_triton(logits, params, need_statistics=need_statistics)
    logits = logits.float()
    if logits.device.type == "cpu" and (native := library()) is not None:
        return _select_native(native, logits, params, need_statistics)
    return select_torch(logits, params, need_statistics=need_statistics)


def _select_native(native: ctypes.CDLL, logits: Tensor, params: SelectionParams, need_statistics: bool) -> Selection:
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    given = {"forbid_eos": params.forbid_eos, "allowed": params.allowed}
    # Parameters that no row needs are not passed, so they need not be made contiguous.
    names = (
        *(("temperature", "seeds", "positions") if params.sampled else ()),
        *(("top_k", "top_p", "min_p") if params.sampled and params.truncated else ()),
        *(("repetition", "presence", "frequency", "counts", "prompt_seen", "bias") if params.penalized else ()),
    )
    given |= {name: getattr(params, name) for name in names}
    columns = {name: value.contiguous() for name, value in given.items() if value is not None}
    rows = len(logits)
    ids, bad = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.uint8)
    logprobs = logits.new_empty(rows)
    confidence, entropy = (logits.new_empty(rows) if need_statistics else None for _ in range(2))
    results = (None if one is None else one.data_ptr() for one in (ids, logprobs, confidence, entropy, bad))
    native.fastblt_select(
        structs.Columns(
            logits=logits.data_ptr(),
            stride=logits.stride(0),
            **{name: value.data_ptr() for name, value in columns.items()},
        ),
        structs.Selection(*results),
        rows,
        torch.get_num_threads(),
    )
    return Selection(ids, logprobs, confidence, entropy, bad)
