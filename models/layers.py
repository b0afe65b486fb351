"""Transformer layers that own weights and nothing else.

A layer hands its unrotated queries, keys and values to the attention it is given; rotation, masks and caches belong to
the caller. Training, the reference decoders and the engine run these same layers. All activations have shape [..., d]
with any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblt.models.config import StackConfig


class SelfAttend(Protocol):
    """Self-attention given from outside: layer index, q [..., H, D], k and v [..., Hkv, D] -> [..., H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class CrossAttend(Protocol):
    """Cross-attention given from outside: index of the cross-attention layer, q [..., H, D] -> [..., H, D]."""

    def __call__(self, layer: int, q: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """Root mean square norm in fp32; the cast comes before the gain, as published."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Projections(nn.Module):
    """The four linear maps of an attention."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """x [..., heads * D] as [..., heads, D]."""
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(_Projections):
    """Self-attention of rows x [..., d]; `attend` has the rotation, mask and cache."""

    def forward(self, x: Tensor, attend: SelfAttend, layer: int) -> Tensor:
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class CrossAttention(_Projections):
    """Cross-attention without positions. Keys and values are computed separately, so that they can be cached."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [..., Hkv, D] of the rows [..., d] that will be attended to."""
        source = self.k_norm(source)
        return self.heads(self.k_proj(source)), self.heads(self.v_proj(source))

    def forward(self, x: Tensor, attend: CrossAttend, layer: int) -> Tensor:
        q = self.heads(self.q_proj(self.q_norm(x)))
        attended = self.o_proj(attend(layer, q).flatten(-2))
        # The published network adds its input twice: inside the cross-attention and again by its caller.
        return (attended + x) + x


class Layer(nn.Module):
    """Pre-norm transformer layer: self-attention, then SwiGLU."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attend: SelfAttend, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.ModuleList):
    """Transformer layers. Where there are cross-attentions, one stands before each of the first layers."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(Layer(config) for _ in range(config.num_layers))

    def forward(
        self,
        x: Tensor,
        attend: SelfAttend,
        crosses: Sequence[CrossAttention] = (),
        cross_attend: CrossAttend | None = None,
    ) -> Tensor:
        """Rows x [..., d] after the last layer."""
        for index, layer in enumerate(self):
            if index < len(crosses):
                assert cross_attend is not None
                x = crosses[index](x, cross_attend, index)
            x = layer(x, attend, index)
        return x


class Rope:
    """Interleaved rotary embedding: pairs (2i, 2i+1) turn by position / theta^(2i/D), as in the published weights.

    The table of cosines and sines [positions, D/2, 2] (fp32) grows on demand.
    """

    def __init__(self, head_dim: int, theta: float, device: torch.device | None = None) -> None:
        self._frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self._device = device
        self._table = torch.empty(0, head_dim // 2, 2, device=device)

    def table(self, length: int) -> Tensor:
        """Cosine and sine for positions 0..length-1: [>= length, D/2, 2], fp32."""
        if self._table.shape[0] < length:
            size = max(length, 2 * self._table.shape[0], 1024)
            angles = torch.arange(size, dtype=torch.float32)[:, None] * self._frequencies
            self._table = torch.stack((angles.cos(), angles.sin()), -1).to(self._device)
        return self._table

    def at(self, positions: Tensor, length: int) -> Tensor:
        """Cosine and sine at int64 `positions` [...] (all below `length`): [..., D/2, 2]."""
        return self.table(length)[positions]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate heads x [..., H, D] by `turns` [..., D/2, 2] of their row.

    fp32 rows turn in one complex product (which the compiler cannot fuse, so compiled training steps take the plain
    form); other dtypes multiply in their own dtype, as `transformers` does.
    """
    if x.dtype == torch.float32 and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.view_as_complex(turns).unsqueeze(-2)).flatten(-2)
    cos, sin = turns.to(x.dtype).unsqueeze(-3).repeat_interleave(2, dim=-2).unbind(-1)
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + swapped * sin
