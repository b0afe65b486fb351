"""Layers whose dense part runs as a few C calls (`kernels.dense`): for serving a small fp32 model on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.dense import Packed, available, feed_forward, pack, pack_norm, project, project_add, rms_norm
from models.blt import Blt
from models.layers import CrossAttend, CrossAttention, Layer, RMSNorm, SelfAttend

#: Where a model keeps which weights its layers were fused with.
_FUSED = "_fused_weights"


def fuse(model: Blt) -> bool:
    """Let a model's fp32 layers on the CPU run fused under `torch.inference_mode`; whether they do now.

    Weights are copied: call it again when they have changed; nothing is done where they have not. Layers that are split
    over ranks stay as they are. Where the model is asked for gradients, or over rows of more than one leading
    dimension, its layers run as before.
    """
    if not available():
        return False
    weights_now = [(id(weight), 0 if weight.is_inference() else weight._version) for weight in model.parameters()]
    if vars(model).get(_FUSED) == weights_now:
        return True
    setattr(model, _FUSED, weights_now)
    for module in list(model.modules()):
        weights = list(module.parameters(recurse=False)) + [
            p for child in module.children() for p in child.parameters()
        ]
        if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in weights):
            continue
        if isinstance(module, Layer):
            # The parts of a layer that is split over ranks are joined by more than a map.
            maps = [*module.self_attn.children(), *module.mlp.children()]
            if not all(isinstance(one, nn.Linear) for one in maps):
                continue
            _replace(module, _layer(module))
        elif isinstance(module, CrossAttention):
            _replace(module, _cross_attention(module))
            _replace(module, _keys_values(module), "keys_values")
        elif isinstance(module, RMSNorm):
            _replace(module, _norm(module))
        elif isinstance(module, nn.Linear):
            _replace(module, _linear(module))
    return True


def _replace(module: nn.Module, fused: Callable[..., object], name: str = "forward") -> None:
    """Have `fused` take rows [N, d] in place of a method, which keeps all else."""
    vars(module).pop(name, None)
    plain = getattr(module, name)

    def choose(x: Tensor, *args: object) -> object:
        return plain(x, *args) if x.dim() != 2 or torch.is_grad_enabled() else fused(x, *args)

    setattr(module, name, choose)


def _layer(layer: Layer) -> Callable[..., Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    before = pack_norm(layer.input_layernorm.weight, layer.input_layernorm.eps)
    behind = pack_norm(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps)
    maps = tuple(pack(one.weight) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
    out = pack(attention.o_proj.weight)
    gate, up, down = (pack(one.weight) for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    dim = attention.head_dim

    def forward(x: Tensor, attend: SelfAttend, index: int) -> Tensor:
        q, k, v = (one.view(x.shape[0], -1, dim) for one in project(x, before, maps))
        x = project_add(attend(index, q, k, v).reshape(x.shape[0], -1), out, x)
        return feed_forward(x, behind, gate, up, down)

    return forward


def _cross_attention(cross: CrossAttention) -> Callable[..., Tensor]:
    norm = pack_norm(cross.q_norm.weight, cross.q_norm.eps)
    queries, out = (pack(cross.q_proj.weight),), pack(cross.o_proj.weight)
    dim = cross.head_dim

    def forward(x: Tensor, attend: CrossAttend, index: int) -> Tensor:
        (q,) = project(x, norm, queries)
        attended = attend(index, q.view(x.shape[0], -1, dim))
        return project_add(attended.reshape(x.shape[0], -1), out, x, times=2)

    return forward


def _keys_values(cross: CrossAttention) -> Callable[..., tuple[Tensor, Tensor]]:
    norm = pack_norm(cross.k_norm.weight, cross.k_norm.eps)
    maps = (pack(cross.k_proj.weight), pack(cross.v_proj.weight))
    dim = cross.head_dim

    def keys_values(source: Tensor) -> tuple[Tensor, Tensor]:
        k, v = project(source, norm, maps)
        return k.view(source.shape[0], -1, dim), v.view(source.shape[0], -1, dim)

    return keys_values


def _norm(module: RMSNorm) -> Callable[..., Tensor]:
    norm = pack_norm(module.weight, module.eps)
    return lambda x: rms_norm(x, norm)


def _linear(module: nn.Linear) -> Callable[..., Tensor]:
    maps: tuple[Packed, ...] = (pack(module.weight),)
    return lambda x: project(x, None, maps)[0]
