from __future__ import annotations

import torch

from fastblt.benchmarks.checkpoint.patch_precision import measure, tf32


def test_tf32_keeps_ten_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = tf32(x)
    assert not bool((rounded.view(torch.int32) & 0x1FFF).any())
    assert bool(((rounded - x).abs() <= x.abs() * 2**-11).all())
    assert torch.equal(tf32(rounded), rounded)


def test_less_precision_moves_few_boundaries() -> None:
    found = measure(pieces=3, length=200)
    assert found["boundaries"] > 60
    for moved in found["moved"].values():
        # Rounded at all, and hardly felt.
        assert 0 < moved["nats"] < 0.5 and moved["share"] < 0.1
