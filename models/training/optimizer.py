"""Muon for the hidden matrices, AdamW for everything else: both of `torch.optim`, also over sharded parameters (and
`muon.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastblt.models.training.layout import PARTS
from fastblt.models.training.muon import muon_for


@dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rates, which the schedule scales, and the other settings of both optimizers.

    Without `muon_lr` AdamW has the hidden matrices too. `parts` are factors of all rates of a part of the model.
    """

    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.05
    lr: float = 3e-3
    embedding_scale: float = 3.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)


def part_of(name: str) -> str | None:
    """The part of PARTS that a parameter of `Blt` belongs to; None for the entropy model's."""
    first = name.split(".")[0]
    return next((part for part, modules in PARTS.items() if first in modules), None)


class Optimizer:
    """Both optimizers, over named parameters that require a gradient. Gradients must be averaged over the processes."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self._named = dict(trained(module))
        tables = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
        groups: dict[tuple[str, float], list[Tensor]] = {}
        for name, parameter in self._named.items():
            if id(parameter) in tables:
                kind = "table"
            elif parameter.ndim != 2:
                kind = "gain"
            elif config.muon_lr and "lm_head" not in name:
                kind = "hidden"
            else:
                kind = "matrix"
            factor = config.parts.get(part_of(name) or "", 1.0)
            groups.setdefault((kind, factor), []).append(parameter)
        self._optimizers: list[torch.optim.Optimizer] = []
        #: Of every group of every optimizer, its rate at scale 1.
        self._rates: list[list[float]] = []
        hidden = {key: members for key, members in groups.items() if key[0] == "hidden"}
        if hidden:
            muon = muon_for(next(iter(hidden.values()))[0].device)(
                [{"params": members} for members in hidden.values()],
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.muon_weight_decay,
            )
            self._optimizers.append(muon)
            self._rates.append([config.muon_lr * factor for _, factor in hidden])
        others = {key: members for key, members in groups.items() if key[0] != "hidden"}
        if others:
            decay = {"matrix": config.weight_decay}
            adamw = torch.optim.AdamW(
                [{"params": members, "weight_decay": decay.get(kind, 0.0)} for (kind, _), members in others.items()],
                lr=config.lr,
                betas=config.betas,
                fused=True,
            )
            scales = {"table": config.embedding_scale}
            self._optimizers.append(adamw)
            self._rates.append([config.lr * scales.get(kind, 1.0) * factor for kind, factor in others])

    def step(self, scale: float) -> float:
        """Update the weights with all learning rates times `scale`. Returns the gradients' norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._named.values(), self.config.clip, foreach=True)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The state as named tensors, sharded as their parameters are."""
        for name, parameter in self._named.items():
            for optimizer in self._optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{key}.{name}", value

    def restore(self, name: str, key: str, value: Tensor) -> None:
        """Set one tensor of the state of a parameter."""
        parameter = self._named[name]
        for optimizer in self._optimizers:
            if any(parameter is one for group in optimizer.param_groups for one in group["params"]):
                optimizer.state[parameter][key] = value


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require a gradient, under the names that `Blt` gives them."""
    return [(name.removeprefix("model."), one) for name, one in module.named_parameters() if one.requires_grad]
