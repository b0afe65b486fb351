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


def test_a_step_here_takes_no_longer_than_its_products_in_fp32() -> None:
    """Fifteen products of 512 by 512, thrice as slow at most and 0.2 s for the rest."""
    weight = nn.Parameter(torch.zeros(512, 512))
    x = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(15):
        x @ x
    products = time.perf_counter() - began
    began = time.perf_counter()
    stepped(muon_for(weight.device), [weight], [[x]])
    assert time.perf_counter() - began < 3 * products + 0.2
