"""Has a model's modules run on a GPU in few launches, for serving.

A launch costs a small pass more than its arithmetic. So maps of one input are one product (queries, keys and values;
gate and up; the keys and values of a latent for all layers), and what stands between two products is one kernel of
`kernels/gpu/`: sums with norms, SwiGLU, rotation with the cache's writing, either attention. Products are the
library's, or `kernels/gpu/linear.py` where a row's bits may not depend on how many rows there are.

torch.compile would fuse the same sums and norms, but it compiles every module anew for each number of rows, for minutes
in all, and cannot look into attention over pages. These kernels compile once each, within seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastblt.kernels.cpu.upstream import StoredPatches
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.models.blt import Blt, LocalDecoder, LocalEncoder, Patcher
from fastblt.models.layers import CrossAttend, CrossAttention, Layer, RMSNorm, SelfAttend, Stack

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Norm:
    gain: Tensor
    eps: float

    @classmethod
    def of(cls, norm: RMSNorm) -> _Norm:
        return cls(norm.weight, norm.eps)


@dataclass(frozen=True)
class _Cross:
    norm: _Norm
    queries: Tensor
    out: Tensor
    dim: int


@dataclass(frozen=True)
class _Merged:
    """A layer's weights: `inputs` are queries, keys and values in a row, `gate_up` gate and up."""

    norm: _Norm
    inputs: Tensor
    heads: int
    kv_heads: int
    dim: int
    out: Tensor
    inner_norm: _Norm
    gate_up: Tensor
    down: Tensor
    cross: _Cross | None


def _joined(*maps: nn.Module) -> Tensor:
    """The weights of maps of one input, in a row; those of the maps become parts of them, so nothing is held twice."""
    linears = [cast(nn.Linear, one) for one in maps]
    whole = torch.cat([one.weight.detach() for one in linears])
    first = 0
    for one in linears:
        one.weight = nn.Parameter(whole[first : first + one.out_features], requires_grad=False)
        first += one.out_features
    return whole


