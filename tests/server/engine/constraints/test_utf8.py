"""Strict UTF-8 against Python's decoder."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.vocabulary import BYTE_OFFSET, EOS_ID, MASK_ID, NEVER_PRODUCED, VOCAB_SIZE, decode
from fastblt.server.engine.constraints import utf8
from tests.oracles.utf8_oracle import KINDS, completable, fillable

#: The beginnings of a character: none, whole ones, and every cut of one, in every range that has rules of its own.
CUTS = sorted({
    char.encode()[:size]
    for char in "a\x7fñ߿ࠀ࿿က퀀\ud7ff\ue000\uffff𐀀\U0003ffff\U00040000\U000fffff\U00100000\U0010ffff"
    for size in range(5)
})  # fmt: skip
few = settings(max_examples=60, deadline=None)


def state_after(data: bytes) -> int:
    state = utf8.WHOLE
    for byte in data:
        state = utf8.step(state, byte + BYTE_OFFSET)
    return state


def test_a_byte_may_stand_iff_characters_can_become_whole_within_the_bytes_left() -> None:
    for data in CUTS:
        for left in range(1, 7):
            if not completable(data, left):
                continue
            allowed = utf8.allowed(state_after(data), left)
            assert allowed is not None
            for byte in range(256):
                assert allowed[byte + BYTE_OFFSET] == completable(data + bytes((byte,)), left - 1), (data, byte, left)
            assert allowed[EOS_ID] == completable(data, 0)
            assert not allowed[list(NEVER_PRODUCED)].any()


def test_invalid_bytes_are_dead_and_never_come_back() -> None:
    for data in CUTS:
        for byte in range(256):
            state = state_after(data + bytes((byte,)))
            assert (state == utf8.DEAD) != completable(data + bytes((byte,)), 3)
    assert all(utf8.step(utf8.DEAD, token) == utf8.DEAD for token in range(VOCAB_SIZE))


@few
@given(st.sampled_from(CUTS), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32))
def test_a_block_s_masks_are_the_paths_through_what_is_filled(data: bytes, left: int, size: int, seed: int) -> None:
    """Every position of a random block whose filled ids have a path, against trying all fillings."""
    if not completable(data, left):
        return
    rng = random.Random(seed)
    ids = [MASK_ID] * size
    for at in rng.sample(range(size), rng.randint(0, size)):
        tried = ids.copy()
        tried[at] = rng.choice([*(kind + BYTE_OFFSET for kind in KINDS), EOS_ID])
        if fillable(data, tuple(tried), left):
            ids = tried
    walk = utf8.BlockPaths(state_after(data), left, ids)
    for at, token in enumerate(ids):
        allowed = walk.allowed()
        if token == MASK_ID and EOS_ID not in ids[:at] and at < left:
            assert allowed is not None
            for candidate in [*(kind + BYTE_OFFSET for kind in KINDS), EOS_ID]:
                tried = [*ids[:at], candidate, *ids[at + 1 :]]
                assert allowed[candidate] == fillable(data, tuple(tried), left), (ids, at, candidate)
        walk.take(token)


@few
@given(st.integers(1, 40), st.sampled_from((4, 8, 16)), st.integers(0, 2**32))
def test_blocks_filled_in_any_order_decode(max_tokens: int, size: int, seed: int) -> None:
    """Several positions a step, each step left to right, until the length or EOS ends the output."""
    rng = random.Random(seed)
    output: list[int] = []
    state = utf8.WHOLE
    while len(output) < max_tokens and EOS_ID not in output:
        ids = [MASK_ID] * size
        while MASK_ID in ids:
            open_ = [at for at in range(size) if ids[at] == MASK_ID]
            picked = rng.sample(open_, rng.randint(1, len(open_)))
            walk = utf8.BlockPaths(state, max_tokens - len(output), ids.copy())
            for at in range(size):
                if at in picked:
                    allowed = walk.allowed()
                    choices = np.flatnonzero(allowed if allowed is not None else np.ones(VOCAB_SIZE, dtype=bool))
                    # EOS is rare among 257, and ends everything.
                    ids[at] = int(
                        rng.choice(choices if rng.random() < 0.98 else [c for c in choices if c < 3] or choices)
                    )
                walk.take(ids[at])
        output += ids
        for token in ids:
            state = utf8.step(state, token)
    seen = output[:max_tokens]
    decode(seen[: seen.index(EOS_ID)] if EOS_ID in seen else seen).decode()
