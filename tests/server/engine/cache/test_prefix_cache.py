"""The prefix cache over real page tables, whose slots hold a fingerprint of the ids up to their position.

Sequences are driven by hand: what their rows would compute is that fingerprint, and patches close where it says so. A
hit that gave a page of other ids, a page that was given away while somebody needed it, or a point that is not the
deepest there is, is seen at once.
"""

from __future__ import annotations

import random
import time
import zlib
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastblt.server.decoding.blt import Blt
from fastblt.server.engine.cache.kv_caches import KvCaches
from fastblt.server.engine.cache.page_pool import PagePool
from fastblt.server.engine.cache.prefix_cache import PrefixCache
from fastblt.server.engine.cache.prefix_tree import Node
from fastblt.server.engine.device_queue import DeviceQueue
from fastblt.server.engine.sequence import Patch, Sequence
from fastblt.server.request import DecodingParams, Request, SamplingParams
from tests.server.harness import model, settings

BYTES = ("patcher", "encoder", "decoder")
SALTS = (None, "", "a")


def fingerprint(ids: list[int], salt: str | None, kind: str) -> float:
    """Small enough for fp32 to hold exactly."""
    return float(zlib.crc32(repr((ids, salt, kind)).encode()) % (1 << 20))


def closes(ids: list[int]) -> bool:
    """Whether a patch ends with the last of these ids."""
    return len(ids) == 1 or zlib.crc32(bytes(i % 251 for i in ids)) % 4 == 0


