"""What `fastblt.benchmarks.kernels.run` counts and times: one call of each operation, fused and in torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastblt.kernels.attention import TILE
from fastblt.kernels.hash_embedding import hash_embedding_torch
from fastblt.kernels.paged_attention import paged_attention, paged_attention_torch
from fastblt.kernels.selection import select, select_torch
from fastblt.kernels.types import RaggedRows, SelectionParams
from fastblt.kernels.unmasking import ENTROPY, pick_torch, unmask_torch
from fastblt.kernels.verification import verify_torch
from fastblt.models.blt import LatentRows
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.layers import Rope
from fastblt.server.settings import PRETRAINED

#: (name, sampled, everything) of the timed selections.
KINDS = (("greedy", False, False), ("sampled", True, False), ("top-p", True, True), ("everything", True, True))


@dataclass
class Case:
    """`fused` returns the tensors it made; `arguments` are those it was given."""

    name: str
    fused: Callable[[], list[Tensor]]
    unfused: Callable[[], Any]
    arguments: list[Tensor]


def tensors(value: Any) -> list[Tensor]:
    """The tensors in the fields of a dataclass."""
    return [item for item in vars(value).values() if isinstance(item, Tensor)]


def parameters(rows: int, generator: torch.Generator, *, sampled: bool, everything: bool) -> SelectionParams:
    """Greedy or sampled rows, without truncation and penalties or with all of them."""
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
    """Rows of (request, first position, count) that see [low of their span, their position]."""
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
    """Small calls, on torch's default device: the interpreter takes milliseconds a program."""
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
            lambda logits=logits, params=params: tensors(select_triton(logits, params, need_statistics=True)),
            lambda logits=logits, params=params: select_torch(logits, params, need_statistics=True),
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
            lambda given=given: tensors(unmask_triton(*given)),
            lambda given=given: unfused(*given),
            [blocks, masked, ids, *control, *tensors(params)],
        )
    drafts = torch.randint(4, 260, (32, 16), generator=g)
    targets = torch.cat((drafts, drafts[:, :1]), 1)
    lengths = torch.randint(0, 17, (32,), generator=g)
    yield Case(
        "verify, 32 x 16",
        lambda: list(verify_triton(targets, drafts, lengths)),
        lambda: verify_torch(targets, drafts, lengths),
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
            lambda passed=passed: [paged_attention_triton(*passed)],
            lambda passed=passed: paged_attention_torch(*passed),
            [q, k, v, turns, store, *tensors(at)],
        )
    windows, powers = torch.randint(0, 260, (8, 8), generator=g), torch.randint(1, 2**62, (6, 8), generator=g)
    offsets, bytes_, hashes = torch.arange(6) * 1000, torch.randn(260, 256), torch.randn(6000, 256)
    yield Case(
        "hash embedding, 8 rows",
        lambda: [hash_embedding_triton(windows, powers, 1000, bytes_, hashes)],
        lambda: hash_embedding_torch(windows, powers, offsets, 1000, bytes_, hashes),
        [windows, powers, bytes_, hashes],
    )


def fastest(call: Callable[[], Any], rounds: int = 20) -> float:
    """Least seconds of one call."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclass
class Share:
    """What one operation of the CPU path takes, in seconds: `plain` with selection in torch, `whole` a decoder pass."""

    name: str
    spent: float
    plain: float
    whole: float


@torch.inference_mode()
def cpu_shares(batch: int, size: int, context: int = 300) -> Iterator[Share]:
    """Unmasking and verification beside a decoder pass of the shipped model."""
    torch.set_num_threads(1)
    model = load_checkpoint(str(PRETRAINED))
    config, stack, g = model.config, model.config.decoder, torch.Generator().manual_seed(0)
    pages = -(-(context + size) // TILE)
    low = 0 if stack.window is None else max(0, context - stack.window + 1)
    turns = Rope(stack.head_dim, stack.rope_theta).table(pages * TILE)
    shape = (batch * pages * TILE, 2, stack.num_kv_heads, stack.head_dim)
    stores = [torch.randn(shape, generator=g) for _ in range(stack.num_layers)]
    kv = model.local_decoder.latent_keys_values(torch.randn(1, config.global_.hidden_size, generator=g))

    def decode(rows: int) -> float:
        at = ragged([(r, context, rows) for r in range(batch)], [low] * batch, TILE, pages, batch)
        x = torch.randn(batch * rows, stack.hidden_size, generator=g)
        latents = LatentRows(kv.expand(batch * rows, *kv.shape[1:]))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return paged_attention(q, k, v, turns, stores[layer], at)

        return fastest(lambda: model.lm_head(model.local_decoder(x, attend, latents)), 12)

    block, clean = decode(size), decode(size + 1)
    logits = torch.randn(batch, size, 260, generator=g)
    masked, ids = torch.ones(batch, size, dtype=torch.bool), torch.zeros(batch, size, dtype=torch.int64)
    control = (torch.full((batch,), ENTROPY), torch.full((batch,), 4.0), torch.zeros(batch, dtype=torch.bool))
    drafts = torch.randint(4, 260, (batch, size), generator=g)
    targets, lengths = torch.cat((drafts, drafts[:, :1]), 1), torch.full((batch,), size)
    rows, clean_rows = logits.view(-1, 260), torch.randn(batch * (size + 1), 260, generator=g)

    def chosen(choose: Callable[..., Any], rows: Tensor, params: SelectionParams, statistics: bool) -> float:
        return fastest(lambda: choose(rows, params, need_statistics=statistics))

    for name, sampled, everything in KINDS:
        params = parameters(len(rows), g, sampled=sampled, everything=everything)
        later = parameters(len(clean_rows), g, sampled=sampled, everything=everything)
        if name == "top-p":
            # Alone: without top-k before it, it has all ids to go through.
            params, later = (replace(p, top_k=torch.zeros_like(p.top_k), penalized=False) for p in (params, later))
        spent = fastest(lambda params=params: unmask_torch(logits, masked, ids, params, *control))
        gained = chosen(select_torch, rows, params, True) - chosen(select, rows, params, True)
        yield Share(f"unmasking {batch} x {size}, {name}", spent, spent + gained, block)
        checked = fastest(lambda: verify_torch(targets, drafts, lengths))
        spent, plain = (checked + chosen(choose, clean_rows, later, False) for choose in (select, select_torch))
        yield Share(f"verification {batch} x {size}, {name}", spent, plain, clean)
