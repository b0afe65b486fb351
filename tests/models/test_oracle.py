"""The network against the plain restatement of it, on random shapes, patch lengths and windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import stored_name
from tests.oracles import blt_oracle
from tests.tiny import random_ids, tiny_model

OPTIONS = [
    {},
    {"max_patch_length": 1},
    {"max_patch_length": 2, "window": 3},
    {"max_patch_length": 3, "patcher_window": 4},
    {"max_patch_length": 5, "window": 7, "decoder_input": "embedding"},
    {"max_patch_length": 4, "window": None, "patcher_window": None, "block_sizes": (8,)},
    {"max_patch_length": None, "window": 1},
    {"encoder_cross_attn_all_layers": True, "decoder_cross_attn_all_layers": False},
    {"hash_functions": 12, "hash_group_sizes": (2, 9)},
    {"cross_attn_k": 4},
]


def weights_of(model: Blt) -> dict[str, np.ndarray]:
    return {stored_name(name): tensor.double().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("index", range(len(OPTIONS)))
@pytest.mark.parametrize("length", [1, 2, 27])
def test_network_equals_oracle(index: int, length: int) -> None:
    model = tiny_model(100 + index, **OPTIONS[index])
    ids = random_ids(index, length)
    expected = blt_oracle.forward(weights_of(model), model.config.to_dict(), ids)
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    starts = np.zeros(length + 1, dtype=bool)
    starts[np.cumsum([0, *expected.lengths])[:-1]] = True
    assert found.starts[0].tolist() == starts.tolist()
    assert np.abs(found.entropies[0].numpy() - expected.entropies).max() < 2e-5
    assert np.abs(found.logits[0].numpy() - expected.logits).max() < 1e-4


def test_rows_of_a_ragged_batch_equal_lone_ones() -> None:
    # Patch counts differ between the rows, so latents are padded.
    model = tiny_model(3)
    rows = [random_ids(seed, 40) for seed in range(4)]
    with torch.no_grad():
        together = model(torch.tensor(rows))
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row]))
            assert torch.equal(together.starts[index], alone.starts[0])
            assert (together.logits[index] - alone.logits[0]).abs().max() < 1e-4


def test_a_prefix_is_computed_as_in_the_whole() -> None:
    model = tiny_model(4, max_patch_length=5)
    ids = random_ids(4, 40)
    with torch.no_grad():
        whole = model(torch.tensor([ids]))
        for length in range(1, len(ids)):
            part = model(torch.tensor([ids[:length]]))
            assert torch.equal(part.starts[0], whole.starts[0, : length + 1])
            assert (part.logits[0] - whole.logits[0, :length]).abs().max() < 1e-4
