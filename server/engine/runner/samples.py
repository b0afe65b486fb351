"""The samples of a decoder pass, and how results fetched from the device go back to its requests.

A sample is one row of the pass's logits [samples, 260], and the byte chosen from it. Samples of all causal rows come
first; those of all blocks follow, each block padded to the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastblt.kernels.types import Selection, Unmasked
from fastblt.kernels.unmasking import ONE_STEP
from fastblt.models.vocabulary import MASK_ID
from fastblt.server.decoding.method import Outcome
from fastblt.server.engine.runner.batch import Batch
from fastblt.server.engine.sequence import Planned, Sequence
from fastblt.server.request import ByteLogprobs


@dataclass(slots=True)
class Result(Outcome):
    """The outcome of one sequence's plan, with what only the engine needs of it.

    `logprobs` go with `ids`; `block_logprobs` with the block's positions, None where the step filled nothing. `bad`
    says why nothing could be chosen in a row (NOT_FINITE, NOTHING_LEFT), or 0. `entropies` (nats) are those of new
    bytes that went through the entropy model in the same pass, `scores` the log-probabilities of the prompt's rows in
    it. `extra_rows` counts the rows computed beyond the plan's own (`Plan.repeat`). `next_draft` is the draft that was
    made behind a verification in the same call.
    """

    logprobs: list[ByteLogprobs] | None = None
    block_logprobs: list[ByteLogprobs | None] | None = None
    bad: int = 0
    entropies: list[float] | None = None
    scores: list[ByteLogprobs] | None = None
    extra_rows: int = 0
    next_draft: DraftResult | None = None


@dataclass(slots=True)
class DraftResult(Outcome):
    """The outcome of a draft that was made behind a verification, in the same call (`Plan.next_length`).

    `bad` and `entropies` as in Result. The encoder has been through the rows before position `encoded`.
    """

    bad: int = 0
    entropies: list[float] = field(default_factory=list)
    encoded: int = 0


class CausalSamples:
    """The samples of causal rows; those of sequence i begin at `first_samples[i]`.

    `drafts` has, for every request that verifies, its samples int64 [drafts, longest + 1] and its draft's length.
    `ids_only`: nobody asks for log-probabilities.
    """

    def __init__(self, planned: list[Planned], batch: Batch, ids_only: bool) -> None:
        self._sequences = [sequence for sequence, _ in planned]
        self._plain = ids_only
        self.first_samples = batch.first_samples
        self.drafts: tuple[np.ndarray, np.ndarray] | None = None
        self._sample_counts = sample_counts = batch.sample_counts
        self._verifying: list[int] = []
        if max(sample_counts) > 1:
            self._verifying = [at for at, select in enumerate(sample_counts) if select > 1]
            firsts = np.array([self.first_samples[at] for at in self._verifying])
            lengths = np.array([sample_counts[at] - 1 for at in self._verifying])
            self.drafts = (firsts[:, None] + np.minimum(np.arange(max(sample_counts)), lengths[:, None]), lengths)
        self._values = _Values([] if ids_only else self._sequences)

    def results_of(self, chosen: Selection, accepted: Tensor | None, logits: Tensor) -> list[Tensor]:
        """Tensors to fetch for `take`."""
        tensors = [chosen.ids, chosen.bad, *self._values.tensors(chosen.logprobs, logits)]
        return tensors if accepted is None else [*tensors, accepted]

    def take(self, arrays: Iterator[np.ndarray], results: list[Result]) -> None:
        """Put the chosen bytes into the results; of a verification, the accepted ones and the byte after them."""
        ids, bad = next(arrays).tolist(), next(arrays)
        values = self._values.take(arrays)
        if self._verifying:
            for at, accepted in zip(self._verifying, next(arrays).tolist(), strict=True):
                results[at].accepted = accepted
        broken = bool(bad.any())
        for select, first, result in zip(self._sample_counts, self.first_samples, results, strict=True):
            if not select:
                continue
            chosen = result.ids = ids[first : first + result.accepted + 1]
            if broken:
                result.bad |= int(np.bitwise_or.reduce(bad[first : first + select]))
            if result.block_ids:
                result.block_ids = [chosen[-1], *result.block_ids[1:]]
        if not self._plain:
            for sequence, first, result in zip(self._sequences, self.first_samples, results, strict=True):
                if (top := sequence.params.logprobs) is not None and result.ids:
                    result.logprobs = [values.at(first + i, top) for i in range(len(result.ids))]


class BlockSamples:
    """The samples of block rows.

    `rows` int [blocks, longest] is the row in the pass for every position of every block; shorter blocks are padded
    with their last row, where `inside` bool is False.
    """

    def __init__(self, planned: list[Planned], batch: Batch, ids_only: bool) -> None:
        self.count = 0
        self.rows = np.empty((0, 0), dtype=np.int64)
        if batch.in_block is None:
            return
        self._offset = len(batch.sampled_rows)
        self._owners = [at for at, (_, plan) in enumerate(planned) if plan.block_ids]
        self._sequences = [planned[owner][0] for owner in self._owners]
        self._plans = [planned[owner][1] for owner in self._owners]
        self._sizes = [len(plan.block_ids) for plan in self._plans]
        self.count = len(self._sizes)
        rows, width = np.flatnonzero(batch.in_block), max(self._sizes)
        #: Whether all blocks have the same size: then there is no padding.
        self.even = len(rows) == self.count * width
        if self.even:
            self.rows = rows.reshape(self.count, width)
            self.inside = np.ones(self.rows.shape, dtype=bool)
        else:
            sizes, offsets = np.array(self._sizes)[:, None], np.arange(width)
            self.inside = offsets < sizes
            self.rows = rows[(sizes.cumsum() - sizes[:, 0])[:, None] + np.minimum(offsets, sizes - 1)]
        #: The denoising step of every block.
        self.steps = steps = [plan.unmask for plan in self._plans if plan.unmask is not None]
        self.everything = all(step.last_step or step.rule == ONE_STEP for step in steps)
        self._values = _Values([] if ids_only else self._sequences)

    def first(self, sequence: int) -> int:
        """The first sample of the sequence at this place in the batch."""
        return self._offset + self._owners.index(sequence) * self.rows.shape[1]

    def masked(self, ids: np.ndarray) -> np.ndarray:
        """Which samples a step may fill, given their ids: masked ones, but for a first byte that a causal row gives."""
        self._masked: np.ndarray = self.inside & (ids.reshape(self.rows.shape) == MASK_ID)
        behind = [plan.samples > 0 for plan in self._plans]
        if any(behind):
            self._masked[behind, 0] = False
        return self._masked.reshape(-1)

    def results_of(self, step: Unmasked, logits: Tensor) -> list[Tensor]:
        """Tensors to fetch for `take`."""
        return [step.ids, step.done, step.bad, *self._values.tensors(step.logprobs.view(-1), logits)]

    def take(self, arrays: Iterator[np.ndarray], results: list[Result]) -> None:
        """Put the blocks after the step into the results. A position that is still masked has MASK_ID."""
        filled, done, bad = next(arrays), next(arrays).tolist(), next(arrays).tolist()
        values = self._values.take(arrays)
        width = self.rows.shape[1]
        ids, fixed = filled.tolist(), (self._masked & (filled != MASK_ID)).astype(int).tolist()
        for at, (owner, size, sequence) in enumerate(zip(self._owners, self._sizes, self._sequences, strict=True)):
            result = results[owner]
            result.block_ids = ids[at][:size]
            result.block_steps = fixed[at][:size]
            result.block_done = bool(done[at])
            result.bad = bad[at]
            if sequence.params.logprobs is not None:
                top = sequence.params.logprobs
                result.block_logprobs = [
                    values.at(at * width + i, top) if now else None for i, now in enumerate(result.block_steps)
                ]


class _Values:
    """Log-probabilities of samples, where any of the sequences asks for them."""

    def __init__(self, sequences: list[Sequence]) -> None:
        asked = [s.params.logprobs for s in sequences if s.params.logprobs is not None]
        self._asked = bool(asked)
        self._most = max(asked, default=0)
        self._own: list[float] = []
        self._ids = np.empty((0, 0), dtype=np.uint16)
        self._best = np.empty((0, 0), dtype=np.float32)

    def tensors(self, own: Tensor, logits: Tensor) -> list[Tensor]:
        """Tensors to fetch: the chosen ids' values fp32 [samples], and the best ids with theirs."""
        if not self._asked:
            return []
        if not self._most:
            return [own]
        best = torch.topk(torch.log_softmax(logits, -1), self._most, -1)
        return [own, best.indices, best.values]

    def take(self, arrays: Iterator[np.ndarray]) -> _Values:
        if self._asked:
            self._own = next(arrays).tolist()
        if self._most:
            self._ids, self._best = next(arrays).astype(np.uint16), next(arrays).astype(np.float32)
        return self

    def at(self, sample: int, top: int) -> ByteLogprobs:
        """The value of one sample, with its `top` best alternatives."""
        if not top:
            return ByteLogprobs(self._own[sample])
        return ByteLogprobs(self._own[sample], self._ids[sample, :top].tobytes(), self._best[sample, :top].tobytes())
