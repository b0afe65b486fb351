"""The tiny models that other tests run: shapes that kernels take, and patches of a usable length."""

from __future__ import annotations

import pytest
import torch

from fastblt.models.config import BltConfig
from fastblt.models.reference import generate
from fastblt.models.reference_selection import SamplingOptions
from tests.tiny import random_ids, tiny_config, tiny_model


def test_shapes() -> None:
    configs = [tiny_config(seed) for seed in range(60)]
    for config in configs:
        assert BltConfig.from_dict(config.to_dict()) == config
        for stack in (config.patcher, config.encoder, config.global_, config.decoder):
            assert stack.hidden_size % 16 == 0 and stack.intermediate_size % 32 == 0 and stack.head_dim == 16
    assert {config.has_diffusion for config in configs} == {True, False}
    assert {config.decoder_input for config in configs} == {"encoder", "embedding"}
    assert any(config.decoder.num_kv_heads < config.decoder.num_heads for config in configs)
    assert any(config.encoder.hidden_size * config.cross_attn_k != config.global_.hidden_size for config in configs)


@pytest.mark.parametrize("seed", range(6))
def test_bytes_per_patch(seed: int) -> None:
    model = tiny_model(seed, max_patch_length=None)
    prompt = random_ids(seed, 8)
    found = generate(model, prompt, SamplingOptions(max_tokens=90, temperature=1.0, ignore_eos=True, seed=seed))
    with torch.no_grad():
        starts = model(torch.tensor([prompt + list(found.ids)])).starts[0]
    assert 2.0 <= len(starts) / int(starts.sum()) <= 5.0


def test_the_same_seed_gives_the_same_model() -> None:
    a, b = tiny_model(5).state_dict(), tiny_model(5).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert tiny_model(5, patching_threshold=1.0).config.patching_threshold == 1.0
