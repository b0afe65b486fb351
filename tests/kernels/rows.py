"""Random rows for the selection kernels, their packing into tensors, and draws from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastblt.kernels.selection import select
from fastblt.kernels.types import Selection, SelectionParams
from tests.oracles.selection_oracle import Row

LOGITS = ("normal", "ties", "constant", "peaked", "extreme", "sparse", "alone", "nan", "infinite", "nothing")


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device that the tests run on: the default one."""
    return tensor.to(torch.get_default_device())


def random_logits(rng: np.random.Generator, kind: str) -> np.ndarray:
    """One row of fp32 logits of one of LOGITS; the last three are bad."""
    logits = rng.normal(0, 3, 260).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "constant":
        logits[:] = rng.normal()
    elif kind == "peaked":
        logits[rng.integers(4, 260)] += 30
    elif kind == "extreme":
        logits = rng.choice(np.array([-1e30, -1e4, -88, 0, 88, 1e4, 1e30], dtype=np.float32), 260)
    elif kind == "sparse":
        logits[rng.random(260) < 0.9] = -np.inf
        logits[100] = 0
    elif kind == "alone":
        logits[:] = -np.inf
        logits[rng.integers(4, 260)] = rng.normal()
    elif kind == "nan":
        logits[rng.integers(0, 260)] = np.nan
    elif kind == "infinite":
        logits[rng.integers(0, 260)] = np.inf
    elif kind == "nothing":
        logits[4:] = -np.inf
        logits[2] = -np.inf
    return logits


def random_row(rng: np.random.Generator) -> Row:
    """Parameters of which each is off about half of the time."""

    def maybe(values: Sequence[float], off: float) -> float:
        return float(rng.choice(np.asarray(values, dtype=np.float64))) if rng.random() < 0.5 else off

    row = Row(
        temperature=float(rng.choice([0, 0, 1e-44, 1e-37, 1e-6, 0.01, 0.3, 0.7, 1, 1.5, 5, 100, 1e6])),
        top_k=int(maybe([1, 2, 5, 40, 256, 260, 1000], 0)),
        top_p=maybe([0, 1e-6, 0.1, 0.5, 0.9, 0.999], 1),
        min_p=maybe([1e-6, 0.05, 0.3, 1], 0),
        seed=int(rng.integers(-(2**63), 2**63 - 1)),
        position=int(rng.integers(0, 2 ** int(rng.integers(1, 40)))),
        forbid_eos=bool(rng.random() < 0.5),
    )
    if rng.random() < 0.5:
        row.repetition = float(rng.choice([0.5, 1, 1.1, 2]))
        row.presence = float(rng.choice([-1, 0, 0.3, 2]))
        row.frequency = float(rng.choice([-0.5, 0, 0.1, 2]))
        row.counts = rng.poisson(0.2, 260).tolist()
        row.prompt_seen = (rng.random(260) < 0.2).tolist()
    if rng.random() < 0.3:
        row.bias = np.where(rng.random(260) < 0.3, -np.inf, rng.choice([0, 0, 5, -5], 260)).tolist()
    if rng.random() < 0.3:
        row.allowed = (rng.random(260) < rng.choice([0.02, 0.5, 0.99])).tolist()
    return row


def needs(row: Row) -> tuple[bool, bool, bool]:
    """Whether a row needs sampling, truncation, penalties."""
    penalized = row.repetition != 1 or row.presence != 0 or row.frequency != 0 or any(row.bias)
    return row.temperature > 0, row.top_k > 0 or row.top_p < 1 or row.min_p > 0, penalized


def pack(rows: Sequence[Row], flags: tuple[bool, bool, bool] = (False, False, False)) -> SelectionParams:
    """The tensors of the rows; `flags` may ask for more work than they need."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(row, name) for row in rows], dtype=dtype)

    sampled, truncated, penalized = (
        flag or any(needed) for flag, needed in zip(flags, zip(*map(needs, rows), strict=True), strict=True)
    )
    params = SelectionParams(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int64),
        top_p=column("top_p", torch.float32),
        min_p=column("min_p", torch.float32),
        seeds=column("seed", torch.int64),
        positions=column("position", torch.int64),
        forbid_eos=column("forbid_eos", torch.bool),
        sampled=sampled,
        truncated=truncated,
        penalized=penalized,
    )
    if penalized:
        for name, dtype in (
            ("repetition", torch.float32),
            ("presence", torch.float32),
            ("frequency", torch.float32),
            ("counts", torch.int32),
            ("prompt_seen", torch.bool),
            ("bias", torch.float32),
        ):
            setattr(params, name, column(name, dtype))
    if not all(all(row.allowed) for row in rows):
        params.allowed = column("allowed", torch.bool)
    return params


def bits(selection: Selection) -> torch.Tensor:
    """Everything a selection says of each row, int64 [N, 5], bit for bit (any NaN is one NaN)."""
    columns = [selection.ids, selection.bad.long()]
    for values in (selection.logprobs, selection.confidence, selection.entropy):
        assert values is not None
        columns.append(torch.where(values.isnan(), -1, values.view(torch.int32).long()))
    return torch.stack(columns, dim=1)


def draws(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    choose: Callable[..., Selection] = select,
    **truncation: float,
) -> torch.Tensor:
    """One draw a row from the same logits [260]."""
    row = Row(temperature=1.0, **truncation)  # type: ignore[arg-type]
    drawn = []
    for seed, position in zip(seeds.split(256), positions.split(256), strict=True):
        params = pack([row])
        size = len(seed)
        for name in ("temperature", "top_k", "top_p", "min_p", "forbid_eos"):
            setattr(params, name, getattr(params, name).expand(size))
        params.seeds, params.positions = seed, position
        drawn.append(choose(logits.expand(size, 260), params, need_statistics=False).ids)
    return torch.cat(drawn)
