"""How bytes are chosen within C calls that go on with them (`multi_step`, `decoder_steps`): by each request's own
parameters, without penalties.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastblt.kernels.cpu.dense import Packed
from fastblt.kernels.cpu.structs import Choice
from fastblt.kernels.request_ids import RequestIds
from fastblt.kernels.selection import EOS


@dataclass(frozen=True)
class Draws:
    """How each request's bytes are drawn, by state row; changed in place as requests come and go."""

    values: Tensor  # fp32 [>= 3, rows]: temperature (0 is greedy), top-p, min-p
    integers: Tensor  # int64 [2, rows]: top-k (0 is off), seed
    eos_from: Tensor  # int64 [rows]: the first position at which EOS may stand


class Choices:
    """For each kind of batch, what C code chooses by. All tensors must outlive it."""

    def __init__(self, draws: Draws, head: Packed, ids: RequestIds) -> None:
        # What pointers point to must live.
        self._own = (draws, head, ids)
        temperature, top_p, min_p = (row.data_ptr() for row in draws.values[:3])
        top_k, seeds = (row.data_ptr() for row in draws.integers)
        common = {
            "head": head.pointer,
            "eos_from": draws.eos_from.data_ptr(),
            "texts": ids.ids.data_ptr() + ids.pad * ids.ids.element_size(),
            "stride": ids.ids.stride(0),
            "vocabulary": head.outputs,
            "eos": EOS,
        }
        drawn = {"temperature": temperature, "seeds": seeds}
        self._greedy = Choice(**common)
        self._sampled = Choice(**common, **drawn)
        self._truncated = Choice(**common, **drawn, top_k=top_k, top_p=top_p, min_p=min_p)

    def of(self, *, sampled: bool, truncated: bool) -> Choice:
        """By whether a row draws, and whether one truncates."""
        if not sampled:
            return self._greedy
        return self._truncated if truncated else self._sampled
