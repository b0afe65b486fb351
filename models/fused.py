"""Replaces a small model's fp32 modules on a CPU by C calls, for serving (`kernels/cpu/stack.py`, `dense.py`).

`models/packed.py` has what large models get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.dense import Norm, Packed, pack, pack_norm, project, project_add, rms_norm
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.stack import CrossWeights, LayerWeights, PackedStack, Sink, Source, fits, run, run_stored
from fastblt.kernels.cpu.upstream import PackedPooling, PackedReaders, StoredPatches, pool, store_latents
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.models.blt import Blt, LocalDecoder, LocalEncoder, Patcher
from fastblt.models.layers import CrossAttend, CrossAttention, Layer, RMSNorm, SelfAttend, Stack

#: Attributes of a fused model: the weights that were copied, and its LocalModules.
_FUSED, _LOCAL = "_fused_weights", "_fused_local"

Pack = Callable[[nn.Module], Packed]


@dataclass(frozen=True)
class LocalModules:
    """The local modules for C code: their packed layers, what rows begin as (`Source`) and what becomes of them
    (`Sink`).

    `head` maps the decoder's states to logits.
    """

    patcher: tuple[PackedStack, Source, Sink]
    encoder: tuple[PackedStack, Source, Sink]
    decoder: tuple[PackedStack, Source, Sink]
    head: Packed


def fuse(model: Blt) -> bool:
    """Let a model's fp32 modules on the CPU run as C under `torch.inference_mode`. Returns whether they do now.

    Weights are copied: call it again when they have changed; nothing is done where they have not. Layers that are split
    over ranks stay as they are. Where the model is asked for gradients, or over rows of more than one leading
    dimension, or with another attention than that over paged caches, its layers run as before.
    """
    if library() is None:
        return False
    weights_now = [(id(weight), 0 if weight.is_inference() else weight._version) for weight in model.parameters()]
    if vars(model).get(_FUSED) == weights_now:
        return True
    setattr(model, _FUSED, weights_now)
    copies: dict[int, Packed] = {}
    local: dict[str, tuple[PackedStack, Source, Sink]] = {}

    def packed(linear: nn.Module) -> Packed:
        """A map's packed weights; each map is copied once, however many calls use it."""
        weight = cast(Tensor, linear.weight)
        if id(weight) not in copies:
            copies[id(weight)] = pack(weight)
        return copies[id(weight)]

    for module in list(model.modules()):
        if not all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in module.parameters()):
            continue
        if isinstance(layers := getattr(module, "layers", None), Stack) and _whole(layers):
            crosses = module.cross_attn_layers if isinstance(module, LocalDecoder) else ()
            whole = _pack_stack(layers, cast(Sequence[CrossAttention], crosses), packed)
            _replace(layers, _stack(layers, whole))
            if isinstance(module, Patcher):
                sink = Sink(norm=_packed_norm(module.norm), head=packed(module.lm_head))
                local["patcher"] = whole, Source(table=module.embed_tokens.weight), sink
                _replace_stored(module, _entropies(module, *local["patcher"]), "stored_entropies")
            elif isinstance(module, LocalEncoder) and model.encoder_hash_tok_embedding.weight.dtype == torch.float32:
                local["encoder"] = whole, Source(hashed=model.hash_tables()), Sink()
                _replace_stored(model, _encode(model, *local["encoder"][:2]), "encode_stored")
            elif isinstance(module, LocalDecoder):
                table = module.embed_tokens.weight if hasattr(module, "embed_tokens") else None
                local["decoder"] = whole, Source(table=table), Sink(norm=_packed_norm(module.norm))
                _replace_stored(module, _decode(module, *local["decoder"]), "stored_states")
        if isinstance(module, LocalEncoder):
            _replace_stored(module, _pooling(module, packed), "pool_stored")
        elif isinstance(module, LocalDecoder):
            _replace_stored(module, _readers(module, packed), "store_latents")
        elif isinstance(module, CrossAttention):
            _replace(module, _cross_attention(module, packed))
            _replace(module, _keys_values(module, packed), "keys_values")
        elif isinstance(module, RMSNorm):
            _replace(module, _norm(module))
        elif isinstance(module, nn.Linear):
            _replace(module, _linear(module, packed))
    head = model.lm_head.weight
    everything = len(local) == 3 and head.dtype == torch.float32 and head.device.type == "cpu"
    setattr(model, _LOCAL, LocalModules(**local, head=packed(model.lm_head)) if everything else None)
    return True


