"""How the global transformer is split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastblt.models.blt import GlobalTransformer
from fastblt.models.config import ConfigError, StackConfig
from fastblt.models.tensor_parallel import check_split, split_transformer, split_weights
from tests.tiny import tiny_config

STACK = StackConfig(96, 2, 6, 2, 160, 500000.0)


class Alone:
    """The exchange of a rank without others: what it is given goes nowhere."""

    size = 2

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x), -1)


@pytest.mark.parametrize("exact", [False, True])
def test_every_split_weight_is_in_one_rank_and_fits_its_module(exact: bool) -> None:
    config = tiny_config(1, global_=STACK)
    weights = GlobalTransformer(config).state_dict()
    parts = [split_weights(weights, rank, 2, exact=exact) for rank in range(2)]
    for part in parts:
        split_transformer(config, Alone(), exact=exact).load_state_dict(part, strict=True, assign=True)
    for name, whole in weights.items():
        a, b = (part[name] if name in part else part[name.replace("weight", "part.weight")] for part in parts)
        if "norm" in name or "embedding" in name:
            assert torch.equal(a, whole) and torch.equal(b, whole)
        else:
            rows = not exact and ("o_proj" in name or "down_proj" in name)
            assert torch.equal(torch.cat((a, b), 1 if rows else 0), whole)
            assert a.untyped_storage().nbytes() == a.nbytes, "a view keeps the whole in memory"


@pytest.mark.parametrize("rows", [8, 16, 40, 256])
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 256), (256, 704), (704, 256), (96, 64), (1024, 2816)])
def test_columns_are_exact_and_rows_are_not(inputs: int, outputs: int, rows: int) -> None:
    """What `exact` rests on: a product's columns have the same bits in a part of them."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    whole = F.linear(x, weight)
    assert torch.equal(torch.cat([F.linear(x, part.clone()) for part in weight.chunk(2)], -1), whole)
    (a, b), (v, w) = x.chunk(2, 1), weight.chunk(2, 1)
    summed = F.linear(a, v.contiguous()) + F.linear(b, w.contiguous())
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("size", "name"), [(4, "num_heads"), (3, "num_kv_heads"), (7, "num_heads")])
def test_a_split_that_does_not_divide(size: int, name: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {size} does not divide .* {name}"):
        check_split(tiny_config(1, global_=STACK), size)
