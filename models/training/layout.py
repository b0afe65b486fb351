"""Where everything stands in a BLT-D training step: patches, blocks and noise as arrays of fixed shapes.

The decoder's rows are laid out in tiles (digest §3.2): tile s of a sequence holds the clean rows of positions
[TILE s, TILE (s+1)) and then `BLOCK_ROWS` rows of the blocks that start there. All blocks of a
sequence have one size, and they overlap freely; of the possible starts a random choice fills the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.training.attention import TILE
from models.vocabulary import MASK_ID

#: Block rows to a tile, a multiple of every block size.
BLOCK_ROWS = 48
MIN_NOISE = 0.1


@dataclass(frozen=True)
class LayoutConfig:
    """`patches`: latents kept per sequence (rows that would need a later one have no loss); `max_patch_length`: of the
    patch rule; `random_starts`: share of blocks that start anywhere, as the drafts of one-pass rounds do, instead of at
    a patch; `full_blocks`: share of blocks that are masked altogether, as drafts are when they begin, whatever their
    sequence's t; `decay`: factor from one position of such a block to the next of the weight in the loss, for a draft's
    byte counts only if all before it were right."""

    patches: int
    max_patch_length: int
    block_sizes: tuple[int, ...] = (4, 8, 16)
    random_starts: float = 0.33
    full_blocks: float = 0.0
    decay: float = 1.0


Arrays = dict[str, NDArray]


def patch_arrays(starts: NDArray[np.bool_], config: LayoutConfig) -> Arrays:
    """Of start flags [N, T + 1]:

    pool_index [N, P, L] byte positions of each patch, pool_inside bool likewise; clean_latent [N, T] the newest patch
    closed once byte p is known (digest §2.3), clean_valid bool [N, T] whether it is among the P kept.
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
    index = first[..., None] + np.arange(config.max_patch_length)
    inside = index < last[..., None]
    inside[..., 0] = True  # patches that do not exist read some byte; nothing reads them
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
    """Blocks of ids [N, T] with noise t [N] and block sizes [N]. Of every block row, [N, T / TILE, BLOCK_ROWS]:

    block_start (where its block starts), block_position, block_latent, block_target (its own byte), block_input (that
    or [MASK]), block_number (which of the tile's blocks), block_valid (it exists, so it may count in the loss),
    block_masked, block_weight (of its loss: 1/t, by position in full blocks).

    A block at a patch reads the patch before it. A block anywhere at s reads the newest patch that closed once byte
    s - 2 was known: the latent that a one-pass round's verification left, in which byte s - 1 had no row.
    """
    count, length = ids.shape
    shape = (count, length // TILE, BLOCK_ROWS)
    start = np.zeros(shape, np.int64)
    exists = np.zeros(shape, bool)
    number = np.zeros(shape, np.int64)
    offset = np.zeros(shape, np.int64)
    lag = np.zeros(shape, np.int64)
    size_of = np.broadcast_to(sizes[:, None, None], shape)
    newest = starts.cumsum(1) - 2  # of a block at s: the newest patch closed once byte s - 1 is known
    for row in range(count):
        size = int(sizes[row])
        number[row], offset[row] = np.arange(BLOCK_ROWS) // size, np.arange(BLOCK_ROWS) % size
        for tile in range(shape[1]):
            chosen, anywhere = choose_starts(starts[row], tile * TILE, BLOCK_ROWS // size, config, rng)
            used = len(chosen) * size
            start[row, tile, :used], exists[row, tile, :used] = np.repeat(chosen, size), True
            lag[row, tile, :used] = np.repeat(anywhere, size)
    position = start + offset
    latent = np.take_along_axis(newest, np.maximum(start - lag, 0).reshape(count, -1), 1).reshape(shape)
    valid = exists & (position < length) & (latent < config.patches)
    target = np.take_along_axis(ids, np.minimum(position, length - 1).reshape(count, -1), 1).reshape(shape)
    # What lies past the end is shown as masked, and is not asked for.
    t = np.broadcast_to(noise[:, None, None], shape)
    if config.full_blocks:
        # One draw for every block number of every tile.
        full = rng.random(shape) < config.full_blocks
        t = np.where(np.take_along_axis(full, number, 2), 1.0, t)
    masked = (rng.random(shape) < t) | ~valid
    # The weights of a full block add up to its size.
    falling = config.decay**offset
    falling = falling * (size_of / _powers(config.decay, size_of))
    weight = np.where(t == 1.0, falling, 1 / t)
    return {
        "block_start": start,
        "block_position": position,
        "block_latent": np.clip(latent, 0, config.patches - 1),
        "block_target": target,
        "block_input": np.where(masked, MASK_ID, target),
        "block_number": number,
        "block_valid": valid,
        "block_masked": masked & valid,
        "block_weight": weight.astype(np.float32),
    }


def _powers(factor: float, count: NDArray) -> NDArray:
    """1 + factor + ... + factor^(count - 1)."""
    return count.astype(np.float64) if factor == 1.0 else (1 - factor**count) / (1 - factor)


def choose_starts(
    starts: NDArray[np.bool_], first: int, count: int, config: LayoutConfig, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Up to `count` distinct block starts in [first, first + TILE), ascending, and which are of the kind "anywhere".

    No draft begins before position 2: BOS and a byte are known by then.
    """
    places = np.arange(max(first, 2), first + TILE)
    anywhere = rng.binomial(count, config.random_starts)
    at_patches = rng.permutation(places[starts[places]])[: count - anywhere]
    others = rng.permutation(np.setdiff1d(places, at_patches, assume_unique=True))[: count - len(at_patches)]
    chosen = np.concatenate([at_patches, others])
    order = np.argsort(chosen)
    return chosen[order], (np.arange(len(chosen)) >= len(at_patches))[order]


def draw_noise(total: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """t ~ U(0, 1) for each of `total` sequences, one from each of `total` equal strata, clamped from below."""
    t = (rng.permutation(total) + rng.random(total)) / total
    return np.maximum(t, MIN_NOISE)