def _merged(layer: Layer, cross: CrossAttention | None) -> _Merged:
    own, mlp = layer.self_attn, layer.mlp
    dim = own.head_dim
    before = None
    if cross is not None:
        before = _Cross(_Norm.of(cross.q_norm), cross.q_proj.weight, cross.o_proj.weight, cross.head_dim)
    return _Merged(
        norm=_Norm.of(layer.input_layernorm),
        inputs=_joined(own.q_proj, own.k_proj, own.v_proj),
        heads=own.q_proj.out_features // dim,
        kv_heads=own.k_proj.out_features // dim,
        dim=dim,
        out=own.o_proj.weight,
        inner_norm=_Norm.of(layer.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight,
        cross=before,
    )


class _Layers:
    """The layers of a stack."""

    def __init__(self, stack: Stack, crosses: Sequence[CrossAttention], product: Product) -> None:
        layers = [cast(Layer, layer) for layer in stack]
        before = [*crosses[: len(layers)], *[None] * (len(layers) - len(crosses))]
        self._layers = [_merged(layer, cross) for layer, cross in zip(layers, before, strict=True)]
        self._product = product

    def __call__(self, x: Tensor, attend: SelfAttend, cross_attend: CrossAttend | None = None) -> tuple[Tensor, Tensor]:
        """Rows [N, d] before the last sum, and what is to be added to them."""
        from fastblt.kernels.gpu.layers import add_norm, swiglu

        product, count, times = self._product, len(x), 1
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            if layer.cross is not None:
                assert cross_attend is not None
                cross = layer.cross
                x, normed = add_norm(x, delta, cross.norm.gain, cross.norm.eps, times=times)
                queries = product(normed, cross.queries).view(count, -1, cross.dim)
                # The published network adds its input twice (`CrossAttention.forward`).
                delta, times = product(cross_attend(index, queries).view(count, -1), cross.out), 2
            x, normed = add_norm(x, delta, layer.norm.gain, layer.norm.eps, times=times)
            rows = product(normed, layer.inputs).view(count, -1, layer.dim)
            q, k, v = rows.split((layer.heads, layer.kv_heads, layer.kv_heads), 1)
            delta = product(attend(index, q, k, v).view(count, -1), layer.out)
            x, normed = add_norm(x, delta, layer.inner_norm.gain, layer.inner_norm.eps)
            delta, times = product(swiglu(product(normed, layer.gate_up)), layer.down), 1
        assert delta is not None
        return x, delta


def merge(model: Blt, *, invariant: bool) -> None:
    """Let a frozen model run merged under `torch.inference_mode`, where Triton's kernels run.

    `invariant`: a row's bits depend on no other row. Layers that are split over ranks stay as they are. Where the model
    is asked for gradients, or over rows of more than one leading dimension, it runs as before.
    """
    product: Product = F.linear
    if invariant:
        from fastblt.kernels.gpu.linear import linear

        product = linear
    if any("_merged" in vars(module) for module in model.modules()):
        return
    if invariant:
        # What no stack has: the head, and the projection of patches where there is one.
        for single in (model.lm_head, getattr(model.global_transformer, "token_embedding_projection", None)):
            if isinstance(single, nn.Linear):
                _replace(single, "forward", partial(_product_of, single, product))
    for module in list(model.modules()):
        layers = getattr(module, "layers", None)
        if not isinstance(layers, Stack) or not _whole(layers):
            continue
        crosses = module.cross_attn_layers if isinstance(module, LocalDecoder) else ()
        whole = _Layers(layers, cast(Sequence[CrossAttention], crosses), product)
        vars(module)["_merged"] = True
        _replace(layers, "forward", partial(_forward, whole))
        if isinstance(module, Patcher):
            _replace(module, "stored_entropies", partial(_entropies, module, whole, product))
        elif isinstance(module, LocalEncoder):
            _replace(model, "encode_stored", partial(_encode, model, whole))
            _replace(module, "pool_stored", _pooling(module, product))
        elif isinstance(module, LocalDecoder):
            _replace(module, "stored_states", partial(_states, module, whole))
            _replace(module, "store_latents", _storing(module, product))


def _replace(module: nn.Module, name: str, merged: Callable[..., Any]) -> None:
    """Have `merged` take the place of a method, but for gradients and for rows of several leading dimensions."""
    plain = getattr(module, name)

    def choose(*args: Any, **kwargs: Any) -> Any:
        several = isinstance(args[0], Tensor) and args[0].dim() != 2
        return plain(*args, **kwargs) if several or torch.is_grad_enabled() else merged(*args, **kwargs)

    setattr(module, name, choose)


def _whole(stack: Stack) -> bool:
    """Whether the layers are on one rank."""
    layers = [cast(Layer, layer) for layer in stack]
    maps = [one for layer in layers for one in (*layer.self_attn.children(), *layer.mlp.children())]
    return all(isinstance(one, nn.Linear) for one in maps)


def _product_of(module: nn.Linear, product: Product, x: Tensor) -> Tensor:
    return product(x, module.weight)


def _forward(whole: _Layers, x: Tensor, attend: SelfAttend, *crosses: Any) -> Tensor:
    from fastblt.kernels.gpu.layers import add_norm

    x, delta = whole(x, attend, crosses[1] if len(crosses) > 1 else None)
    return add_norm(x, delta, None, 0.0)[0]


def _entropies(patcher: Patcher, whole: _Layers, product: Product, ids: RequestIds, attend: PagedAttention) -> Tensor:
    from fastblt.kernels.gpu.layers import add_norm, entropies
    from fastblt.kernels.gpu.rows import looked_up_rows

    x = looked_up_rows(patcher.embed_tokens.weight, ids, attend.at.rows, attend.at.positions)
    _, normed = add_norm(*whole(x, attend), patcher.norm.weight, patcher.norm.eps)
    return entropies(product(normed, patcher.lm_head.weight))


def _encode(model: Blt, whole: _Layers, ids: RequestIds, states: PagedRows, attend: PagedAttention) -> Tensor:
    from fastblt.kernels.gpu.hash_embedding import hash_embedding_of_ids
    from fastblt.kernels.gpu.rows import finish_rows

    owners, positions = attend.at.rows, attend.at.positions
    tables = model.local_encoder.embed_tokens.weight, model.encoder_hash_tok_embedding.weight
    x = hash_embedding_of_ids(ids, owners, positions, model._hash_powers, model.config.hash_group_vocab, *tables)
    return finish_rows(*whole(x, attend), states, owners, positions)


def _states(
    decoder: LocalDecoder,
    whole: _Layers,
    known: PagedRows | RequestIds,
    block: Tensor | None,
    attend: PagedAttention,
    latents: StoredLatents,
    read: Tensor | None = None,
) -> Tensor:
    from fastblt.kernels.gpu.layers import add_norm
    from fastblt.kernels.gpu.rows import looked_up_rows, stored_rows

    owners, positions = attend.at.rows, attend.at.positions
    if isinstance(known, PagedRows):
        table = None if block is None else decoder.embed_tokens.weight
        x = stored_rows(known, owners, positions, block, table)
    else:
        x = looked_up_rows(decoder.embed_tokens.weight, known, owners, positions, block)
    return add_norm(*whole(x, attend, latents), decoder.norm.weight, decoder.norm.eps)[1]


def _pooling(encoder: LocalEncoder, product: Product) -> Callable[..., Tensor]:
    cross = cast(CrossAttention, encoder.cross_attn_layers[-1])
    both = _joined(cross.k_proj, cross.v_proj)
    kv_heads = cross.k_proj.out_features // cross.head_dim

    def pool_stored(patches: StoredPatches, *, tiled: bool = False) -> Tensor:
        from fastblt.kernels.gpu.layers import add_norm
        from fastblt.kernels.gpu.pooling import peaks, pool
        from fastblt.kernels.gpu.rows import stored_rows

        rows = patches.rows
        assert rows is not None, "patches are pooled by their bytes"
        states = stored_rows(patches.states, rows.owners, rows.positions)
        queries = product(peaks(states, rows.firsts, rows.counts), encoder.patch_embedding_projection.weight)
        queries = queries.view(-1, states.shape[1])
        _, normed = add_norm(queries, None, cross.q_norm.weight, cross.q_norm.eps)
        q = product(normed, cross.q_proj.weight).view(len(queries), -1, cross.head_dim)
        _, normed = add_norm(states, None, cross.k_norm.weight, cross.k_norm.eps)
        mixed = pool(q, product(normed, both), rows.firsts, rows.counts, kv_heads)
        delta = product(mixed.view(len(queries), -1), cross.o_proj.weight)
        return add_norm(queries, delta, None, 0.0, times=2)[0].view(len(patches.owners), -1)

    return pool_stored


def _storing(decoder: LocalDecoder, product: Product) -> Callable[..., None]:
    crosses = [cast(CrossAttention, cross) for cross in decoder.cross_attn_layers]
    gains = torch.stack([cross.k_norm.weight.detach() for cross in crosses])
    eps = crosses[0].k_norm.eps
    # [C, 2 Hkv D, d]: the keys' and values' maps of all cross-attentions.
    both = torch.stack([_joined(cross.k_proj, cross.v_proj) for cross in crosses])
    for cross, own in zip(crosses, both, strict=True):
        half = len(own) // 2
        cross.k_proj.weight, cross.v_proj.weight = (
            nn.Parameter(part, requires_grad=False) for part in (own[:half], own[half:])
        )

    def store(latents: Tensor, store: Tensor, slots: Tensor) -> None:
        from fastblt.kernels.gpu.latent_attention import store_latents
        from fastblt.kernels.gpu.layers import norm_many

        source = product(latents, decoder.patch_embedding_projection.weight).view(-1, both.shape[2])
        normed = norm_many(source, gains, eps)
        if product is F.linear:
            made = torch.bmm(normed, both.transpose(1, 2))
        else:
            made = torch.stack([product(rows, own) for rows, own in zip(normed, both, strict=True)])
        store_latents(made, store, slots)

    return store
