"""Arguments and results of operations. The C, Triton and torch versions share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Why a row is bad: because of its logits, or because of its parameters (`selection.py`). Bits, to be combined by `|`.
NOT_FINITE, NOTHING_LEFT = 1, 2


@dataclass
class SelectionParams:
    """Parameters of N rows: tensors on the logits' device.

    The booleans are about the whole batch: whether any row samples, truncates, or has penalties or a bias. Work that no
    row needs is skipped. A row that does not need it gets the same result either way. Without `penalized` the six
    fields from `repetition` to `bias` are not read. With it, each may still be None.
    """

    temperature: Tensor  # fp32 [N], 0 is greedy
    top_k: Tensor  # int64 [N], 0 is off
    top_p: Tensor  # fp32 [N], 1 is off
    min_p: Tensor  # fp32 [N], 0 is off
    seeds: Tensor  # int64 [N], from `mix_seed`
    positions: Tensor  # int64 [N], absolute position of the produced byte
    forbid_eos: Tensor  # bool [N]
    sampled: bool
    truncated: bool
    penalized: bool
    repetition: Tensor | None = None  # fp32 [N], 1 is off
    presence: Tensor | None = None  # fp32 [N]
    frequency: Tensor | None = None  # fp32 [N]
    counts: Tensor | None = None  # int32 [N, 260], how often each id was produced
    prompt_seen: Tensor | None = None  # bool [N, 260]
    bias: Tensor | None = None  # fp32 [N, 260], finite or -inf
    allowed: Tensor | None = None  # bool [N, 260], what a grammar or UTF-8 leaves; None allows every id


@dataclass
class Selection:
    """The chosen id of each row, with its statistics."""

    ids: Tensor  # int64 [N]
    logprobs: Tensor  # fp32 [N], without meaning in a bad row
    confidence: Tensor | None  # fp32 [N], None unless asked for; NaN in a bad row
    entropy: Tensor | None  # fp32 [N], likewise
    bad: Tensor  # uint8 [N], 0, NOT_FINITE or NOTHING_LEFT


@dataclass(frozen=True)
class RaggedRows:
    """The places of a pass's N rows in one group of paged caches. Rows of one request are adjacent.

    A row attends to the positions [low, high) of its own request (`kernels/paged_attention.py`).
    """

    table: Tensor  # int32 [requests, pages]: the page of each run of `page_size` positions
    rows: Tensor  # int32 [N]: the row's request, as a row of `table`
    positions: Tensor  # int32 [N]: the row's position, below `length`
    firsts: Tensor  # int32 [N]: the position that its window is counted from: its own, or its block's first
    highs: Tensor  # int32 [N]: where its range ends
    spans: list[tuple[int, int]]  # (first row, row count) of each request: the torch path's batches, Triton's longest
    length: int
    page_size: int
    window: int | None = None  # positions; None: a row's range begins at 0

    @cached_property
    def lows(self) -> Tensor:
        """The start of each row's range, int32 [N]."""
        if self.window is None:
            return torch.zeros_like(self.firsts)
        return (self.firsts + (1 - self.window)).clamp_min_(0)


@dataclass
class Unmasked:
    """Blocks after a denoising step. Only positions that were masked have changed."""

    ids: Tensor  # int64 [R, B]
    masked: Tensor  # bool [R, B], what is still masked
    count: Tensor  # int64 [R], how many were fixed
    done: Tensor  # bool [R], none is masked any more
    logprobs: Tensor  # fp32 [R, B] of the positions fixed in this step, NaN elsewhere
    bad: Tensor  # uint8 [R], why masked rows could not be selected from (as in Selection, joined), or 0
