"""Muon where bfloat16 is slow: `torch.optim.Muon` makes its products in it, and a CPU without instructions for it takes
twenty times as long for them as in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WideMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the same settings and state, and products in the parameters' own type."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if (grad := weight.grad) is None:
                    continue
                state, momentum = self.state[weight], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
                update = grad.lerp(mean, momentum) if group["nesterov"] else mean
                update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def muon_for(device: torch.device) -> type[torch.optim.Muon]:
    """The class for parameters on this device."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return WideMuon if slow else torch.optim.Muon


def _orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The orthogonal matrix nearest to x [m, n], about: so many Newton-Schulz steps from x over its norm."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram, x, beta=a)
    return x.T if tall else x
