"""The cases of what stands between the products of a module, and between the passes of a round (`cases.py`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastblt.benchmarks.kernels.case import Case, fused, tensors
from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.filtering import Filtering, next_rows_torch, turn_torch
from fastblt.kernels.latent_attention import stored_latent_attention_torch
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.rounds import Chosen, Stepping, place_torch, settle_torch
from fastblt.kernels.row_draws import row_draws_torch
from fastblt.models.layers import RMSNorm
from fastblt.models.patching import entropies as entropies_torch
from fastblt.models.vocabulary import MASK_ID, VOCAB_SIZE

#: Programs that read the same bytes run at once, one for each layer or query: all but the first find them in the cache.
_AGAIN = 2.2

#: Rows of a pass, their width, and requests.
_ROWS, _WIDTH, _REQUESTS = 8, 128, 4


def module_cases() -> Iterator[Case]:
    """What stands between the products of a module."""
    from fastblt.kernels.gpu.latent_attention import store_latents, stored_latent_attention_triton
    from fastblt.kernels.gpu.layers import add_norm, entropies, norm_many, swiglu
    from fastblt.kernels.gpu.linear import linear
    from fastblt.kernels.gpu.pooling import peaks, pool
    from fastblt.kernels.gpu.rows import finish_rows, looked_up_rows, stored_rows

    g = torch.Generator(torch.get_default_device()).manual_seed(1)
    draw = partial(torch.randn, generator=g)
    x, delta, gains = draw(_ROWS, _WIDTH), draw(_ROWS, _WIDTH), draw(3, _WIDTH)
    norm = RMSNorm(_WIDTH, 1e-5).requires_grad_(False)

    def normed(total: Tensor, gain: Tensor) -> Tensor:
        norm.weight.copy_(gain)
        return norm(total)

    given: list[Tensor] = [x, delta, gains]
    both = draw(_ROWS, 2 * _WIDTH)
    yield Case(
        "sum and norm, 8 rows", fused(add_norm, x, delta, gains[0], 1e-5), lambda: normed(x + delta, gains[0]), given
    )
    yield Case(
        "norms of 3 layers, 8 rows",
        fused(norm_many, x, gains, 1e-5),
        lambda: [normed(x, gain) for gain in gains],
        given,
        _AGAIN,
    )
    yield Case("swiglu, 8 rows", fused(swiglu, both), lambda: F.silu(both[:, :_WIDTH]) * both[:, _WIDTH:], [both])
    logits = draw(_ROWS, VOCAB_SIZE)
    yield Case("entropies, 8 rows", fused(entropies, logits), partial(entropies_torch, logits), [logits])
    weight = draw(4 * _WIDTH, _WIDTH)
    yield Case("product, 8 rows", fused(linear, x, weight), partial(F.linear, x, weight), [x, weight])

    owners, positions = _ints(g, 0, _REQUESTS, _ROWS), torch.randperm(_ROWS, generator=g).int()
    pages = torch.arange(_REQUESTS * 4, dtype=torch.int32).view(_REQUESTS, 4)
    states, ids = PagedRows(draw(16 * 16, _WIDTH), pages, 16), RequestIds(_longs(g, 0, 260, _REQUESTS, 64), 3)
    table, at = draw(260, _WIDTH), [owners, positions]
    yield Case(
        "rows of stored states", fused(stored_rows, states, *at), lambda: states.read(*at), [states.store, pages, *at]
    )
    yield Case(
        "rows of ids", fused(looked_up_rows, table, ids, *at), lambda: table[ids.read(*at)], [table, ids.ids, *at]
    )
    yield Case(
        "sum and store, 8 rows",
        fused(finish_rows, x, delta, states, *at),
        lambda: states.write(owners, positions, x + delta),
        [x, delta, states.store, pages, *at],
    )
    latents, slots = draw(_ROWS, 3, 2, 2, 4, 32), torch.randperm(_ROWS, generator=g).int()
    q = draw(_ROWS, 4, 32)
    yield Case(
        "attend to latents, 8 rows",
        fused(stored_latent_attention_triton, q, latents, 1, slots),
        partial(stored_latent_attention_torch, q, latents, 1, slots),
        [q, latents, slots],
    )
    made, to = draw(3, 3 * 2, 2 * 4 * 32), torch.tensor([4, 1, 2], dtype=torch.int32)

    def stored() -> None:
        kept = made.view(3, 3, 2, 2, 4, 32).permute(1, 0, 3, 2, 4, 5)
        latents.index_copy_(0, to.long(), kept.contiguous())

    yield Case("store 3 latents", fused(store_latents, made, latents, to), stored, [made, latents, to])
    counts = torch.tensor([3, 5, 4], dtype=torch.int32)
    firsts = (counts.cumsum(0) - counts).int()
    bytes_, keys, queries = draw(12, _WIDTH), draw(12, 2 * 4 * 32), draw(3 * 2, 4, 32)
    patches = [firsts, counts]
    lengths = counts.tolist()
    yield Case(
        "maxima of 3 patches",
        fused(peaks, bytes_, *patches),
        lambda: [part.amax(0) for part in bytes_.split(lengths)],
        [bytes_, *patches],
    )

    def pooled() -> list[Tensor]:
        lines = zip(queries.view(3, 2, 4, 32), keys.view(-1, 2, 4, 32).split(lengths), strict=True)
        return [
            F.scaled_dot_product_attention(own.transpose(0, 1), *kv.permute(1, 2, 0, 3).unbind()) for own, kv in lines
        ]

    yield Case("pool 3 patches", fused(pool, queries, keys, *patches, 4), pooled, [queries, keys, *patches], _AGAIN)


def round_cases() -> Iterator[Case]:
    """What stands between the passes of a round. All of it is in place, so each side has its own requests."""
    from fastblt.kernels.gpu.filtering import next_rows_triton, turn_triton
    from fastblt.kernels.gpu.rounds import place_triton, settle_triton
    from fastblt.kernels.gpu.row_draws import row_draws_triton

    g = torch.Generator(torch.get_default_device()).manual_seed(2)
    width, block = 1 + 8, 8
    these = _stepping(g, block)
    rows, size = torch.zeros(6, 64, dtype=torch.int32), width * _REQUESTS
    places = (width, these.owners, these.starts, these.causals, these.sizes, these.latents, these.blocks)
    given = [rows, *tensors(these)]
    yield Case("rows of 4 requests", fused(place_triton, rows, *places), partial(place_torch, rows, *places), given)
    draws = Draws(torch.rand(3, _REQUESTS, generator=g), _longs(g, 0, 99, 2, _REQUESTS), _longs(g, 0, 9, _REQUESTS))
    yield Case(
        "how 64 rows are drawn",
        fused(row_draws_triton, draws, rows),
        partial(row_draws_torch, draws, rows),
        [rows, *tensors(draws)],
    )
    texts, first = RequestIds(_longs(g, 4, 260, _REQUESTS, 64), 3), torch.arange(_REQUESTS, dtype=torch.int32) * width
    chosen = Chosen(
        _longs(g, 4, 260, size), torch.rand(size, generator=g), torch.rand(size, generator=g),
        torch.zeros(size, dtype=torch.uint8),
    )  # fmt: skip
    pair = these, copy.deepcopy(these)
    given = [texts.ids, first, *tensors(chosen), *tensors(these)]
    settling: list[Any] = [(chosen, first, own, texts, 1, MASK_ID) for own in pair]
    yield Case("settle 4 blocks", fused(settle_triton, *settling[0]), partial(settle_torch, *settling[1]), given)
    drafts = Filtering(
        starts=_ints(g, 1, 20, _REQUESTS), wanted=_ints(g, 20, 32, _REQUESTS), longest=_ints(g, 8, 9, _REQUESTS),
        done=_ints(g, 0, 9, _REQUESTS), steps=_ints(g, 0, 9, _REQUESTS), bad=torch.zeros(_REQUESTS, dtype=torch.int32),
        origins=torch.zeros(_REQUESTS, 32, dtype=torch.int32), block=_stepping(g, block), filter=_stepping(g, block),
    )  # fmt: skip
    other = copy.deepcopy(drafts)
    given = [*tensors(drafts), *tensors(drafts.block), *tensors(drafts.filter)]
    yield Case("next inner round of 4", fused(turn_triton, drafts, MASK_ID), partial(turn_torch, other, MASK_ID), given)
    single, ends, done = _stepping(g, 1), _ints(g, 4, 9, _REQUESTS), torch.zeros(_REQUESTS, dtype=torch.int32)
    singles = (single, single.latents, ends, done)
    yield Case(
        "next rows of 4",
        fused(next_rows_triton, *singles),
        partial(next_rows_torch, *copy.deepcopy(singles)),
        [ends, done, *tensors(single)],
    )


def _stepping(g: torch.Generator, block: int) -> Stepping:
    """Requests with a causal row and a block of masks each."""
    one = torch.ones(_REQUESTS, dtype=torch.int32)
    columns = {
        "owners": torch.arange(_REQUESTS, dtype=torch.int32), "starts": _ints(g, 1, 20, _REQUESTS), "causals": one,
        "selects": one, "sizes": block * one, "latents": _ints(g, 0, 9, _REQUESTS), "rules": one, "lasts": 0 * one,
        "mosts": 4 * one,
    }  # fmt: skip
    blocks = torch.full((_REQUESTS, block), MASK_ID, dtype=torch.int32)
    return Stepping.of(columns, torch.rand(_REQUESTS, generator=g), blocks, 1)


def _ints(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=g, dtype=torch.int32)


def _longs(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=g)
