"""How the bytes of a pass's rows are drawn: each row by the parameters of its owner, without penalties."""

from __future__ import annotations

from torch import Tensor

from fastblt.kernels.backend import use_triton
from fastblt.kernels.cpu.choice import Draws
from fastblt.kernels.rounds import BLOCK, OWNER, POSITION
from fastblt.kernels.types import SelectionParams


def row_draws_torch(draws: Draws, rows: Tensor) -> SelectionParams:
    """Of rows int32 [6, N] as `kernels/rounds.py` lays them out. A causal row gives the byte after it, a block row its
    own."""
    owners, positions = rows[OWNER], rows[POSITION] + (rows[BLOCK] < 0)
    values, integers = draws.values[:, owners], draws.integers[:, owners]
    return SelectionParams(
        temperature=values[0],
        top_p=values[1],
        min_p=values[2],
        top_k=integers[0],
        seeds=integers[1],
        positions=positions.long(),
        forbid_eos=positions < draws.eos_from[owners],
        sampled=True,
        truncated=True,
        penalized=False,
    )


def row_draws(draws: Draws, rows: Tensor) -> SelectionParams:
    """As `row_draws_torch`, by the implementation for the rows' device."""
    if use_triton(rows.device):
        from fastblt.kernels.gpu.row_draws import row_draws_triton

        return row_draws_triton(draws, rows)
    return row_draws_torch(draws, rows)
