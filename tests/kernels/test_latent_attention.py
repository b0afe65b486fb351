"""Both paths of the stored latents' attention against a float64 restatement, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastblt.kernels.cpu.native import library
from fastblt.kernels.latent_attention import stored_latent_attention, stored_latent_attention_torch


def test_the_native_path_is_there() -> None:
    assert library() is not None


@pytest.mark.parametrize("attend", [stored_latent_attention, stored_latent_attention_torch])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "keys", "dim"), [(4, 4, 2, 32), (4, 2, 1, 16), (6, 2, 4, 24), (3, 1, 2, 7)]
)
def test_against_the_definition(attend: Callable[..., Tensor], heads: int, kv_heads: int, keys: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(heads * dim)
    store = torch.randn(9, 3, 2, keys, kv_heads, dim, generator=generator)
    store[0] = float("nan")  # a slot that nobody reads
    q = torch.randn(13, heads, dim, generator=generator)
    slots = torch.randint(1, 9, (13,), generator=generator)
    out = attend(q, store, 2, slots)
    for row in range(13):
        k, v = store[slots[row], 2].double().numpy()
        for h in range(heads):
            group = h // (heads // kv_heads)
            query = q[row, h].double().numpy()
            scores = [float(query @ k[j, group]) / math.sqrt(dim) for j in range(keys)]
            weights = [math.exp(score - max(scores)) for score in scores]
            expected = sum(w / sum(weights) * v[j, group] for j, w in enumerate(weights))
            np.testing.assert_allclose(out[row, h].double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 13])
def test_a_row_does_not_depend_on_its_batch(count: int) -> None:
    store = torch.randn(5, 2, 2, 2, 4, 32)
    q, slots = torch.randn(13, 4, 32), torch.randint(0, 5, (13,))
    whole = stored_latent_attention(q, store, 1, slots)
    assert torch.equal(whole[:count], stored_latent_attention(q[:count], store, 1, slots[:count]))
