"""Figures of a checkpoint on held-out text: causal head, patch sizes, diffusion head. Also checks masks for leaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastblt.kernels.attention import masked_attention
from fastblt.models.blt import Blt, CausalAttention, LatentRows
from fastblt.models.layers import Rope, rotate
from fastblt.models.patching import PatchRule
from fastblt.models.training.entropy import measure, patch_starts
from fastblt.models.training.layout import LayoutConfig, Start, block_arrays, patch_arrays
from fastblt.models.training.objective import Objective

NOISE_LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)


def corpus_starts(model: Blt, chunks: NDArray) -> tuple[NDArray[np.bool_], float]:
    """Patch starts, bool [N, T + 1], of chunks [N, T], and the entropy model's bits per byte."""
    entropy, bits = measure(model.patcher, model.config.patcher, chunks)
    return patch_starts(entropy, PatchRule(model.config.patching_threshold, model.config.max_patch_length)), bits


@torch.inference_mode()
def evaluate(model: Blt, chunks: NDArray, masked: int = 12, batch: int = 4, seed: int = 0) -> dict[str, Any]:
    """Figures on held-out chunks, uint16 [N, T].

    The diffusion head is measured for each block size, share t of masked bytes and kind of start. Each of these costs a
    decoder pass, so only `masked` chunks, evenly spaced, are used. "closed" are the starts of BLT-DV's drafts, "forced"
    those of BLT-D's blocks (`layout.Start`).
    """
    starts, patcher_bits = corpus_starts(model, chunks)
    length = chunks.shape[1]
    patches = int(starts[:, :-1].sum(1).max())
    objective = Objective(model, length)
    nats, correct, rows = 0.0, 0, 0
    sizes = model.config.block_sizes
    tallies = {(kind, size, t): _Tally(size) for kind in Start for size in sizes for t in NOISE_LEVELS}
    every = -(-len(chunks) // masked)
    order = np.argsort(np.arange(len(chunks)) % every, kind="stable")
    for first in range(0, len(chunks), batch):
        chosen = order[first : first + batch]
        ids, begun = chunks[chosen].astype(np.int64), starts[chosen]
        states = objective.states(torch.from_numpy(ids))
        clean = closed = None
        for number, ((kind, size, t), tally) in enumerate(tallies.items()):
            layout = starts_of(kind, patches, model.config.max_patch_length or length, size)
            rng = np.random.default_rng([seed, first, number])
            blocks = block_arrays(ids, begun, np.full(len(ids), t), np.full(len(ids), size), layout, rng)
            arrays = {"ids": ids, **patch_arrays(begun, layout), **blocks}
            inputs = {k: torch.from_numpy(v) for k, v in arrays.items()}
            if kind == Start.FORCED or closed is None:
                latents = objective.latents(states, inputs)
                closed = latents[:, :patches]
            hidden = objective.decode(states, latents if kind == Start.FORCED else closed, inputs)
            logits, block = objective.project(hidden, len(ids))
            if clean is None:
                clean = logits
            if first >= masked:
                break
            tally.add(block.argmax(-1).numpy(), blocks)
        assert clean is not None
        target = torch.from_numpy(ids)[:, 1:].flatten()
        clean = clean[:, :-1].flatten(0, 1)
        nats += float(F.cross_entropy(clean, target, reduction="sum"))
        correct += int((clean.argmax(-1) == target).sum())
        rows += len(target)

    def of_kinds(figure: Callable[[Start, int], Any]) -> dict[str, Any]:
        return {kind.name.lower(): {f"B={size}": figure(kind, size) for size in sizes} for kind in Start}

    return {
        "bits_per_byte": round(nats / math.log(2) / rows, 4),
        "top1": round(correct / rows, 4),
        "patcher_bits_per_byte": round(patcher_bits, 4),
        "bytes_per_patch": round(starts[:, :-1].size / int(starts[:, :-1].sum()), 3),
        "masked_accuracy": of_kinds(lambda *key: {f"t={t}": tallies[*key, t].accuracy for t in NOISE_LEVELS}),
        "by_position": of_kinds(lambda *key: tallies[*key, 1.0].by_position),
        "leading_correct": of_kinds(lambda *key: tallies[*key, 1.0].leading),
    }


def starts_of(kind: Start, patches: int, max_patch_length: int, size: int) -> LayoutConfig:
    """A layout in which all blocks have one size and one kind of start."""
    return LayoutConfig(
        patches,
        max_patch_length,
        (size,),
        closed_starts=float(kind == Start.CLOSED),
        forced_starts=float(kind == Start.FORCED),
    )


class _Tally:
    """Counts right predictions of masked bytes in blocks of one size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._right = np.zeros(size)
        self._asked = np.zeros(size)
        self._runs: list[int] = []

    def add(self, predicted: NDArray, blocks: dict[str, NDArray]) -> None:
        right = (predicted == blocks["block_target"]).reshape(-1, self._size)
        masked = blocks["block_masked"].reshape(-1, self._size)
        self._right += (right & masked).sum(0)
        self._asked += masked.sum(0)
        whole = blocks["block_valid"].reshape(-1, self._size).all(1) & masked.all(1)
        self._runs += np.cumprod(right[whole], axis=1).sum(1).tolist()

    @property
    def accuracy(self) -> float:
        return round(float(self._right.sum() / max(1, self._asked.sum())), 4)

    @property
    def by_position(self) -> list[float]:
        return [round(float(x), 3) for x in self._right / np.maximum(1, self._asked)]

    @property
    def leading(self) -> float:
        return round(float(np.mean(self._runs)) if self._runs else 0.0, 3)


@dataclass(frozen=True)
class Leak:
    """The same blocks in the layout of training and in decoding.

    `largest` is the largest difference of a logit. Of `asked` masked bytes, `trained` and `served` are predicted right
    in each.
    """

    largest: float
    asked: int
    trained: int
    served: int


@torch.inference_mode()
def leak_check(
    model: Blt, ids: NDArray, starts: NDArray[np.bool_], kind: Start, size: int, seed: int = 0, blocks: int = 8
) -> Leak:
    """Compare the logits of blocks in the training layout with those in decoding.

    Decoding knows only the ids before the block: the model runs on that prefix alone, with the block appended. A leak
    in the training layout (a row that sees its own byte, or a later latent) shows as a large difference.
    """
    ids = ids.astype(np.int64)
    count, length = ids.shape
    patches = int(starts[:, :length].sum(1).max())
    config = starts_of(kind, patches, model.config.max_patch_length or length, size)
    rng = np.random.default_rng(seed)
    arrays = block_arrays(ids, starts, np.full(count, 0.6), np.full(count, size), config, rng)
    inputs = {"ids": ids, **patch_arrays(starts, config), **arrays}
    _, trained = Objective(model, length).logits({k: torch.from_numpy(v) for k, v in inputs.items()})
    flat = {k: v.reshape(count, -1, size) for k, v in arrays.items() if k.startswith("block_")}
    valid = np.argwhere(flat["block_valid"].all(2))
    largest, right = 0.0, np.zeros(3, int)
    for row, block in rng.permutation(valid)[:blocks]:
        start = int(flat["block_start"][row, block, 0])
        known, begun = ids[row, :start], starts[row, : start + 1]
        # The index of the latent that the block reads, for each kind of start. If the prefix ends within a patch, that
        # patch is closed by force.
        count_of = [int(begun[:start].sum()) - 1, int(begun.sum()) - 2, int(begun[:start].sum()) - 2]
        latent = {Start.FORCED: count_of[0], Start.PATCH: count_of[1], Start.CLOSED: count_of[2]}[kind]
        shown = torch.from_numpy(flat["block_input"][row, block])
        served = block_logits(model, torch.from_numpy(known), begun, shown, latent)
        ours = trained[row].reshape(-1, size, trained.shape[-1])[block]
        largest = max(largest, float((ours - served).abs().max()))
        asked = flat["block_masked"][row, block]
        guesses = [(logits.argmax(-1).numpy() == flat["block_target"][row, block])[asked] for logits in (ours, served)]
        right += [int(asked.sum()), *(int(guess.sum()) for guess in guesses)]
    return Leak(largest, *right.tolist())


@torch.inference_mode()
def block_logits(model: Blt, ids: Tensor, starts: NDArray[np.bool_], block: Tensor, latent: int) -> Tensor:
    """Logits [B, 260] of a block of decoder inputs [B] after the known `ids` [s]. It reads the latent with index
    `latent`.

    `starts` [s + 1] are the patch starts; the last entry says whether the block's first byte opens a patch.
    """
    known, size = len(ids), len(block)
    flags = torch.from_numpy(starts)[None]
    out = model(ids[None], flags)
    read = torch.full((size,), latent)
    newest = torch.cat([flags.long().cumsum(-1)[0, 1:] - 2, read])
    kv = model.local_decoder.latent_keys_values(out.latents)[0, newest][None]
    states = model.local_encoder(
        model.embed(model.windows(ids[None])), CausalAttention(model.config.encoder, known, ids.device)
    )
    rows = torch.cat([model.decoder_rows(ids[None], states), model.local_decoder.embed_tokens(block[None])], 1)
    stack = model.config.decoder
    window = stack.window or known + size
    places = torch.arange(known + size)
    low = torch.where(places < known, places, known) - window + 1
    high = torch.where(places < known, places + 1, known + size)
    mask = ((places >= low[:, None]) & (places < high[:, None]))[None]
    turns = Rope(stack.head_dim, stack.rope_theta).at(places, known + size)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(rotate(q, turns), rotate(k, turns), v, mask)

    return model.lm_head(model.local_decoder(rows, attend, LatentRows(kv)))[0, known:]
