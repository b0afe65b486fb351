"""Pooling and the latents' keys and values against a float64 restatement, one patch and one number at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fastblt.kernels.cpu.dense import pack, pack_norm
from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import set_threads
from fastblt.kernels.cpu.upstream import PackedPooling, PackedReaders, StoredPatches, pool, store_latents
from fastblt.kernels.paged_rows import PagedRows

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

SIZE, DIM, PAGE, EPS = 24, 8, 4, 1e-5
#: Heads, key heads and rows a patch.
SHAPES = [(3, 3, 2), (4, 2, 1), (2, 1, 3)]


class World:
    """Weights, and patches of several requests whose states lie in pages anywhere; what no patch has is NaN."""

    def __init__(self, heads: int, kv_heads: int, k: int, patches: int = 40) -> None:
        generator = torch.Generator().manual_seed(heads * 10 + k)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

        self.heads, self.kv_heads, self.k = heads, kv_heads, k
        self.projection = draw(k * SIZE, SIZE)
        self.query_gain, self.key_gain = 1 + draw(SIZE), 1 + draw(SIZE)
        self.queries, self.keys = draw(heads * DIM, SIZE), draw(kv_heads * DIM, SIZE)
        self.values, self.out = draw(kv_heads * DIM, SIZE), draw(SIZE, heads * DIM)
        self.weights = PackedPooling(
            pack(self.projection),
            (pack_norm(self.query_gain, EPS), pack(self.queries)),
            (pack_norm(self.key_gain, EPS), pack(self.keys)),
            pack(self.values),
            pack(self.out),
            DIM,
        )
        lengths = torch.randint(1, 9, (patches,), generator=generator)
        owners = torch.arange(patches) % 3
        pages = -(-9 * patches // PAGE)
        table = torch.randperm(3 * pages, generator=generator).view(3, pages).int()
        self.states = PagedRows(torch.full((3 * pages * PAGE, SIZE), float("nan")), table, PAGE)
        begins = torch.zeros(3, dtype=torch.long)
        starts = []
        for owner, length in zip(owners.tolist(), lengths.tolist(), strict=True):
            starts.append(int(begins[owner]))
            begins[owner] += length
            where = torch.arange(starts[-1], starts[-1] + length).int()
            self.states.write(torch.full_like(where, owner), where, 3 * draw(length, SIZE))
        first = torch.tensor(starts).int()
        self.patches = StoredPatches(self.states, owners.int(), first, (first + lengths - 1).int(), 8)

    def expected(self, patch: int) -> np.ndarray:
        owner, start, end = (int(column[patch]) for column in self._columns)
        where = torch.arange(start, end + 1).int()
        states = self.states.read(torch.full_like(where, owner), where).double().numpy()
        residual = (self.projection.double().numpy() @ states.max(0)).reshape(self.k, SIZE)
        queries = normed(residual, self.query_gain) @ self.queries.double().numpy().T
        keys = normed(states, self.key_gain) @ self.keys.double().numpy().T
        values = normed(states, self.key_gain) @ self.values.double().numpy().T
        attended = np.zeros((self.k, self.heads * DIM))
        for row in range(self.k):
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                mine, theirs = slice(head * DIM, (head + 1) * DIM), slice(group * DIM, (group + 1) * DIM)
                scores = [float(queries[row, mine] @ key[theirs]) / math.sqrt(DIM) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(w * value[theirs] for w, value in zip(weights, values, strict=True))
                attended[row, mine] = mixed / sum(weights)
        return (attended @ self.out.double().numpy().T + 2 * residual).reshape(-1)

    @property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.patches.owners, self.patches.starts, self.patches.ends


def normed(rows: np.ndarray, gain: Tensor) -> np.ndarray:
    return gain.double().numpy() * rows / np.sqrt((rows**2).mean(-1, keepdims=True) + EPS)


def some(patches: StoredPatches, which: Tensor) -> StoredPatches:
    return replace(patches, owners=patches.owners[which], starts=patches.starts[which], ends=patches.ends[which])


@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_is_the_definition(shape: tuple[int, int, int]) -> None:
    world = World(*shape)
    vectors = pool(world.weights, world.patches)
    for patch, vector in enumerate(vectors):
        np.testing.assert_allclose(vector.double().numpy(), world.expected(patch), atol=2e-5)


def test_a_patch_depends_on_no_other_and_on_no_threads() -> None:
    world = World(*SHAPES[0])
    whole = pool(world.weights, world.patches)
    try:
        for threads in (1, 2, 3):
            set_threads(threads)
            assert torch.equal(pool(world.weights, world.patches), whole)
            for which in (torch.arange(1), torch.arange(39, 40), torch.arange(5, 17), torch.arange(40).flip(0)):
                assert torch.equal(pool(world.weights, some(world.patches, which)), whole[which])
    finally:
        set_threads(None)


def test_nan_stays_in_its_patch() -> None:
    world = World(*SHAPES[1])
    clean = pool(world.weights, world.patches)
    patches = world.patches
    world.states.write(patches.owners[7:8], patches.ends[7:8], torch.full((1, SIZE), float("nan")))
    vectors = pool(world.weights, patches)
    assert vectors[7].isnan().all()
    others = torch.arange(len(vectors)) != 7
    assert torch.equal(vectors[others], clean[others])


@pytest.mark.parametrize(("k", "kv_heads"), [(1, 2), (2, 3), (4, 1)])
def test_latents_are_stored_as_defined(k: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width, count, narrow = 40, 3, kv_heads * DIM
    projection = draw(k * SIZE, width)
    gains = [1 + draw(SIZE) for _ in range(count)]
    keys, values = ([draw(narrow, SIZE) for _ in range(count)] for _ in range(2))
    layers = [
        (pack_norm(gain, EPS), pack(key), pack(value)) for gain, key, value in zip(gains, keys, values, strict=True)
    ]
    weights = PackedReaders(pack(projection), SIZE, layers)
    store = torch.full((30, count, 2, k, kv_heads, DIM), float("nan"))
    slots = torch.randperm(30, generator=generator)[:11].int()
    latents = draw(11, width)
    store_latents(weights, latents, store, slots)
    for latent, slot in zip(latents.double().numpy(), slots.tolist(), strict=True):
        source = (projection.double().numpy() @ latent).reshape(k, SIZE)
        for layer in range(count):
            rows = normed(source, gains[layer])
            for kind, maps in enumerate((keys, values)):
                expected = (rows @ maps[layer].double().numpy().T).reshape(k, kv_heads, DIM)
                np.testing.assert_allclose(store[slot, layer, kind].double().numpy(), expected, atol=2e-5)
    others = sorted(set(range(30)) - set(slots.tolist()))
    assert store[others].isnan().all()
    alone = torch.full_like(store, float("nan"))
    store_latents(weights, latents[4:5], alone, slots[4:5])
    assert torch.equal(alone[slots[4].item()], store[slots[4].item()])


@pytest.mark.parametrize("count", [1, 24, 49, 151])
def test_latents_depend_on_no_threads(count: int) -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(count))
    layers = [(pack_norm(draw(SIZE), EPS), pack(draw(DIM, SIZE)), pack(draw(DIM, SIZE))) for _ in range(2)]
    weights = PackedReaders(pack(draw(2 * SIZE, 40)), SIZE, layers)
    latents, slots = draw(count, 40), torch.randperm(200)[:count].int()
    stores = []
    try:
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            stores.append(torch.zeros(200, 2, 2, 2, 1, DIM))
            store_latents(weights, latents, stores[-1], slots)
    finally:
        set_threads(None)
    assert all(torch.equal(store, stores[0]) for store in stores)
    assert int((stores[0] != 0).any((1, 2, 3, 4, 5)).sum()) == count
