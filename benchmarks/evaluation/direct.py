"""Likelihoods without a server or a harness: one forward pass of the model a text, for comparison."""

from __future__ import annotations

import torch

from fastblt.models.blt import Blt
from fastblt.models.vocabulary import encode, with_bos


def loglikelihood(model: Blt, context: str, continuation: str) -> float:
    """Log-probability (nats) of a continuation, by float64 sums of the model's log-softmax.

    As the harness does, spaces at the end of the context belong to the continuation.
    """
    bare = context.rstrip()
    ids = with_bos(encode((context + continuation).encode()))
    first = 1 + len(bare.encode())
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return float(sum(rows[at - 1][ids[at]] for at in range(first, len(ids))))


def largest_difference(model: Blt, samples: list[dict[str, object]]) -> float:
    """Between the harness's log-likelihoods and the model's own, over all choices of its logged samples."""
    worst = 0.0
    for sample in samples:
        for (context, continuation), [(value, _)] in zip(sample["arguments"], sample["resps"], strict=True):  # type: ignore[call-overload]
            worst = max(worst, abs(float(value) - loglikelihood(model, context, continuation)))
    return worst
