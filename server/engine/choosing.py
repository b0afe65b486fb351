"""From logits to bytes: gathers each request's parameters for the selection kernels, and sorts out what they chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.noise import mix_seed
from kernels.selection import Selection, SelectionParams, select
from kernels.unmasking import ONE_STEP, unmask
from models.vocabulary import MASK_ID, VOCAB_SIZE
from server.decoding.method import Outcome
from server.engine.sequence import Sequence
from server.request import ByteLogprobs

#: A position that no request reaches.
_NEVER = 2**62


@dataclass
class Picks:
    """Which decoder rows give bytes: first those of all causal rows, then those of all block rows.

    Arrays over the picks: `index` is the row in the pass, `owners` the state row, `positions` the produced byte's.
    `extra` has the ids that penalties count on top of the committed ones, by pick. `causal` and `blocks` give each
    sequence its (first, count) of picks.
    """

    index: np.ndarray
    owners: np.ndarray
    positions: np.ndarray
    extra: dict[int, list[int]]
    causal: list[tuple[int, int]]
    blocks: list[tuple[int, int]]

    @property
    def count(self) -> int:
        return len(self.index)


@dataclass(slots=True)
class Result:
    """Of one sequence's plan: the outcome for its method, log-probabilities where asked for, and whether it failed.

    `logprobs` go with `outcome.ids`; a block's with the positions its step filled (None elsewhere).
    """

    outcome: Outcome
    logprobs: list[ByteLogprobs] | None = None
    block_logprobs: list[ByteLogprobs | None] | None = None
    bad: bool = False


class Chooser:
    """Selection parameters of every state row, and the passes' choices."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._device = device
        self._temperature = torch.zeros(rows)
        self._top_k = torch.zeros(rows, dtype=torch.int64)
        self._top_p = torch.ones(rows)
        self._min_p = torch.zeros(rows)
        self._seeds = torch.zeros(rows, dtype=torch.int64)
        self._repetition = torch.ones(rows)
        self._presence = torch.zeros(rows)
        self._frequency = torch.zeros(rows)
        self._bias = torch.zeros(rows, VOCAB_SIZE)
        self._counts = torch.zeros(rows, VOCAB_SIZE, dtype=torch.int32)
        self._prompt_seen = torch.zeros(rows, VOCAB_SIZE, dtype=torch.bool)
        # What a pass must know of its rows without asking every request: which work they need, and from which position
        # on EOS may stand.
        self._samples, self._truncates, self._penalizes = (np.zeros(rows, dtype=bool) for _ in range(3))
        self._eos_from = np.zeros(rows, dtype=np.int64)

    def admit(self, sequence: Sequence) -> None:
        """Note the parameters of a sequence, and the bytes it has already produced."""
        row, params = sequence.row, sequence.params
        self._samples[row] = not params.greedy
        self._truncates[row] = params.truncates
        self._penalizes[row] = params.penalizes
        self._eos_from[row] = _NEVER if params.ignore_eos else sequence.prompt_length + params.min_tokens
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = mix_seed(sequence.seed, sequence.request.choice)
        self._repetition[row] = params.repetition_penalty
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        # Also for a sequence without penalties: another row of its pass may have some, and the row's last owner had.
        self._bias[row] = 0.0
        self._counts[row] = 0
        self._prompt_seen[row] = False
        if params.penalizes:
            for token, value in params.logit_bias.items():
                self._bias[row, token] = value
            self._prompt_seen[row, torch.tensor(sequence.ids[: sequence.prompt_length])] = True
            self.commit(sequence, sequence.ids[sequence.prompt_length :])

    def commit(self, sequence: Sequence, ids: list[int]) -> None:
        """Count produced ids."""
        if sequence.params.penalizes and ids:
            self._counts[sequence.row] += torch.bincount(torch.tensor(ids), minlength=VOCAB_SIZE).int()

    def picks(self, sequences: list[Sequence], spans: list[tuple[int, int]]) -> Picks:
        """The rows of a pass that give bytes; `spans` are the sequences' (first, count) in the pass."""
        extra: dict[int, list[int]] = {}
        causal: list[tuple[int, int]] = []
        blocks: list[tuple[int, int]] = []
        # Stretches of picks: state row, first row in the pass, first position, count.
        stretches: list[tuple[int, int, int, int]] = []
        total = 0
        for sequence, (first, _) in zip(sequences, spans, strict=True):
            plan = sequence.plan
            assert plan is not None
            causal.append((total, plan.select))
            if plan.select:
                skip = plan.causal - plan.select
                stretches.append((sequence.row, first + skip, plan.start + skip + 1, plan.select))
                if sequence.draft and sequence.params.penalizes:
                    # Row i of a verification counts the drafted bytes before its own.
                    extra |= {total + i: sequence.draft[:i] for i in range(1, plan.select)}
                    if plan.draft:
                        extra[total] = sequence.draft
            total += plan.select
        for sequence, (first, _) in zip(sequences, spans, strict=True):
            plan = sequence.plan
            assert plan is not None
            size = len(plan.block_ids)
            blocks.append((total, size))
            if size:
                stretches.append((sequence.row, first + plan.causal, plan.end, size))
                if sequence.params.penalizes:
                    filled = [i for i in plan.block_ids if i != MASK_ID]
                    extra |= {total + i: filled for i in range(size)}
            total += size
        table = np.array(stretches, dtype=np.int64).reshape(-1, 4)
        counts = table[:, 3]
        owners, rows, positions = np.repeat(table[:, :3], counts, axis=0).T
        offsets = np.arange(total) - np.repeat(counts.cumsum() - counts, counts)
        return Picks(rows + offsets, owners, positions + offsets, extra, causal, blocks)

    def select(self, sequences: list[Sequence], picks: Picks, logits: Tensor) -> list[Result]:
        """Choose a byte for every pick from logits fp32 [picks, 260], and fill the blocks."""
        params = self._params(picks)
        causal = picks.blocks[0][0]
        results = [Result(Outcome()) for _ in sequences]
        if causal:
            some = params if causal == picks.count else _part(params, 0, causal)
            self._take_causal(
                sequences, picks, logits[:causal], select(logits[:causal], some, need_statistics=False), results
            )
        if causal < picks.count:
            self._take_blocks(sequences, picks, logits[causal:], _part(params, causal, picks.count), results)
        return results

    def _params(self, picks: Picks) -> SelectionParams:
        owners = torch.from_numpy(picks.owners)
        sampled = bool(self._samples[picks.owners].any())
        penalized = bool(self._penalizes[picks.owners].any())
        forbid_eos = picks.positions < self._eos_from[picks.owners]
        device = self._device
        counts = prompt_seen = bias = None
        if penalized:
            counts, prompt_seen, bias = self._counts[owners], self._prompt_seen[owners], self._bias[owners]
            for at, extra in picks.extra.items():
                if extra:
                    counts[at] += torch.bincount(torch.tensor(extra), minlength=VOCAB_SIZE).int()
            counts, prompt_seen, bias = counts.to(device), prompt_seen.to(device), bias.to(device)

        def drawing(values: Tensor) -> Tensor:
            # A greedy pass reads none of these: the null row's stand for all.
            return (values[owners] if sampled else values[:1].expand(len(owners))).to(device)

        return SelectionParams(
            temperature=drawing(self._temperature),
            top_k=drawing(self._top_k),
            top_p=drawing(self._top_p),
            min_p=drawing(self._min_p),
            seeds=drawing(self._seeds),
            positions=torch.from_numpy(picks.positions).to(device),
            forbid_eos=torch.from_numpy(forbid_eos).to(device),
            repetition=self._repetition[owners].to(device) if penalized else None,
            presence=self._presence[owners].to(device) if penalized else None,
            frequency=self._frequency[owners].to(device) if penalized else None,
            counts=counts,
            prompt_seen=prompt_seen,
            bias=bias,
            sampled=sampled,
            truncated=bool(self._truncates[picks.owners].any()),
            penalized=penalized,
        )

    def _take_causal(
        self, sequences: list[Sequence], picks: Picks, logits: Tensor, chosen: Selection, results: list[Result]
    ) -> None:
        ids, bad = chosen.ids.tolist(), chosen.bad.tolist()
        healthy = True not in bad
        for sequence, (first, count), result in zip(sequences, picks.causal, results, strict=True):
            result.outcome.ids = ids[first : first + count]
            result.bad = not healthy and any(bad[first : first + count])
            if sequence.params.logprobs is not None and count and not result.bad:
                span = slice(first, first + count)
                result.logprobs = _logprobs(logits[span], result.outcome.ids, sequence.params.logprobs)

    def _take_blocks(
        self, sequences: list[Sequence], picks: Picks, logits: Tensor, params: SelectionParams, results: list[Result]
    ) -> None:
        """One unmasking step of every block in the pass, padded to the longest."""
        base = picks.blocks[0][0]
        blocks = [
            (sequence, first - base, count, result)
            for sequence, (first, count), result in zip(sequences, picks.blocks, results, strict=True)
            if count
        ]
        plans = [sequence.plan for sequence, *_ in blocks if sequence.plan is not None]
        counts = np.array([count for _, _, count, _ in blocks])
        widest = int(counts.max())
        inside = np.arange(widest) < counts[:, None]
        ids = np.zeros(inside.shape, dtype=np.int64)
        ids[inside] = list(chain.from_iterable(plan.block_ids for plan in plans))
        masked = ids == MASK_ID
        # Where a causal row goes before the block, it gives the first byte.
        masked[[plan.select > 0 for plan in plans], 0] = False
        if not inside.all():
            rows = np.where(inside, (counts.cumsum() - counts)[:, None] + np.arange(widest), 0)
            index = torch.from_numpy(rows.reshape(-1)).to(self._device)
            padded, params = logits[index], _at(params, index)
        else:
            padded = logits
        unmasks = [plan.unmask for plan in plans if plan.unmask is not None]
        step = unmask(
            padded.view(len(blocks), widest, -1),
            torch.from_numpy(masked).to(self._device),
            torch.from_numpy(ids).to(self._device),
            params,
            torch.tensor([u.rule for u in unmasks], device=self._device),
            torch.tensor([u.bound for u in unmasks], device=self._device),
            torch.tensor([u.last_step for u in unmasks], device=self._device),
            everything=all(u.last_step or u.rule == ONE_STEP for u in unmasks),
        )
        new, done, bad = step.ids.tolist(), step.done.tolist(), step.bad.tolist()
        for at, (sequence, first, count, result) in enumerate(blocks):
            outcome = result.outcome
            # What is still masked has kept its id, [MASK].
            outcome.block_ids = new[at][:count]
            if plans[at].select:
                outcome.block_ids[0] = outcome.ids[-1]
            outcome.block_done = done[at]
            result.bad = result.bad or bad[at]
            if sequence.params.logprobs is not None and not result.bad:
                fixed = masked[at, :count] & (np.array(new[at][:count]) != MASK_ID)
                # What is still masked has no byte to give a value for; any id will do.
                given = [token if token != MASK_ID else 0 for token in new[at][:count]]
                values = _logprobs(logits[first : first + count], given, sequence.params.logprobs)
                result.block_logprobs = [v if f else None for v, f in zip(values, fixed, strict=True)]


def _logprobs(logits: Tensor, ids: list[int], top: int) -> list[ByteLogprobs]:
    """Log-softmax of raw logits [n, 260] at the chosen ids, with the `top` best alternatives."""
    values = torch.log_softmax(logits, -1)
    own = values[torch.arange(len(ids)), torch.tensor(ids)].tolist()
    best = torch.topk(values, top, -1) if top else None
    tops = [[] for _ in ids] if best is None else [
        list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]  # fmt: skip
    return [ByteLogprobs(value, alternatives) for value, alternatives in zip(own, tops, strict=True)]


def _part(params: SelectionParams, start: int, end: int) -> SelectionParams:
    return _map(params, lambda tensor: tensor[start:end])


def _at(params: SelectionParams, index: Tensor) -> SelectionParams:
    return _map(params, lambda tensor: tensor[index])


def _map(params: SelectionParams, change: Callable[[Tensor], Tensor]) -> SelectionParams:
    tensors: dict[str, Any] = {name: change(value) for name, value in vars(params).items() if isinstance(value, Tensor)}
    return replace(params, **tensors)
