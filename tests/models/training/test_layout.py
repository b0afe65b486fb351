"""Blocks, patches and noise as arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastblt.models.patching import PatchRule
from fastblt.models.training.attention import TILE
from fastblt.models.training.entropy import choose_threshold, patch_starts
from fastblt.models.training.layout import BLOCK_ROWS, OLDEST, LayoutConfig, block_arrays, draw_noise, patch_arrays
from fastblt.models.vocabulary import MASK_ID
from tests.models.training.toys import LAYOUT, LENGTH, toy_sequences


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([4, 8, 16]), t=st.floats(0.1, 1.0))
def test_block_rows(seed: int, size: int, t: float) -> None:
    ids, starts = toy_sequences(1, seed)
    rng = np.random.default_rng(seed)
    arrays = block_arrays(ids, starts, np.array([t]), np.array([size]), LAYOUT, rng)
    patch_of = starts[0].cumsum() - 1
    for tile in range(LENGTH // TILE):
        for row in range(BLOCK_ROWS):
            cell = {name: int(array[0, tile, row]) for name, array in arrays.items()}
            if not cell["block_valid"]:
                assert cell["block_input"] == MASK_ID
                assert not cell["block_masked"]
                continue
            start, place = cell["block_start"], cell["block_position"]
            assert max(2, tile * TILE) <= start < (tile + 1) * TILE
            assert place == start + row % size < LENGTH
            # Closed once byte start - 1 is known, or, for a draft's block, once byte start - 2 is.
            assert cell["block_latent"] in (patch_of[start] - 1, patch_of[start - 1] - 1)
            assert cell["block_target"] == ids[0, place]
            assert cell["block_input"] == (MASK_ID if cell["block_masked"] else ids[0, place])


def test_blocks_anywhere_read_what_the_last_verification_left() -> None:
    ids, starts = toy_sequences(2)
    layout = LayoutConfig(LENGTH, 8, closed_starts=1.0)
    arrays = block_arrays(ids, starts, np.ones(2), np.array([8, 16]), layout, np.random.default_rng(0))
    places, latents = arrays["block_start"], arrays["block_latent"]
    for sequence in range(2):
        patch_of = starts[sequence].cumsum() - 1
        exists = arrays["block_valid"][sequence]
        assert (latents[sequence][exists] == patch_of[places[sequence][exists] - 1] - 1).all()
        assert 0 < starts[sequence][places[sequence][exists]].mean() < 1


def test_old_latents_are_those_of_a_longer_draft() -> None:
    ids, starts = toy_sequences(2)
    layout = LayoutConfig(LENGTH, 8, closed_starts=1.0, old_latents=0.5)
    arrays = block_arrays(ids, starts, np.ones(2), np.array([8, 16]), layout, np.random.default_rng(0))
    ages = []
    for sequence in range(2):
        patch_of = starts[sequence].cumsum() - 1
        exists = arrays["block_valid"][sequence]
        places, latents = arrays["block_start"][sequence][exists], arrays["block_latent"][sequence][exists]
        newest = patch_of[places - 1] - 1
        oldest = patch_of[np.maximum(places - 1 - OLDEST, 1)] - 1
        assert (oldest <= latents).all()
        assert (latents <= newest).all()
        ages += (newest - latents).tolist()
    assert 0.3 < np.mean(np.array(ages) > 0) < 0.6


def test_refined_blocks_show_a_number_of_bytes_and_weigh_as_much_as_others() -> None:
    ids, starts = toy_sequences(2)
    layout = LayoutConfig(LENGTH, 8, full_blocks=0.5, refined_blocks=0.5)
    arrays = block_arrays(ids, starts, np.full(2, 0.4), np.array([4, 8]), layout, np.random.default_rng(0))
    for sequence, size in enumerate((4, 8)):
        shown = arrays["block_shown"][sequence].reshape(-1, size)
        assert (shown == shown[:, :1]).all()
        refined = shown[:, 0] > 0
        assert 0.05 < refined.mean() < 0.6
        assert shown.max() < size
        assert not arrays["block_full"][sequence].reshape(-1, size)[refined].any()
        weights = arrays["block_weight"][sequence].reshape(-1, size)[refined]
        np.testing.assert_allclose(weights[:, 0] * (size - shown[refined, 0]), size, rtol=1e-5)


def test_weights_of_a_full_block_fall_and_add_up_to_its_size() -> None:
    ids, starts = toy_sequences(2)
    layout = LayoutConfig(LENGTH, 8, full_blocks=0.5, decay=0.8)
    arrays = block_arrays(ids, starts, np.full(2, 0.4), np.array([4, 8]), layout, np.random.default_rng(0))
    for sequence, size in enumerate((4, 8)):
        weights = arrays["block_weight"][sequence].reshape(-1, size)
        full = np.isclose(weights[:, 1:], 0.8 * weights[:, :-1]).all(1)
        assert 0.2 < full.mean() < 0.8
        np.testing.assert_allclose(weights[full].sum(1), size, rtol=1e-5)
        np.testing.assert_allclose(weights[~full], 1 / 0.4, rtol=1e-5)


def test_without_closed_starts_blocks_begin_with_patches() -> None:
    ids, starts = toy_sequences(2)
    layout = LayoutConfig(LENGTH, 8, closed_starts=0.0)
    arrays = block_arrays(ids, starts, np.ones(2), np.array([8, 16]), layout, np.random.default_rng(0))
    for sequence in range(2):
        chosen = arrays["block_start"][sequence][arrays["block_valid"][sequence]]
        assert starts[sequence][chosen].all()


def test_patches_hold_their_bytes_and_rows_read_closed_ones() -> None:
    _, starts = toy_sequences(2)
    arrays = patch_arrays(starts, LAYOUT)
    for sequence in range(2):
        firsts = np.flatnonzero(starts[sequence, :LENGTH])
        for patch, first in enumerate(firsts):
            end = firsts[patch + 1] if patch + 1 < len(firsts) else LENGTH
            held = arrays["pool_index"][sequence, patch][arrays["pool_inside"][sequence, patch]]
            assert held.tolist() == list(range(first, end))
        for place in range(LENGTH):
            patch = arrays["clean_latent"][sequence, place]
            closed = int(starts[sequence, : place + 2].sum()) - 1
            assert patch == closed - 1


def test_rows_beyond_the_kept_patches_have_no_loss() -> None:
    ids, starts = toy_sequences(1)
    layout = LayoutConfig(patches=20, max_patch_length=8)
    arrays = patch_arrays(starts, layout)
    assert arrays["clean_latent"].max() == 19
    assert arrays["clean_valid"].sum() == np.flatnonzero(starts[0])[21] - 1
    blocks = block_arrays(ids, starts, np.ones(1), np.array([4]), layout, np.random.default_rng(0))
    assert blocks["block_start"][blocks["block_valid"]].max() <= np.flatnonzero(starts[0])[21]


def test_noise_is_stratified() -> None:
    t = draw_noise(8, np.random.default_rng(0))
    assert t.min() >= 0.1
    assert sorted((t * 8).astype(int).tolist()) == list(range(8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), longest=st.sampled_from([None, 1, 3, 8]), threshold=st.floats(0.2, 0.9))
def test_vectorized_patch_rule(seed: int, longest: int | None, threshold: float) -> None:
    entropy = np.random.default_rng(seed).random((2, 40)).astype(np.float32)
    rule = PatchRule(threshold, longest)
    assert patch_starts(entropy, rule).tolist() == [rule.starts(row) for row in entropy.tolist()]


def test_threshold_gives_the_wanted_patches() -> None:
    entropy = np.random.default_rng(0).exponential(1.0, (8, 512)).astype(np.float32)
    starts = patch_starts(entropy, PatchRule(choose_threshold(entropy, 4.0, 8), 8))[:, :-1]
    assert abs(starts.size / starts.sum() - 4.0) < 0.1
