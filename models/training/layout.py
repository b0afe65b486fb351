"""The layout of a BLT-D training step: patches, blocks and noise as arrays of fixed shapes.

The decoder's rows are laid out in tiles (masks of arXiv 2605.08044 §3.2.2, Eq. 6). Tile s of a sequence holds the clean
rows of positions [TILE s, TILE (s+1)), followed by `BLOCK_ROWS` rows of the blocks that start there. All blocks of a
sequence have one size and may overlap. Their starts are a random choice among the possible ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fastblt.models.vocabulary import MASK_ID

#: Clean rows in a tile, and query rows in one of `training.attention`.
TILE = 128
#: Block rows in a tile, a multiple of every block size.
BLOCK_ROWS = 48
MIN_NOISE = 0.1
#: The parts of a model that can have learning rates of their own, or be frozen, and the modules that they are.
PARTS = {
    "encoder": ("encoder_hash_tok_embedding", "local_encoder"),
    "global": ("global_transformer",),
    "decoder": ("local_decoder", "lm_head"),
}
#: Bytes that a draft may have drafted since its latent was closed.
OLDEST = 31


@dataclass(frozen=True)
class LayoutConfig:
    """The blocks of a training sequence.

    `patches`: latents kept for each sequence; rows that need a later one have no loss. `max_patch_length`: of the patch
    rule, which may have none. `closed_starts` and `forced_starts`: shares of blocks that start anywhere, with the
    latents of `Start.CLOSED` and `Start.FORCED`; all other blocks start at patches. `full_blocks`: share of blocks that
    are masked entirely, as a draft is at first, whatever the t of their sequence. `decay`: in such blocks the weight in
    the loss falls by this factor from one position to the next, since a drafted byte counts only if all before it are
    right.

    `old_latents`: share of the closed starts that read a latent of up to `OLDEST` bytes before, as the later blocks of
    a BLT-DSV draft do. `refined_blocks`: share of the other blocks that show the bytes the model itself is surest of,
    as after denoising steps, instead of random ones.
    """

    patches: int
    max_patch_length: int | None
    block_sizes: tuple[int, ...] = (4, 8, 16)
    closed_starts: float = 0.33
    forced_starts: float = 0.0
    full_blocks: float = 0.0
    decay: float = 1.0
    old_latents: float = 0.0
    refined_blocks: float = 0.0

    def forced_rows(self, length: int) -> int:
        """Latents kept for the force-closed patches of a sequence of `length`: a quarter more than the mean."""
        most = length // TILE * (BLOCK_ROWS // min(self.block_sizes))
        return min(most, int(1.25 * most * self.forced_starts))


class Start(IntEnum):
    """Where a block starts, and which patch's latent it reads. s is the block's first position."""

    PATCH = 0  # starts at a patch; reads the patch before it, which is closed once byte s - 1 is known
    CLOSED = 1  # starts anywhere; reads the newest patch closed once byte s - 2 is known, or an older one, as drafts do
    FORCED = 2  # starts anywhere; reads the patch of byte s - 1, closed by force before s if it is open


Arrays = dict[str, NDArray]


def patch_arrays(starts: NDArray[np.bool_], config: LayoutConfig) -> Arrays:
    """Arrays for the patches and clean rows, from start flags [N, T + 1]:

    pool_index [N, P, L], the byte positions of each patch, and pool_inside bool [N, P, L], whether there is such a
    byte; clean_latent [N, T], the newest patch closed once byte p is known (design §2.3), and clean_valid bool [N, T],
    whether that patch is among the P that are kept.
    """
    count, length = starts.shape[0], starts.shape[1] - 1
    ordinal = starts.cumsum(1) - 1
    newest = ordinal[:, 1:] - 1
    first = np.full((count, config.patches), length, np.int64)
    last = np.full((count, config.patches), length, np.int64)
    for row in range(count):
        where = np.flatnonzero(starts[row, :length])
        ends = np.append(where[1:], length)[: config.patches]
        first[row, : len(ends)], last[row, : len(ends)] = where[: len(ends)], ends
    index = first[..., None] + np.arange(_longest(starts, config))
    inside = index < last[..., None]
    inside[..., 0] = True  # patches that do not exist pool some byte; no row reads their latents
    return {
        "pool_index": np.minimum(index, length - 1),
        "pool_inside": inside,
        "clean_latent": np.minimum(newest, config.patches - 1),
        "clean_valid": newest < config.patches,
    }


def block_arrays(
    ids: NDArray,
    starts: NDArray[np.bool_],
    noise: NDArray,
    sizes: NDArray,
    config: LayoutConfig,
    rng: np.random.Generator,
) -> Arrays:
    """Arrays for the blocks of ids [N, T] with noise t [N] and block sizes [N].

    For every block row, [N, T / TILE, BLOCK_ROWS]: block_start (of its block), block_position, block_latent,
    block_target (its byte), block_input (its byte or [MASK]), block_number (of its block in the tile), block_valid
    (whether it exists), block_masked, block_full (whether its block is one of the `full_blocks`), block_weight (in the
    loss: 1/t; in full blocks by position). With `refined_blocks` also block_shown: how many bytes its block is to show
    that the model is surest of (0: it shows those of block_input).

    For the patches that are closed by force, whose latents follow the kept ones: forced_index and forced_inside
    [N, F, L] as in `patch_arrays`, and forced_place [N, F], the number of the patch in the sequence.
    """
    count, length = ids.shape
    shape = (count, length // TILE, BLOCK_ROWS)
    start = np.zeros(shape, np.int64)
    exists = np.zeros(shape, bool)
    number = np.zeros(shape, np.int64)
    offset = np.zeros(shape, np.int64)
    latent = np.zeros(shape, np.int64)
    room = config.forced_rows(length)
    forced_first = np.zeros((count, room), np.int64)
    forced_end = np.ones((count, room), np.int64)
    forced_place = np.zeros((count, room), np.int64)
    patch_of = starts.cumsum(1) - 1
    for row in range(count):
        size = int(sizes[row])
        number[row], offset[row] = np.arange(BLOCK_ROWS) // size, np.arange(BLOCK_ROWS) % size
        of = patch_of[row]
        first_of = np.flatnonzero(starts[row])
        forced = 0
        for tile in range(shape[1]):
            chosen, kinds = choose_starts(starts[row], tile * TILE, BLOCK_ROWS // size, config, rng)
            known = np.where(kinds == Start.CLOSED, chosen - 1, chosen)
            if config.old_latents:
                old = (kinds == Start.CLOSED) & (rng.random(len(chosen)) < config.old_latents)
                known = np.where(old, np.maximum(known - rng.integers(1, OLDEST + 1, len(chosen)), 1), known)
            read = of[known] - 1
            usable = read < config.patches
            for block in np.flatnonzero((kinds == Start.FORCED) & ~starts[row, chosen] & usable):
                at = chosen[block]
                if forced == room:
                    usable[block] = False
                    continue
                read[block] = config.patches + forced
                forced_place[row, forced] = of[at]
                forced_first[row, forced], forced_end[row, forced] = first_of[of[at]], at
                forced += 1
            used = len(chosen) * size
            start[row, tile, :used], exists[row, tile, :used] = np.repeat(chosen, size), np.repeat(usable, size)
            latent[row, tile, :used] = np.repeat(np.where(usable, read, 0), size)
    position = start + offset
    valid = exists & (position < length)
    target = np.take_along_axis(ids, np.minimum(position, length - 1).reshape(count, -1), 1).reshape(shape)
    # Positions past the end get [MASK] as input, and have no loss.
    t = np.broadcast_to(noise[:, None, None], shape)
    full = np.zeros(shape, bool)
    if config.full_blocks:
        # One random decision for each block of each tile.
        full = np.take_along_axis(rng.random(shape) < config.full_blocks, number, 2)
        t = np.where(full, 1.0, t)
    masked = (rng.random(shape) < t) | ~valid
    # The weights of a full block sum to its size.
    size_of = np.broadcast_to(sizes[:, None, None], shape)
    falling = config.decay**offset * (size_of / _powers(config.decay, size_of))
    arrays = {
        "block_start": start,
        "block_position": position,
        "block_latent": latent,
        "block_target": target,
        "block_input": np.where(masked, MASK_ID, target),
        "block_number": number,
        "block_valid": valid,
        "block_masked": masked & valid,
        "block_full": full,
        "block_weight": np.where(t == 1.0, falling, 1 / t).astype(np.float32),
    }
    if config.refined_blocks:
        refined = np.take_along_axis(rng.random(shape) < config.refined_blocks, number, 2) & ~full
        shown = np.take_along_axis(rng.integers(1, size_of), number, 2)
        arrays["block_shown"] = np.where(refined, shown, 0)
        # As many bytes are shown in every such block, so its weights are known; they sum to its size.
        arrays["block_weight"] = np.where(refined, size_of / (size_of - shown), arrays["block_weight"]).astype(
            np.float32
        )
    if room:
        index = forced_first[..., None] + np.arange(_longest(starts, config))
        arrays["forced_index"] = np.minimum(index, length - 1)
        arrays["forced_inside"] = index < forced_end[..., None]
        arrays["forced_place"] = forced_place
    return arrays


def _longest(starts: NDArray[np.bool_], config: LayoutConfig) -> int:
    """The bytes that a patch of these sequences has at most: without a rule the next power of two, so that a compiled
    step meets few sizes."""
    if config.max_patch_length is not None:
        return config.max_patch_length
    longest = max(int(np.diff(np.flatnonzero(np.append(row[:-1], True))).max()) for row in starts)
    return 1 << (longest - 1).bit_length()


def _powers(factor: float, count: NDArray) -> NDArray:
    """1 + factor + ... + factor^(count - 1)."""
    return count.astype(np.float64) if factor == 1.0 else (1 - factor**count) / (1 - factor)


def choose_starts(
    starts: NDArray[np.bool_], first: int, count: int, config: LayoutConfig, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Up to `count` distinct block starts in [first, first + TILE), ascending, and the `Start` of each.

    None is before position 2: when decoding drafts, BOS and at least one byte are known.
    """
    places = np.arange(max(first, 2), first + TILE)
    away = config.closed_starts + config.forced_starts
    anywhere = rng.binomial(count, away)
    at_patches = rng.permutation(places[starts[places]])[: count - anywhere]
    others = rng.permutation(np.setdiff1d(places, at_patches, assume_unique=True))[: count - len(at_patches)]
    forced = rng.binomial(len(others), config.forced_starts / away) if config.forced_starts else 0
    kinds = np.repeat([Start.PATCH, Start.FORCED, Start.CLOSED], [len(at_patches), forced, len(others) - forced])
    chosen = np.concatenate([at_patches, others])
    order = np.argsort(chosen)
    return chosen[order], kinds[order]


def draw_noise(total: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """t ~ U(0, 1) for each of `total` sequences, stratified into `total` equal parts, and at least MIN_NOISE."""
    t = (rng.permutation(total) + rng.random(total)) / total
    return np.maximum(t, MIN_NOISE)
