"""Selection and unmasking in one launch, against the oracle and the torch path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.kernels.unmasking import ONE_STEP, unmask, unmask_torch
from tests.kernels.poison import written
from tests.kernels.rows import pack, random_logits
from tests.kernels.test_unmasking import (  # noqa: F401
    check,
    random_blocks,
    test_bad_rows_are_reported_where_masked_and_never_stall,
)
from tests.oracles.selection_oracle import Row

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("requests", "size", "dtype"), [(1, 1, DTYPES[0]), *((3, 7, d) for d in DTYPES), (1, 32, DTYPES[1])]
)
def test_random_blocks(requests: int, size: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([requests, size, dtype.itemsize])
    logits, masked, ids, rows = random_blocks(rng, requests, size)
    if size == 32:
        masked[0, :20] = True
        logits = torch.as_tensor(np.stack([random_logits(rng, "peaked") for _ in rows])).view_as(logits)
    logits = logits.to(dtype)
    control = [
        torch.as_tensor(rng.integers(0, 4, requests)),
        torch.as_tensor(rng.choice([0.1, 0.5, 2.0, 12.0], requests)).float(),
        torch.as_tensor(rng.random(requests) < 0.1),
    ]
    result = unmask(logits, masked, ids, pack(rows), *control)
    written(result)
    check(result, logits, masked, ids, rows, control)
    plain = unmask_torch(logits, masked, ids, pack(rows), *control)
    for name in ("ids", "masked", "count", "done", "bad"):
        assert torch.equal(getattr(result, name), getattr(plain, name)), name
    torch.testing.assert_close(result.logprobs, plain.logprobs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_causal_rows_and_blocks_share_a_launch() -> None:
    """A causal row is a block with its first position masked alone; it gets what `select` gives it."""
    rng = np.random.default_rng(9)
    logits, masked, ids, rows = random_blocks(rng, 4, 5)
    masked[:2] = False
    masked[:2, 0] = True
    logits[:2, 0] = torch.as_tensor(np.stack([random_logits(rng, "normal") for _ in range(2)]))
    rule = torch.tensor([ONE_STEP, ONE_STEP, 0, 1])
    control = [rule, torch.tensor([0.0, 0.0, 0.4, 3.0]), torch.zeros(4, dtype=torch.bool)]
    result = unmask(logits, masked, ids, pack(rows), *control)
    check(result, logits, masked, ids, rows, control)
    assert result.done[:2].all() and result.count[:2].tolist() == [1, 1]


def test_a_block_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(10)
    logits, masked, ids, rows = random_blocks(rng, 3, 4)
    rows = [Row(temperature=1.0, seed=i, position=7 + i) for i in range(12)]
    control = [torch.tensor([0, 1, 2]), torch.tensor([0.3, 2.0, 2.0]), torch.zeros(3, dtype=torch.bool)]
    together = unmask(logits, masked, ids, pack(rows), *control)
    for r in range(3):
        mine = [values[r : r + 1] for values in (logits, masked, ids)]
        alone = unmask(*mine, pack(rows[4 * r : 4 * r + 4]), *(values[r : r + 1] for values in control))
        for name, value in vars(alone).items():
            assert torch.equal(value.nan_to_num(nan=9.0), getattr(together, name)[r : r + 1].nan_to_num(nan=9.0)), name
