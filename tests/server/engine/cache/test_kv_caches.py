"""Pages are owned once, given back once, and groups are extended together or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastblt.server.engine.cache import kv_caches
from fastblt.server.engine.cache.kv_caches import OVERSHOOT, KvCaches
from fastblt.server.engine.device_queue import DeviceQueue
from tests.server.harness import model, settings


def caches(**overrides: object) -> KvCaches:
    blt = model(3)
    chosen = settings(max_running=4, max_pass_rows=32, **overrides)
    return KvCaches(blt, blt.config, chosen, DeviceQueue(torch.device("cpu")), torch.float32)


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_pages_balance_over_random_use(seed: int) -> None:
    rng = random.Random(seed)
    store = caches(cache_bytes=rng.choice((1 << 19, 1 << 21)))
    held: dict[int, tuple[int, int]] = {}
    for _ in range(60):
        if rng.random() < 0.3 and (state_index := store.take_state_index()) is not None:
            held[state_index] = (0, 0)
        if not held:
            continue
        state_index = rng.choice(list(held))
        length, patches = held[state_index]
        action = rng.random()
        if action < 0.6:
            grown = (length + rng.randrange(40), patches + rng.randrange(20))
            if max(grown) > store.max_length:
                continue
            before = {name: group.pool.free for name, group in store.groups.items()}
            if store.reserve(state_index, *grown):
                held[state_index] = grown
            else:
                assert before == {name: group.pool.free for name, group in store.groups.items()}
        elif action < 0.8:
            patches = rng.randint(0, patches)
            store.free_unread(state_index, rng.randint(0, length), patches, rng.randint(0, length))
            held[state_index] = (length, patches)
        else:
            store.release(state_index)
            del held[state_index]
        for group in store.groups.values():
            owned = group.table[group.table > 0].tolist()
            assert len(owned) == len(set(owned)), "a page is owned twice"
            assert len(owned) + group.pool.free == group.pool.size
    for state_index in list(held):
        store.release(state_index)
    assert store.balanced()


def test_few_and_short_requests_need_no_room_for_a_whole_pass() -> None:
    blt = model(3)
    small = settings(max_running=1, max_model_len=100, max_pass_rows=4096, cache_bytes=None)
    assert (
        KvCaches(blt, blt.config, small, DeviceQueue(torch.device("cpu")), torch.float32).max_length == 100 + OVERSHOOT
    )


def test_too_little_memory_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match="give at least"):
        caches(cache_bytes=1000)


def test_memory_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1000000\n")
    assert kv_caches._machine_bytes(limit) == 1_000_000
    limit.write_text("max\n")
    assert kv_caches._machine_bytes(limit) == kv_caches._machine_bytes(tmp_path / "nowhere") > 2**30
    monkeypatch.setattr(kv_caches, "_machine_bytes", lambda: 1 << 18)
    with pytest.raises(ValueError, match="there are 262144: give a smaller cache_bytes"):
        caches(cache_bytes=1 << 20)