def local_modules(model: Blt) -> LocalModules | None:
    """The local modules of a fused model; None where `fuse` did not take all of them whole."""
    return vars(model).get(_LOCAL)


def is_fused(model: Blt) -> bool:
    """Whether `fuse` left nothing to torch: then a row's result depends on no other row."""
    stacks = (module for module in model.modules() if isinstance(module, Stack))
    whole = all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in model.parameters())
    return _FUSED in vars(model) and whole and all(map(_whole, stacks))


def _whole(stack: Stack) -> bool:
    """Whether the layers are on one rank: split ones exchange their parts, which C code cannot."""
    layers = [cast(Layer, layer) for layer in stack]
    maps = [one for layer in layers for one in (*layer.self_attn.children(), *layer.mlp.children())]
    return all(isinstance(one, nn.Linear) for one in maps)


def _replace(module: nn.Module, fused: Callable[..., object], name: str = "forward") -> None:
    """Have `fused` take inputs of shape [N, d] in place of a method, which still takes all others."""
    vars(module).pop(name, None)
    plain = getattr(module, name)

    def choose(x: Tensor, *args: object) -> object:
        return plain(x, *args) if x.dim() != 2 or torch.is_grad_enabled() else fused(x, *args)

    setattr(module, name, choose)


def _replace_stored(module: nn.Module, fused: Callable[..., object], name: str) -> None:
    """Have `fused` take the place of a method over caches, but where gradients are wanted."""
    vars(module).pop(name, None)
    plain = getattr(module, name)

    def choose(*args: object, **kwargs: object) -> object:
        return plain(*args, **kwargs) if torch.is_grad_enabled() else fused(*args, **kwargs)

    setattr(module, name, choose)


def _pooling(encoder: LocalEncoder, packed: Pack) -> Callable[..., Tensor]:
    cross = cast(CrossAttention, encoder.cross_attn_layers[-1])
    query, key = (_packed_norm(cross.q_norm), packed(cross.q_proj)), (_packed_norm(cross.k_norm), packed(cross.k_proj))
    projection, value, out = (packed(one) for one in (encoder.patch_embedding_projection, cross.v_proj, cross.o_proj))
    weights = PackedPooling(projection, query, key, value, out, cross.head_dim)
    plain = partial(LocalEncoder.pool_stored, encoder)

    def pool_stored(patches: StoredPatches, *, tiled: bool = False) -> Tensor:
        return pool(weights, patches) if patches.states.native else plain(patches, tiled=tiled)

    return pool_stored


def _readers(decoder: LocalDecoder, packed: Pack) -> Callable[..., None]:
    crosses = [cast(CrossAttention, cross) for cross in decoder.cross_attn_layers]
    layers = [(_packed_norm(cross.k_norm), packed(cross.k_proj), packed(cross.v_proj)) for cross in crosses]
    weights = PackedReaders(packed(decoder.patch_embedding_projection), decoder.norm.weight.shape[0], layers)
    plain = partial(LocalDecoder.store_latents, decoder)

    def store(latents: Tensor, store: Tensor, slots: Tensor) -> None:
        if store.dtype == torch.float32 and store.device.type == "cpu" and not use_triton(store.device):
            store_latents(weights, latents, store, slots)
        else:
            plain(latents, store, slots)

    return store


def _pack_stack(stack: Stack, crosses: Sequence[CrossAttention], packed: Pack) -> PackedStack:
    layers = [cast(Layer, layer) for layer in stack]
    before = [*crosses[: len(layers)], *[None] * (len(layers) - len(crosses))]
    weights = [_layer(layer, cross, packed) for layer, cross in zip(layers, before, strict=True)]
    return PackedStack(weights, layers[0].self_attn.head_dim)


