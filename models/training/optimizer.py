"""Muon for the hidden matrices, AdamW for everything else, over data-parallel processes.

Muon replaces the momentum of a matrix by a nearby semi-orthogonal matrix, by five Newton-Schulz steps. They run in fp32
over stacks of matrices of equal shape. Each process computes its share of a stack.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rates, which the schedule scales, and the other settings of both optimizers."""

    muon: bool = True
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.05
    lr: float = 3e-3
    embedding_scale: float = 3.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0


def orthogonalize(stack: Tensor, steps: int = 5) -> Tensor:
    """Nearly semi-orthogonal matrices close to those of `stack` [N, m, n]."""
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Both optimizers, over a model's named parameters. Gradients must already be averaged over the processes."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self._named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        groups: dict[str, list[Tensor]] = {"matrix": [], "table": [], "gain": []}
        for name, parameter in self._named:
            if id(parameter) in tables:
                groups["table"].append(parameter)
            elif parameter.ndim != 2:
                groups["gain"].append(parameter)
            elif config.muon and "lm_head" not in name:
                shapes[(parameter.shape[0], parameter.shape[1])].append(parameter)
            else:
                groups["matrix"].append(parameter)
        self._stacks = [shapes[shape] for shape in sorted(shapes)]
        self._momenta = [torch.zeros(len(stack), *stack[0].shape) for stack in self._stacks]
        scales = {"matrix": 1.0, "table": config.embedding_scale, "gain": 1.0}
        self._base_lrs = [config.lr * scales[kind] for kind, members in groups.items() if members]
        self._adamw = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": config.weight_decay if kind == "matrix" else 0.0}
                for kind, members in groups.items()
                if members
            ],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """Update the weights with all learning rates times `scale`. Returns the gradients' norm before clipping."""
        gradients = [parameter.grad for _, parameter in self._named if parameter.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (self.config.clip / (norm + 1e-6)).clamp_max(1.0))
        for group, base in zip(self._adamw.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * scale
        self._adamw.step()
        for stack, momentum in zip(self._stacks, self._momenta, strict=True):
            self._muon(stack, momentum, scale)
        return float(norm)

    def _muon(self, stack: list[Tensor], momentum: Tensor, scale: float) -> None:
        config = self.config
        gradient = torch.stack([parameter.grad for parameter in stack])  # type: ignore[misc]
        momentum.lerp_(gradient, 1 - config.muon_momentum)
        update = _shared(torch.lerp(gradient, momentum, config.muon_momentum))
        lr = config.muon_lr * scale
        rows, columns = stack[0].shape
        torch._foreach_mul_(stack, 1 - lr * config.muon_weight_decay)
        torch._foreach_add_(stack, list(update.unbind()), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        """The state as named tensors, for `restore`."""
        tensors = {f"muon.{index}": momentum for index, momentum in enumerate(self._momenta)}
        for name, parameter in self._named:
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"adamw.{name}.{key}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for index, momentum in enumerate(self._momenta):
            momentum.copy_(tensors[f"muon.{index}"])
        for name, parameter in self._named:
            prefix = f"adamw.{name}."
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                self._adamw.state[parameter] = {key: value.clone() for key, value in found.items()}


def _shared(stack: Tensor) -> Tensor:
    """`orthogonalize`, with the stack divided among the processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalize(stack)
    count = len(stack)
    share = -(-count // world)
    if share * world != count:
        stack = torch.cat([stack, stack.new_zeros(share * world - count, *stack.shape[1:])])
    mine = orthogonalize(stack[dist.get_rank() * share : (dist.get_rank() + 1) * share]).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[:count]
