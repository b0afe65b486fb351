"""The cases that `fastblt.benchmarks.kernels.run` measures: a call of each operation, fused (Triton) and in torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastblt.benchmarks.kernels.case import Case, fused, tensors
from fastblt.benchmarks.kernels.module_cases import module_cases, round_cases
from fastblt.kernels.attention import TILE
from fastblt.kernels.hash_embedding import hash_embedding_torch
from fastblt.kernels.paged_attention import paged_attention_torch
from fastblt.kernels.selection import select_torch
from fastblt.kernels.types import RaggedRows, SelectionParams
from fastblt.kernels.unmasking import ENTROPY, pick_torch
from fastblt.kernels.verification import verify_torch
from fastblt.models.layers import Rope


def parameters(rows: int, generator: torch.Generator, *, sampled: bool, everything: bool) -> SelectionParams:
    """Parameters of greedy or sampled rows; with `everything`, also truncation, penalties, bias and masks."""
    base = SelectionParams(
        temperature=torch.full((rows,), 0.8 if sampled else 0.0),
        top_k=torch.full((rows,), 40),
        top_p=torch.full((rows,), 0.9),
        min_p=torch.full((rows,), 0.01),
        seeds=torch.arange(rows),
        positions=torch.arange(rows),
        forbid_eos=torch.zeros(rows, dtype=torch.bool),
        sampled=sampled,
        truncated=everything,
        penalized=everything,
    )
    if not everything:
        return base
    return replace(
        base,
        repetition=torch.full((rows,), 1.1),
        presence=torch.full((rows,), 0.1),
        frequency=torch.full((rows,), 0.1),
        counts=torch.randint(0, 3, (rows, 260), generator=generator, dtype=torch.int32),
        prompt_seen=torch.rand(rows, 260, generator=generator) < 0.2,
        bias=torch.zeros(rows, 260),
        allowed=torch.rand(rows, 260, generator=generator) < 0.9,
    )


def ragged(spans: list[tuple[int, int, int]], lows: list[int], page: int, pages: int, requests: int) -> RaggedRows:
    """Rows of spans (request, first position, count). A row at p sees positions [the span's low, p]."""
    rows = [request for request, _, count in spans for _ in range(count)]
    positions = [first + i for _, first, count in spans for i in range(count)]
    low = [low for low, (*_, count) in zip(lows, spans, strict=True) for _ in range(count)]
    firsts = [sum(count for *_, count in spans[:i]) for i in range(len(spans))]
    return RaggedRows(
        table=torch.arange(requests * pages, dtype=torch.int32).view(requests, pages),
        rows=torch.tensor(rows, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        firsts=torch.tensor(low, dtype=torch.int32),
        highs=torch.tensor(positions, dtype=torch.int32) + 1,
        spans=[(first, count) for first, (*_, count) in zip(firsts, spans, strict=True)],
        length=page * pages,
        page_size=page,
        window=1,
    )


def unfused(
    logits: Tensor, masked: Tensor, ids: Tensor, params: SelectionParams, rule: Tensor, bound: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of unmasking in torch's operations alone, selection included: (ids, what is still masked)."""
    chosen = select_torch(logits.view(-1, 260), params, need_statistics=True)
    assert chosen.confidence is not None and chosen.entropy is not None
    statistics = (chosen.confidence.view(masked.shape), chosen.entropy.view(masked.shape))
    picked = pick_torch(*statistics, masked, rule, bound, last)
    return torch.where(picked, chosen.ids.view(masked.shape), ids), masked & ~picked


def cases() -> Iterator[Case]:
    """The cases, on torch's default device. They are small: Triton's interpreter takes milliseconds a program."""
    from fastblt.kernels.gpu.hash_embedding import hash_embedding_triton
    from fastblt.kernels.gpu.paged_attention import paged_attention_triton
    from fastblt.kernels.gpu.selection import select_triton
    from fastblt.kernels.gpu.unmasking import unmask_triton
    from fastblt.kernels.gpu.verification import verify_triton

    device = torch.get_default_device()
    g = torch.Generator(device).manual_seed(0)
    for name, everything in (("greedy", False), ("everything", True)):
        logits, params = torch.randn(8, 260, generator=g), parameters(8, g, sampled=everything, everything=everything)
        yield Case(
            f"select, 8 rows, {name}",
            fused(select_triton, logits, params, need_statistics=True),
            partial(select_torch, logits, params, need_statistics=True),
            [logits, *tensors(params)],
        )
        blocks, params = (
            torch.randn(2, 8, 260, generator=g),
            parameters(16, g, sampled=everything, everything=everything),
        )
        masked, ids = torch.rand(2, 8, generator=g) < 0.6, torch.zeros(2, 8, dtype=torch.int64)
        control = (torch.full((2,), ENTROPY), torch.full((2,), 8.0), torch.zeros(2, dtype=torch.bool))
        given = (blocks, masked, ids, params, *control)
        yield Case(
            f"select and unmask, 2 x 8, {name}",
            fused(unmask_triton, *given),
            partial(unfused, *given),
            [blocks, masked, ids, *control, *tensors(params)],
        )
    drafts = torch.randint(4, 260, (32, 16), generator=g)
    targets = torch.cat((drafts, drafts[:, :1]), 1)
    lengths = torch.randint(0, 17, (32,), generator=g)
    yield Case(
        "verify, 32 x 16",
        fused(verify_triton, targets, drafts, lengths),
        partial(verify_torch, targets, drafts, lengths),
        [targets, drafts, lengths],
    )
    turns = Rope(32, 10000.0).table(512).to(device)
    for name, spans, lows in (
        ("4 single rows, 200 keys", [(r, 200, 1) for r in range(4)], [0] * 4),
        ("8 rows of one, window 128", [(0, 200, 8)], [80]),
    ):
        at = ragged(spans, lows, TILE, 8, 4)
        n, store = len(at.rows), torch.randn(4 * 8 * TILE, 2, 2, 32, generator=g)
        q, k, v = (torch.randn(n, heads, 32, generator=g) for heads in (4, 2, 2))
        passed = (q, k, v, turns, store, at)
        yield Case(
            f"attend, {name}",
            fused(paged_attention_triton, *passed),
            partial(paged_attention_torch, *passed),
            [q, k, v, turns, store, *tensors(at)],
        )
    # All of a long text, in parts that are merged.
    at = replace(ragged([(0, 700, 1)], [0], TILE, 1024 // TILE, 1), window=None)
    q, k, v = (torch.randn(1, heads, 32, generator=g) for heads in (4, 2, 2))
    long = (q, k, v, Rope(32, 10000.0).table(1024).to(device), torch.randn(1024, 2, 2, 32, generator=g), at)
    yield Case(
        "attend, 1 row, 700 keys in parts",
        fused(paged_attention_triton, *long),
        partial(paged_attention_torch, *long),
        [*long[:5], *tensors(at)],
    )
    windows, powers = torch.randint(0, 260, (8, 8), generator=g), torch.randint(1, 2**62, (6, 8), generator=g)
    offsets, bytes_, hashes = torch.arange(6) * 1000, torch.randn(260, 256), torch.randn(6000, 256)
    yield Case(
        "hash embedding, 8 rows",
        fused(hash_embedding_triton, windows, powers, 1000, bytes_, hashes),
        partial(hash_embedding_torch, windows, powers, offsets, 1000, bytes_, hashes),
        [windows, powers, bytes_, hashes],
    )
    yield from module_cases()
    yield from round_cases()