def _stack(stack: Stack, whole: PackedStack) -> Callable[..., Tensor]:
    plain = partial(Stack.forward, stack)

    def forward(
        x: Tensor, attend: SelfAttend, also: Sequence[CrossAttention] = (), cross_attend: CrossAttend | None = None
    ) -> Tensor:
        if not fits(attend, cross_attend):
            return plain(x, attend, also, cross_attend)
        return run(whole, x, cast(PagedAttention, attend), cast(StoredLatents | None, cross_attend))

    return forward


def _entropies(patcher: Patcher, whole: PackedStack, source: Source, sink: Sink) -> Callable[..., Tensor]:
    plain = partial(Patcher.stored_entropies, patcher)

    def stored_entropies(ids: RequestIds, attend: PagedAttention) -> Tensor:
        if not fits(attend):
            return plain(ids, attend)
        return run_stored(whole, replace(source, ids=ids), sink, attend)

    return stored_entropies


def _encode(model: Blt, whole: PackedStack, source: Source) -> Callable[..., Tensor]:
    plain = partial(Blt.encode_stored, model)

    def encode_stored(ids: RequestIds, states: PagedRows, attend: PagedAttention) -> Tensor:
        if not fits(attend) or not states.native:
            return plain(ids, states, attend)
        return run_stored(whole, replace(source, ids=ids), Sink(states=states), attend)

    return encode_stored


def _decode(decoder: LocalDecoder, whole: PackedStack, source: Source, sink: Sink) -> Callable[..., Tensor]:
    plain, table = partial(LocalDecoder.stored_states, decoder), source.table

    def stored_states(
        known: PagedRows | RequestIds,
        block: Tensor | None,
        attend: PagedAttention,
        latents: StoredLatents,
        read: Tensor | None = None,
    ) -> Tensor:
        if not fits(attend, latents) or (isinstance(known, PagedRows) and not known.native):
            return plain(known, block, attend, latents, read)
        if isinstance(known, PagedRows):
            begin = Source(states=known, block=block, block_table=table)
        else:
            begin = Source(ids=known, table=table, block=block, block_table=table)
        return run_stored(whole, begin, replace(sink, read=read), attend, latents)

    return stored_states


def _layer(layer: Layer, cross: CrossAttention | None, packed: Pack) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    before = None
    if cross is not None:
        before = CrossWeights(_packed_norm(cross.q_norm), packed(cross.q_proj), packed(cross.o_proj))
    return LayerWeights(
        norm=_packed_norm(layer.input_layernorm),
        queries=packed(attention.q_proj),
        keys=packed(attention.k_proj),
        values=packed(attention.v_proj),
        out=packed(attention.o_proj),
        inner_norm=_packed_norm(layer.post_attention_layernorm),
        gate=packed(mlp.gate_proj),
        up=packed(mlp.up_proj),
        down=packed(mlp.down_proj),
        cross=before,
    )


def _packed_norm(norm: RMSNorm) -> Norm:
    return pack_norm(norm.weight, norm.eps)


def _cross_attention(cross: CrossAttention, packed: Pack) -> Callable[..., Tensor]:
    norm = _packed_norm(cross.q_norm)
    queries, out = (packed(cross.q_proj),), packed(cross.o_proj)
    dim = cross.head_dim

    def forward(x: Tensor, attend: CrossAttend, index: int) -> Tensor:
        (q,) = project(x, norm, queries)
        attended = attend(index, q.view(x.shape[0], -1, dim))
        return project_add(attended.reshape(x.shape[0], -1), out, x, times=2)

    return forward


def _keys_values(cross: CrossAttention, packed: Pack) -> Callable[..., tuple[Tensor, Tensor]]:
    norm = _packed_norm(cross.k_norm)
    maps = (packed(cross.k_proj), packed(cross.v_proj))
    dim = cross.head_dim

    def keys_values(source: Tensor) -> tuple[Tensor, Tensor]:
        k, v = project(source, norm, maps)
        return k.view(source.shape[0], -1, dim), v.view(source.shape[0], -1, dim)

    return keys_values


def _norm(module: RMSNorm) -> Callable[..., Tensor]:
    norm = _packed_norm(module)
    return lambda x: rms_norm(x, norm)


def _linear(module: nn.Linear, packed: Pack) -> Callable[..., Tensor]:
    maps: tuple[Packed, ...] = (packed(module),)
    return lambda x: project(x, None, maps)[0]
