"""Log-probabilities of prompts: what each row of a prompt says of the byte after it.

A prompt is scored as its rows come through the decoder, chunk by chunk, so a pass holds the logits of no more than its
own rows. The last row of a prompt gives the first byte of the completion and is no part of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastblt.server.engine.sequence import Planned
from fastblt.server.request import ByteLogprobs

#: How many tensors `ScoredRows.tensors` gives.
TENSORS = 4


@dataclass
class ScoredRows:
    """Rows of a decoder pass that are scored.

    `rows` are their indexes in the pass, `targets` the ids after them. `parts` are (index in the batch, number of rows)
    of the sequences that they belong to, in order. `top` is the most alternatives that any of these asks for.
    """

    rows: list[int]
    targets: list[int]
    parts: list[tuple[int, int]]
    top: int

    @classmethod
    def of(cls, planned: list[Planned], spans: list[tuple[int, int]]) -> ScoredRows | None:
        """None where no row is scored. `spans` are (first row, count) of the sequences in the pass."""
        scored = cls([], [], [], 0)
        for at, (sequence, plan) in enumerate(planned):
            top = sequence.params.prompt_logprobs
            if top is None:
                continue
            # Rows that are computed again after a preemption have been scored.
            begin, end = max(plan.start, sequence.scored), min(plan.end, sequence.prompt_length - 1)
            if begin >= end:
                continue
            first = spans[at][0] - plan.start
            scored.rows += range(first + begin, first + end)
            scored.targets += sequence.ids[begin + 1 : end + 1]
            scored.parts.append((at, end - begin))
            scored.top = max(scored.top, top)
        return scored if scored.rows else None

    def tensors(self, logits: Tensor, targets: Tensor) -> list[Tensor]:
        """Tensors to fetch, from fp32 logits [n, 260] and the targets int64 [n]: their log-probabilities and ranks, and
        the best alternatives with theirs."""
        logprobs = torch.log_softmax(logits, -1)
        own = logprobs.gather(1, targets[:, None])
        ranks = (logprobs > own).sum(-1) + 1
        best = torch.topk(logprobs, self.top, -1)
        return [own.view(-1), ranks, best.indices, best.values]

    def take(self, arrays: list[np.ndarray], planned: list[Planned]) -> dict[int, list[ByteLogprobs]]:
        """The scores of each sequence, by its index in the batch."""
        own, ranks = arrays[0].tolist(), arrays[1].tolist()
        ids, values = arrays[2].astype(np.uint16), arrays[3].astype(np.float32)
        result: dict[int, list[ByteLogprobs]] = {}
        row = 0
        for at, count in self.parts:
            top = planned[at][0].params.prompt_logprobs
            result[at] = [
                ByteLogprobs(own[i], ids[i, :top].tobytes(), values[i, :top].tobytes(), ranks[i])
                for i in range(row, row + count)
            ]
            row += count
        return result
