"""Whole modules in C: against the same layers in double precision, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastblt.kernels.cpu.dense import pack, pack_norm
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.stack import CrossWeights, LayerWeights, PackedStack, Sink, Source, fits, run, run_stored
from fastblt.kernels.cpu.threads import set_threads, threads
from fastblt.kernels.latent_attention import StoredLatents
from fastblt.kernels.paged_attention import PagedAttention, has_native
from fastblt.kernels.paged_rows import PagedRows
from fastblt.kernels.types import RaggedRows
from fastblt.models.config import StackConfig
from fastblt.models.layers import CrossAttention, Layer, Rope, Stack

LENGTH, PAGE, REQUESTS = 120, 16, 24
#: Heads, key heads, their size, layers, cross-attentions.
SHAPES = [(4, 4, 8, 2, 0), (4, 2, 16, 3, 1), (2, 1, 32, 2, 2), (3, 3, 24, 1, 1)]


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    yield
    set_threads(None)


@dataclass
class World:
    """A stack, and caches in which every request has `past` rows of noise behind it."""

    stack: Stack
    crosses: list[CrossAttention]
    stores: list[Tensor]
    latents: Tensor
    at: RaggedRows
    turns: Tensor

    def attend(self, dtype: torch.dtype = torch.float32) -> PagedAttention:
        stores = [store.to(dtype, copy=True) for store in self.stores]
        return PagedAttention(stores, self.turns, self.at, native=has_native(stores[0]))


def make(
    seed: int, shape: tuple[int, int, int, int, int], spans: list[tuple[int, int, int]], block: bool = False
) -> World:
    """`spans` are (request, first position, count); with `block` a span's rows see each other both ways."""
    heads, kv_heads, dim, layers, crosses = shape
    generator = torch.Generator().manual_seed(seed)
    config = StackConfig(
        hidden_size=heads * dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=40,
        window=None,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )
    stack, cross = Stack(config), [CrossAttention(config) for _ in range(crosses)]
    with torch.no_grad():
        for module in (stack, *cross):
            for weight in module.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    pages = -(-LENGTH // PAGE)
    table = 1 + torch.randperm(REQUESTS * pages, generator=generator).view(REQUESTS, pages).int()
    # Row 0 is the null request, whose pages are page 0.
    table = torch.cat((torch.zeros(1, pages, dtype=torch.int32), table))
    store = torch.randn(layers, (REQUESTS * pages + 1) * PAGE, 2, kv_heads, dim, generator=generator)
    positions = [first + i for _, first, count in spans for i in range(count)]
    highs = [first + count if block else first + i + 1 for _, first, count in spans for i in range(count)]
    starts = [0]
    for *_, count in spans:
        starts.append(starts[-1] + count)
    at = RaggedRows(
        table=table,
        rows=torch.tensor([owner for owner, _, count in spans for _ in range(count)], dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        firsts=torch.tensor(highs, dtype=torch.int32) - 1,
        highs=torch.tensor(highs, dtype=torch.int32),
        spans=[(start, count) for start, (*_, count) in zip(starts, spans, strict=False)],
        length=LENGTH,
        page_size=PAGE,
        window=70,
    )
    latents = torch.randn(9, max(1, crosses), 2, 2, kv_heads, dim, generator=generator)
    return World(stack, cross, list(store), latents, at, Rope(dim, 10000.0).table(LENGTH))


def packed(world: World) -> PackedStack:
    def weights(layer: Layer, cross: CrossAttention | None) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        before = None
        if cross is not None:
            norm = pack_norm(cross.q_norm.weight, cross.q_norm.eps)
            before = CrossWeights(norm, pack(cross.q_proj.weight), pack(cross.o_proj.weight))
        return LayerWeights(
            pack_norm(layer.input_layernorm.weight, layer.input_layernorm.eps),
            *(pack(one.weight) for one in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)),
            pack_norm(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps),
            *(pack(one.weight) for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
            before,
        )

    layers = list(world.stack)
    before: Sequence[CrossAttention | None] = [*world.crosses, *[None] * len(layers)]
    pairs = zip(layers, before, strict=False)
    return PackedStack([weights(layer, cross) for layer, cross in pairs], layers[0].self_attn.head_dim)


def some_rows(world: World, rows: list[int]) -> World:
    """The world with these rows of its pass only."""
    at = world.at
    columns = {name: getattr(at, name)[rows] for name in ("rows", "positions", "firsts", "highs")}
    return replace(world, at=replace(at, spans=[(i, 1) for i in range(len(rows))], **columns))


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    owners = draw(st.lists(st.integers(1, REQUESTS), min_size=1, max_size=REQUESTS, unique=True))
    spans = [(owner, draw(st.integers(0, LENGTH - 10)), draw(st.integers(1, 9))) for owner in owners]
    if draw(st.booleans()):
        # A prompt, whose rows are most of the pass.
        at = draw(st.integers(0, len(spans) - 1))
        spans[at] = (spans[at][0], draw(st.integers(0, 10)), 100)
    return spans


def test_the_native_path_is_there() -> None:
    assert library() is not None


@torch.inference_mode()
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from(SHAPES), passes(), st.booleans(), st.integers(1, 5))
def test_against_the_layers(
    seed: int, shape: tuple[int, int, int, int, int], spans: list[tuple[int, int, int]], block: bool, count: int
) -> None:
    world = make(seed, shape, spans, block)
    x = torch.randn(len(world.at.rows), world.stack[0].mlp.gate_proj.in_features)
    slots = torch.randint(0, 9, (len(x),))
    latents = StoredLatents(world.latents, slots) if world.crosses else None
    attend, weights = world.attend(), packed(world)
    assert fits(attend, latents)
    set_threads(count)
    before = x.clone()
    result = run(weights, x, attend, latents)
    assert torch.equal(x, before)
    set_threads(1)
    alone = world.attend()
    assert torch.equal(run(weights, x, alone, latents), result), "threads changed a result"
    for one, other in zip(attend.stores, alone.stores, strict=True):
        assert torch.equal(one, other), "threads changed a cache"
    wide = world.attend(torch.float64)
    assert not wide.native
    theirs = None if latents is None else StoredLatents(world.latents.double(), slots)
    for module in (world.stack, *world.crosses):
        module.double()
    expected = world.stack(x.double(), wide, world.crosses, theirs)
    torch.testing.assert_close(result.double(), expected, atol=3e-4, rtol=3e-4)
    for one, other in zip(attend.stores, wide.stores, strict=True):
        torch.testing.assert_close(one.double(), other, atol=3e-4, rtol=3e-4)


@torch.inference_mode()
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from(SHAPES), passes(), st.integers(1, 5), st.floats(0, 1))
def test_rows_that_nobody_reads(
    seed: int, shape: tuple[int, int, int, int, int], spans: list[tuple[int, int, int]], count: int, share: float
) -> None:
    """They store what they store when they are read, and change nothing for the others."""
    world = make(seed, shape, spans)
    generator = torch.Generator().manual_seed(seed)
    weights, at = packed(world), world.at
    store = torch.randn((REQUESTS + 1) * -(-LENGTH // PAGE) * PAGE, weights.module.size, generator=generator)
    source = Source(states=PagedRows(store, at.table, PAGE))
    slots = torch.randint(0, 9, (len(at.rows),), generator=generator).int()
    latents = StoredLatents(world.latents, slots) if world.crosses else None
    read = torch.rand(len(at.rows), generator=generator) < share
    norm = pack_norm(torch.rand(weights.module.size, generator=generator), 1e-5)
    set_threads(count)
    all_of_them, some = world.attend(), world.attend()
    expected = run_stored(weights, source, Sink(norm=norm), all_of_them, latents)
    result = run_stored(weights, source, Sink(read=read, norm=norm), some, latents)
    assert torch.equal(result[read], expected[read])
    for one, other in zip(some.stores, all_of_them.stores, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_a_request_does_not_depend_on_the_others() -> None:
    """Bit by bit, beside 23 others in five threads, and beside nobody in one."""
    world = make(1, (4, 2, 16, 3, 1), [(owner, 80 + owner % 7, 1 + owner % 4) for owner in range(1, REQUESTS + 1)])
    weights, x = packed(world), torch.randn(len(world.at.rows), 64)
    slots = torch.randint(0, 9, (len(x),))
    set_threads(5)
    whole = run(weights, x, world.attend(), StoredLatents(world.latents, slots))
    set_threads(1)
    for first, count in world.at.spans:
        rows = list(range(first, first + count))
        own = some_rows(world, rows)
        assert torch.equal(run(weights, x[rows], own.attend(), StoredLatents(world.latents, slots[rows])), whole[rows])


@torch.inference_mode()
@pytest.mark.parametrize("before", [0, 3, 23])
def test_a_prompt_is_shared_out_too(before: int) -> None:
    """Threads wait for each other's keys and values: many times over, bit by bit."""
    spans = [(owner, 90, 1) for owner in range(1, before + 1)] + [(24, 0, 110)]
    world = make(before, (4, 2, 16, 3, 1), spans)
    weights, x, slots = packed(world), torch.randn(len(world.at.rows), 64), torch.arange(len(world.at.rows)) % 9
    set_threads(1)
    alone = run(weights, x, world.attend(), StoredLatents(world.latents, slots))
    for count in (2, 3, 7) * 20:
        set_threads(count)
        assert torch.equal(run(weights, x, world.attend(), StoredLatents(world.latents, slots)), alone)


@torch.inference_mode()
@pytest.mark.parametrize("counts", [[100] * 6, [7, 110, 40, 110, 1, 90, 110]])
def test_many_prompts_are_shared_out_layer_by_layer(counts: list[int]) -> None:
    """Bit by bit, though a request's rows go to threads that differ from layer to layer; caches too."""
    world = make(len(counts), (4, 2, 16, 3, 1), [(owner + 1, 4, count) for owner, count in enumerate(counts)])
    weights, x, slots = packed(world), torch.randn(len(world.at.rows), 64), torch.arange(len(world.at.rows)) % 9
    set_threads(1)
    attend = world.attend()
    alone = run(weights, x, attend, StoredLatents(world.latents, slots))
    for count in (2, 3, 7) * 10:
        set_threads(count)
        together = world.attend()
        assert torch.equal(run(weights, x, together, StoredLatents(world.latents, slots)), alone)
        for one, other in zip(together.stores, attend.stores, strict=True):
            assert torch.equal(one, other), "threads changed a cache"


@torch.inference_mode()
def test_poison_stays_in_its_request() -> None:
    world = make(2, (4, 4, 8, 2, 0), [(owner, 90, 2) for owner in range(1, REQUESTS + 1)])
    weights, x = packed(world), torch.randn(2 * REQUESTS, 32)
    set_threads(3)
    good = run(weights, x, world.attend())
    x[14] = float("nan")
    bad = run(weights, x, world.attend())
    others = [row for row in range(len(x)) if row not in (14, 15)]
    assert bad[14].isnan().all()
    assert bad[15].isnan().all(), "it reads the row before it"
    assert torch.equal(bad[others], good[others])


@torch.inference_mode()
def test_no_rows_and_rows_of_nobody() -> None:
    world = make(3, (2, 1, 32, 2, 2), [(0, 100, 40)])
    weights, nobody = packed(world), some_rows(world, [])
    assert run(
        weights, torch.empty(0, 64), nobody.attend(), StoredLatents(world.latents, torch.empty(0).long())
    ).shape == (
        0,
        64,
    )
    set_threads(4)
    row = torch.randn(1, 64)
    nulls = some_rows(world, [7] * 40)
    result = run(weights, row.expand(40, -1), nulls.attend(), StoredLatents(world.latents, torch.zeros(40).long()))
    assert result.isfinite().all()


def test_the_number_of_threads() -> None:
    assert threads() == torch.get_num_threads()
    set_threads(7)
    assert threads() == 7
