"""Muon in fp32 against torch's, which computes in bfloat16, and against the singular values that it is about."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from fastblt.models.training.muon import WideMuon, muon_for

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def stepped(
    kind: type[torch.optim.Muon], weights: list[nn.Parameter], grads: list[list[torch.Tensor]]
) -> torch.optim.Muon:
    optimizer = kind([{"params": weights}], **SETTINGS)  # type: ignore[arg-type]
    for own in grads:
        for weight, grad in zip(weights, own, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", [(8, 8), (5, 24), (24, 5)])
def test_steps_are_those_of_torch_up_to_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))]
    theirs = copy.deepcopy(ours)
    grads = [[torch.randn(shape), torch.randn(shape)] for _ in range(3)]
    own, other = stepped(WideMuon, ours, grads), stepped(torch.optim.Muon, theirs, grads)
    for weight, like in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, like, rtol=0, atol=0.02)
        assert torch.equal(own.state[weight]["momentum_buffer"], other.state[like]["momentum_buffer"])


def test_an_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(32, 64))
    stepped(WideMuon, [weight], [[torch.randn(32, 64)]])
    values = torch.linalg.svdvals(weight.detach()) / SETTINGS["lr"]
    assert float(values.min()) > 0.5 and float(values.max()) < 1.5


def test_the_kind_for_this_processor_is_not_the_slow_one() -> None:
    """Where bfloat16 is slow it is twenty times as slow."""
    weight, grad = nn.Parameter(torch.zeros(384, 384)), torch.randn(384, 384)

    def fastest(kind: type[torch.optim.Muon]) -> float:
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            stepped(kind, [weight], [[grad]])
            taken.append(time.perf_counter() - began)
        return min(taken)

    chosen = muon_for(weight.device)
    (other,) = {WideMuon, torch.optim.Muon} - {chosen}
    assert fastest(chosen) < 4 * fastest(other)
