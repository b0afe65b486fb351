"""Both paths of paged attention against the oracle, over random shapes, ranges and page layouts."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import set_threads
from fastblt.kernels.paged_attention import paged_attention, paged_attention_torch
from fastblt.kernels.types import RaggedRows
from fastblt.models.layers import Rope
from tests.kernels.rows import here
from tests.oracles.attention_oracle import Memory

THETA = 10000.0
SHAPES = [(4, 4, 16, 16), (4, 2, 32, 64), (8, 2, 32, 16), (6, 2, 64, 64), (2, 1, 128, 32), (3, 3, 16, 48)]

native = pytest.param(paged_attention, id="native")
plain = pytest.param(paged_attention_torch, id="torch")


def test_the_native_path_is_there() -> None:
    """Without a compiler `paged_attention` is the torch path, and the tests below would prove it twice."""
    assert library() is not None


class World:
    """A random cache of a few requests whose pages lie anywhere, and its oracle."""

    def __init__(self, seed: int, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> None:
        self.rng = random.Random(seed)
        self.heads, self.kv_heads, self.dim, self.page = shape
        self.dtype = dtype
        self.requests, self.length = 4, 200
        count = -(-self.length // self.page)
        order = list(range(1, self.requests * count + 1))
        self.rng.shuffle(order)
        self.table = torch.tensor(order, dtype=torch.int32).view(self.requests, count)
        # Poisoned: what nobody wrote must never be read.
        slots = (len(order) + 1) * self.page
        self.store = torch.full((slots, 2, self.kv_heads, self.dim), float("nan"), dtype=dtype)
        self.memory = Memory(THETA)
        self.turns = here(Rope(self.dim, THETA).table(self.length))
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, spans: list[tuple[int, int, int]], ranges: list[tuple[int, int]] | None = None) -> RaggedRows:
        """`spans` are (request, first position, count); ranges default to causal ones."""
        owners = [request for request, _, count in spans for _ in range(count)]
        positions = [first + i for _, first, count in spans for i in range(count)]
        ranges = ranges or [(0, p + 1) for p in positions]
        firsts = np.cumsum([0] + [count for *_, count in spans])[:-1]
        return RaggedRows(
            table=self.table,
            rows=torch.tensor(owners, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            firsts=torch.tensor([low for low, _ in ranges], dtype=torch.int32),
            highs=torch.tensor([high for _, high in ranges], dtype=torch.int32),
            spans=[(int(first), count) for first, (*_, count) in zip(firsts, spans, strict=True)],
            length=self.length,
            page_size=self.page,
            window=1,
        )

    def random(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((rows, self.heads, self.dim), (rows, self.kv_heads, self.dim), (rows, self.kv_heads, self.dim))
        q, k, v = (here(torch.randn(shape, generator=self.generator, device="cpu")).to(self.dtype) for shape in shapes)
        return q, k, v

    def check(self, attend: Callable[..., Tensor], at: RaggedRows, tolerance: float, **options: bool) -> None:
        q, k, v = self.random(len(at.rows))
        out = attend(q, k, v, self.turns, self.store, at, **options)
        rows, positions = at.rows.tolist(), at.positions.tolist()
        for i, (request, position) in enumerate(zip(rows, positions, strict=True)):
            self.memory.write(request, position, k[i].double().cpu().numpy(), v[i].double().cpu().numpy())
        for i, (request, position) in enumerate(zip(rows, positions, strict=True)):
            low, high = int(at.lows[i]), int(at.highs[i])
            expected = self.memory.attend(request, position, q[i].double().cpu().numpy(), low, high)
            np.testing.assert_allclose(out[i].double().cpu().numpy(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("attend", [native, plain])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_steps_blocks_and_rewrites(attend: Callable[..., Tensor], shape: tuple[int, int, int, int]) -> None:
    world = World(hash(shape) % 1000, shape)
    rng = world.rng
    lengths = [rng.randint(20, 90) for _ in range(world.requests)]
    world.check(attend, world.rows([(r, 0, length) for r, length in enumerate(lengths)]), 2e-5)
    # One row each: some windowed, some of a block that sees past itself, one request rewriting its newest slot.
    spans, ranges = [], []
    for request, length in enumerate(lengths):
        start = length - (request == 1)
        count = rng.choice((1, 1, 4)) if request != 1 else 1
        low = rng.randrange(start)
        spans.append((request, start, count))
        ranges += [(low, start + count)] * count
    world.check(attend, world.rows(spans, ranges), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_storage(dtype: torch.dtype) -> None:
    """Other dtypes take the torch path; keys round to their storage, hence the tolerance."""
    world = World(3, (4, 2, 32, 16), dtype)
    tolerance = 0.01 if dtype == torch.float16 else 0.08
    world.check(paged_attention, world.rows([(0, 0, 40), (1, 0, 1), (2, 0, 25)]), tolerance)


@pytest.mark.parametrize(("attend", "options"), [(paged_attention, {}), (paged_attention_torch, {"tiled": True})])
@pytest.mark.parametrize("page", [16, 64])
def test_a_row_does_not_depend_on_its_batch(attend: Callable[..., Tensor], options: dict, page: int) -> None:
    """The same rows, alone and in one batch, in one chunk and byte by byte, and under another page size: equal bits."""
    threads = torch.get_num_threads()
    try:
        outs = []
        for size, count in ((16, 1), (page, 2)):
            torch.set_num_threads(count)
            world = World(7, (4, 2, 32, size))
            q, k, v = world.random(3 * 150)
            whole = world.rows([(r, 0, 150) for r in range(3)])
            outs.append(attend(q, k, v, world.turns, world.store, whole, **options))
            world.store.fill_(float("nan"))
            single = torch.empty_like(q)
            for position in range(150):
                index = torch.tensor([r * 150 + position for r in range(3)])
                at = world.rows([(r, position, 1) for r in range(3)])
                single[index] = attend(q[index], k[index], v[index], world.turns, world.store, at, **options)
            outs.append(single)
        for other in outs[1:]:
            assert torch.equal(outs[0], other)
    finally:
        torch.set_num_threads(threads)


def test_heads_of_a_long_row_are_shared_out() -> None:
    """Threads beyond the rows take heads of their own: equal bits with any number of them."""
    world = World(11, (6, 3, 128, 16))
    world.check(paged_attention, world.rows([(0, 0, 195), (1, 0, 120)]), 2e-5)
    at = world.rows([(0, 195, 1), (1, 120, 1)])
    q, k, v = world.random(2)
    outs = []
    try:
        for count in (1, 2, 3, 7, 20):
            set_threads(count)
            outs.append(paged_attention(q, k, v, world.turns, world.store, at))
        world.check(paged_attention, at, 2e-5)
    finally:
        set_threads(None)
    for other in outs[1:]:
        assert torch.equal(outs[0], other)


def test_nan_stays_in_its_row() -> None:
    world = World(5, (4, 2, 32, 16))
    q, k, v = world.random(3)
    q[1, 0, 0] = float("nan")
    out = paged_attention(q, k, v, world.turns, world.store, world.rows([(0, 0, 1), (1, 0, 1), (2, 0, 1)]))
    assert out[1, 0].isnan().all()
    assert out[0].isfinite().all() and out[2].isfinite().all() and out[1, 1:].isfinite().all()


@pytest.mark.parametrize("shape", [*SHAPES, (8, 2, 64, 16), (2, 2, 8, 64), (5, 1, 24, 16), (4, 4, 128, 64)])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_a_request_together_equal_those_alone(shape: tuple[int, int, int, int], count: int) -> None:
    """Chunks of random sizes, windows, blocks that see ahead and ranges that have little in common: equal bits."""
    world = World(17, shape)
    rng = world.rng
    past = world.rows([(r, 0, world.length) for r in range(world.requests)])
    paged_attention(*world.random(len(past.rows)), world.turns, world.store, past)
    try:
        for _ in range(6):
            set_threads(count)
            window, spans, ranges = rng.choice((1, 5, 70, 1000)), [], []
            for request in rng.sample(range(world.requests), rng.randint(1, world.requests)):
                size = rng.choice((1, 2, 3, rng.randint(4, 60)))
                start = rng.randrange(world.length - size)
                spans.append((request, start, size))
                kind = rng.choice(("causal", "block", "any"))
                for position in range(start, start + size):
                    own = (position, position + 1) if kind != "block" else (start, start + size)
                    high = rng.randint(position + 1, world.length) if kind == "any" else own[1]
                    low = rng.randint(0, position) if kind == "any" else max(0, own[0] - window + 1)
                    ranges.append((low, high))
            at = world.rows(spans, ranges)
            q, k, v = world.random(len(at.rows))
            together = paged_attention(q, k, v, world.turns, world.store, at)
            # Their keys and values are there now: written again, each by its own row, they stay what they are.
            set_threads(1)
            singles = [(request, start + i, 1) for request, start, size in spans for i in range(size)]
            for i, (single, own) in enumerate(zip(singles, ranges, strict=True)):
                alone = world.rows([single], [own])
                out = paged_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], world.turns, world.store, alone)
                assert torch.equal(out[0], together[i]), (window, spans, i)
    finally:
        set_threads(None)


@pytest.mark.parametrize("bad", ["key", "value"])
def test_what_a_later_row_holds_does_not_reach_those_before(bad: str) -> None:
    """Rows that are read together have tiles in common, not what only one of them may see."""
    world = World(23, (4, 2, 32, 16))
    q, k, v = world.random(40)
    (k if bad == "key" else v)[33] = float("nan")
    out = paged_attention(q, k, v, world.turns, world.store, world.rows([(0, 0, 40)]))
    assert out[:33].isfinite().all()
    assert out[33:].isnan().any(-1).any(-1).all()