class World:
    """Caches, a prefix cache, and the sequences that run."""

    def __init__(self, which: int, rows: int = 4, **overrides: object) -> None:
        blt = model(which)
        chosen = settings(max_running=rows, max_pass_rows=32, max_model_len=160, **overrides)
        self.caches = KvCaches(blt, blt.config, chosen, DeviceQueue(torch.device("cpu")), torch.float32)
        # Few enough to run out of.
        self.caches.latent_pool = PagePool(40)
        self.prefix = PrefixCache(self.caches, enabled=True)
        self.running: list[Sequence] = []
        #: Every text that was ever there.
        self.texts: list[list[int]] = [[1]]
        self.refused = False
        take = self.prefix._attach

        def watched(*args: Any) -> bool:
            given = take(*args)
            self.refused = not given
            return given

        self.prefix._attach = watched  # type: ignore[method-assign]

    def sequence(self, ids: list[int], salt: str | None = None) -> Sequence:
        request = Request("r", ids, SamplingParams(max_tokens=100), time.monotonic(), cache_salt=salt)
        return Sequence(request, DecodingParams(), Blt(), 0)

    def admit(self, sequence: Sequence) -> bool:
        state_index = self.caches.take_state_index()
        if state_index is None:
            return False
        sequence.state_index = state_index
        expected = self.deepest(sequence)
        self.refused = False
        self.prefix.admit(sequence)
        if self.refused:
            # There was no page for a copy.
            expected = 0
        self.running.append(sequence)
        self.check_placed(sequence, expected)
        return True

    def advance(self, sequence: Sequence, count: int, new: list[int]) -> bool:
        """Compute the next rows; those of the newest id add one. False: no pages, and nothing was done."""
        start, end = sequence.decoded, min(sequence.decoded + count, sequence.known)
        if not self.caches.reserve(sequence.state_index, end, sequence.closed + end - start):
            return False
        salt = sequence.request.cache_salt
        for at in range(start, end):
            upto = sequence.ids[: at + 1]
            for name in BYTES:
                self.write(sequence, name, at, fingerprint(upto, salt, name))
            if closes(upto):
                slot = self.caches.latent_pool.take()
                self.write(sequence, "global", sequence.closed, fingerprint(upto, salt, "global"))
                self.caches.latents[slot] = fingerprint(upto, salt, "latent")
                sequence.patches.append(Patch(sequence.closed, sequence.open_start, at, slot))
                sequence.closed += 1
                sequence.open_start = at + 1
        sequence.scanned = sequence.encoded = sequence.decoded = end
        if end == sequence.known:
            sequence.ids += new
        self.prefix.insert(sequence)
        self.free_latents(sequence.forget_patches())
        self.caches.free_unread(sequence.state_index, end, sequence.closed, sequence.unpooled)
        return True

    def end(self, sequence: Sequence, *, broken: bool = False) -> None:
        self.texts.append(list(sequence.ids))
        if broken:
            self.prefix.forget(sequence)
        self.running.remove(sequence)
        self.prefix.release(sequence)
        self.free_latents([patch.slot for patch in sequence.patches])
        self.caches.release(sequence.state_index)
        sequence.state_index = 0

    def free_latents(self, slots: list[int]) -> None:
        for slot in slots:
            self.caches.latent_pool.give_back(slot)

    def write(self, sequence: Sequence, name: str, at: int, value: float) -> None:
        group = self.caches.groups[name]
        slot = int(group.slots(np.array([sequence.state_index]), np.array([at]))[0])
        assert slot >= group.page_size, "a page that is not there is written"
        assert group.pool._users[slot // group.page_size] == 1, "a page that others read is written"
        for layer in group.layers:
            layer[slot] = value

    # What must hold

    def deepest(self, sequence: Sequence) -> int:
        """The deepest resume point for a sequence, by looking at all of them."""
        limit = min(sequence.known - 1, max(sequence.prompt_length - 1, sequence.reached))
        best = 0
        for node in self.nodes():
            resume = node.resume
            if resume is None or not best < resume.at <= limit:
                continue
            path = [node]
            while path[0].parent is not None:
                path.insert(0, path[0].parent)
            ids = b"".join(one.key[1] for one in path[:-1] if one.key is not None) + resume.key[1]
            top = path[0].key[0] if path[0].key is not None else resume.key[0]
            if (
                top != sequence.request.cache_salt
                or np.frombuffer(ids, np.uint16).tolist() != sequence.ids[: resume.at]
            ):
                continue
            for number, name in enumerate(BYTES):
                window = self.caches.groups[name].window
                first = 0 if window is None else max(0, resume.at - window + 1)
                positions = range(first, resume.at)
                if not all(path[at // self.caches.page_size].pages[number] for at in positions):
                    break
            else:
                best = resume.at
        return best

    def check_placed(self, sequence: Sequence, expected: int) -> None:
        """A newly placed sequence finds everything that it will read."""
        at, ids, salt = sequence.decoded, sequence.ids, sequence.request.cache_salt
        assert at == expected == sequence.open_start == sequence.scanned == sequence.encoded
        ends = [p for p in range(at) if closes(ids[: p + 1])]
        assert sequence.closed == len(ends)
        if not at:
            assert not sequence.patches
            return
        assert ends[-1] == at - 1 == sequence.patches[-1].end
        assert bool((self.caches.latents[sequence.patches[-1].slot] == fingerprint(ids[:at], salt, "latent")).all())
        for name in BYTES:
            window = self.caches.groups[name].window
            for p in range(0 if window is None else max(0, at - window + 1), at):
                assert self.read(sequence, name, p) == {fingerprint(ids[: p + 1], salt, name)}
        for number, p in enumerate(ends):
            assert self.read(sequence, "global", number) == {fingerprint(ids[: p + 1], salt, "global")}

    def read(self, sequence: Sequence, name: str, at: int) -> set[float]:
        group = self.caches.groups[name]
        slot = int(group.slots(np.array([sequence.state_index]), np.array([at]))[0])
        return {value for layer in group.layers for value in layer[slot].flatten().tolist()}

    def nodes(self) -> set[Node]:
        nodes = {*self.prefix.tree.nodes.values(), *chain.from_iterable(self.prefix.tree.points.values())}
        for children in self.prefix.tree.children.values():
            nodes |= children
        return nodes

    def check_pools(self) -> None:
        """Users are the tables', what is kept is the nodes', and every other page is free."""
        nodes = self.nodes()
        resumes = [node.resume for node in nodes if node.resume is not None]
        for name, group in self.caches.groups.items():
            kept: set[int] = set()
            if name in BYTES:
                held = [node.pages[BYTES.index(name)] for node in nodes]
                kept = {page for page in held if page}
                assert len(kept) == sum(1 for page in held if page), "two nodes hold one page"
            elif name == "global":
                kept = {node.whole for node in nodes} | {resume.tail for resume in resumes}
            check_pool(group.pool, Counter(group.table[group.table > 0].tolist()), kept - {0})
        used = Counter(patch.slot for sequence in self.running for patch in sequence.patches)
        check_pool(self.caches.latent_pool, used, {resume.patch.slot for resume in resumes})


def check_pool(pool: PagePool, users: Counter[int], kept: set[int]) -> None:
    assert {page: count for page, count in enumerate(pool._users) if count} == dict(users)
    assert set(pool._cached) == kept - set(users)
    assert {page for page in range(pool.size + 1) if pool._kept[page]} == kept
    assert pool.free + pool.cached + len(users) == pool.size


def random_text(rng: random.Random, texts: list[list[int]]) -> list[int]:
    """Some of a text that was there before, and something new; of few letters, so that chance makes prefixes too."""
    old = rng.choice(texts)
    text = old[: rng.randint(1, len(old))] if rng.random() < 0.5 else list(old)
    return (text + rng.choices((4, 5), k=rng.choice((0, 1, 7, 30))))[:130]


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_every_hit_is_the_deepest_and_finds_what_it_needs(seed: int) -> None:
    rng = random.Random(seed)
    world = World(
        rng.randrange(6), page_size=rng.choice((4, 8, 16)), cache_bytes=rng.choice((1 << 18, 1 << 19, 1 << 22))
    )
    preempted: list[Sequence] = []
    for _ in range(120):
        choice = rng.random()
        if choice < 0.3:
            salt = rng.choice(SALTS) if rng.random() < 0.3 else None
            again = preempted.pop() if preempted else world.sequence(random_text(rng, world.texts), salt)
            if again.known + 10 < world.caches.max_length:
                world.admit(again)
        elif world.running:
            sequence = rng.choice(world.running)
            if choice < 0.88 and sequence.known < world.caches.max_length - 10:
                new = rng.choices((4, 5), k=rng.randint(1, 3))
                if not world.advance(sequence, rng.choice((1, 5, 32)), new) or rng.random() < 0.05:
                    world.end(sequence)
                    sequence.restart()
                    preempted.append(sequence)
            else:
                world.end(sequence, broken=rng.random() < 0.1)
        world.check_pools()
    for sequence in list(world.running):
        world.end(sequence)
    world.check_pools()
    assert world.caches.balanced()
    # Whoever takes everything finds nothing left behind.
    for pool in [*(group.pool for group in world.caches.groups.values()), world.caches.latent_pool]:
        while pool.available:
            pool.take()
    tree = world.prefix.tree
    assert not (tree.nodes or tree.points or tree.children)
    assert not any((*tree.owners, tree.global_holders, tree.latent_holders))


def run_through(world: World, ids: list[int], salt: str | None = None) -> Sequence:
    """Compute a whole text and end."""
    sequence = world.sequence(ids, salt)
    assert world.admit(sequence)
    while sequence.decoded < len(ids):
        assert world.advance(sequence, 8, [4])
    sequence.ids = sequence.ids[: len(ids)]
    world.end(sequence)
    return sequence


def text(length: int, seed: int = 0) -> list[int]:
    return [1, *random.Random(seed).choices(range(4, 260), k=length - 1)]


def test_a_conversation_goes_on_where_it_ended() -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    first = text(100)
    run_through(world, first)
    longer = world.sequence([*first, 7, 8, 9])
    assert world.admit(longer)
    # The last patch that the first one closed, in a page that it never filled.
    assert longer.decoded == max(p + 1 for p in range(100) if closes(first[: p + 1]))
    assert longer.cached == longer.decoded - 1
    assert (world.prefix.queries, world.prefix.hits) == (99 + 102, longer.cached)


def test_salts_part_what_is_cached() -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    run_through(world, text(40), "mine")
    for salt in (None, "", "yours"):
        assert run_through(world, text(40), salt).cached == 0
    for salt in ("mine", None, "", "yours"):
        assert (run_through(world, text(40), salt).cached or 0) > 20


def test_what_was_computed_twice_is_kept_once() -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    pair = [world.sequence(text(100)) for _ in range(2)]
    for sequence in pair:
        assert world.admit(sequence) and sequence.decoded == 0
    for sequence in pair:
        while sequence.decoded < 96:
            assert world.advance(sequence, 8, [4])
    table = world.caches.groups["global"].table
    closed = pair[0].closed // 16
    assert closed and (table[pair[0].state_index, :closed] == table[pair[1].state_index, :closed]).all()
    assert world.prefix.shared_pages(world.sequence(text(100))) == closed
    world.check_pools()


def test_what_gave_nan_is_forgotten_and_nothing_of_others() -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    run_through(world, text(100))
    broken_text = [*text(100)[:60], *text(60, seed=2)]
    broken, beside = world.sequence(broken_text), world.sequence([*broken_text[:90], *text(30, seed=3)])
    assert world.admit(broken) and broken.decoded > 30
    assert world.admit(beside)
    shared = broken.decoded
    for sequence in (broken, beside):
        while sequence.decoded < 110:
            assert world.advance(sequence, 8, [4])
    # Two pages behind what it took from the first are now also the other's, who stands on them.
    world.end(broken, broken=True)
    world.check_pools()
    assert (run_through(world, text(100)).cached or 0) > 80
    again = world.sequence(broken_text)
    assert world.admit(again) and shared < again.decoded <= 96
    world.end(again)
    # Alone, it leaves nothing of its own.
    alone = world.sequence(text(100, seed=4))
    assert world.admit(alone)
    while alone.decoded < 96:
        assert world.advance(alone, 8, [4])
    world.end(alone, broken=True)
    world.check_pools()
    assert run_through(world, text(100, seed=4)).cached == 0


def test_off_means_that_nothing_is_kept() -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    world.prefix = PrefixCache(world.caches, enabled=False)
    for _ in range(2):
        assert run_through(world, text(100)).cached is None
    assert all(group.pool.free == group.pool.size for group in world.caches.groups.values())
    assert world.prefix.queries == 0


@pytest.mark.parametrize("length", [1, 2])
def test_one_row_at_least_is_computed(length: int) -> None:
    world = World(0, page_size=16, cache_bytes=1 << 22)
    for _ in range(2):
        run_through(world, text(length))
        sequence = world.sequence(text(length))
        assert world.admit(sequence) and sequence.decoded < length
        world.end(sequence)
