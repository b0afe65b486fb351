"""The global transformer split over ranks, each with its heads and its part of the feed-forward.

Queries, keys, values, gate and up projections are split by output columns: a rank computes its own from the whole
input, and needs nobody for it. The two maps that bring a rank's part back to the residual stream, `o_proj` and
`down_proj`, are joined in one of two ways (`exact`):

* by rows: a rank multiplies its part of the input, and the products are added over the ranks: one all-reduce a map.
  Sums are taken in another order than on one rank, so results differ in rounding.
* by columns: the input is gathered, every rank computes its own output columns, and these are gathered: two
  all-gathers a map. Every dot product is taken whole, in one rank, as one rank alone takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fastblt.models.blt import GlobalTransformer
from fastblt.models.config import BltConfig, ConfigError
from fastblt.models.layers import Layer

_BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_JOINED = ("o_proj", "down_proj")


class Exchange(Protocol):
    """Collective operations of the ranks; each gives its own x [..., w]."""

    size: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on every rank."""

    def gather(self, x: Tensor) -> Tensor:
        """[..., size * w]: every rank's x side by side, in order of rank."""


class _Joined(nn.Module):
    """A linear map whose input is spread over the ranks, and whose output all of them get."""

    def __init__(self, inputs: int, outputs: int, exchange: Exchange) -> None:
        super().__init__()
        #: This rank's part of the map.
        self.part: nn.Module = nn.Linear(inputs, outputs, bias=False)
        self._exchange = exchange


class Summed(_Joined):
    """Split by rows: its part has weights [outputs, inputs / size]."""

    def forward(self, x: Tensor) -> Tensor:
        return self._exchange.sum(self.part(x))


class Gathered(_Joined):
    """Split by columns: its part has weights [outputs / size, inputs]."""

    def forward(self, x: Tensor) -> Tensor:
        return self._exchange.gather(self.part(self._exchange.gather(x)))


def check_split(config: BltConfig, size: int) -> None:
    """Raises ConfigError for a global transformer that cannot be split over `size` ranks."""
    stack = config.global_
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "hidden_size"):
        if (count := getattr(stack, name)) % size:
            raise ConfigError(
                f"tensor_parallel_size {size} does not divide the global transformer's {name} ({count});"
                " use another size"
            )


def split_transformer(config: BltConfig, exchange: Exchange, *, exact: bool) -> GlobalTransformer:
    """One rank's transformer, on the meta device: it takes the weights of `split_weights`.

    The attention it is given sees this rank's heads only. Raises ConfigError.
    """
    size = exchange.size
    check_split(config, size)
    with torch.device("meta"):
        transformer = GlobalTransformer(config)
        for module in transformer.layers:
            layer = cast(Layer, module)
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    assert isinstance(linear, nn.Linear)
                    inputs, outputs = linear.in_features, linear.out_features
                    part: nn.Module
                    if name in _BY_COLUMNS:
                        part = nn.Linear(inputs, outputs // size, bias=False)
                    elif exact:
                        part = Gathered(inputs, outputs // size, exchange)
                    else:
                        part = Summed(inputs // size, outputs, exchange)
                    setattr(parent, name, part)
    return transformer


def split_weights(weights: Mapping[str, Tensor], rank: int, size: int, *, exact: bool) -> dict[str, Tensor]:
    """A rank's own copy of the weights of a GlobalTransformer, by their names in `split_transformer`. What is not split
    is copied whole."""
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in _BY_COLUMNS or kind in _JOINED:
            weight = weight.chunk(size, 1 if kind in _JOINED and not exact else 0)[rank]
        if kind in _JOINED:
            name = name.replace(".weight", ".part.weight")
        # A view would keep the whole of it in memory.
        parts[name] = weight.clone(memory_format=torch.contiguous_format)
    return parts
