from __future__ import annotations

import torch

from fastblt.benchmarks.checks.widened import differences, greedy
from tests.tiny import random_ids, tiny_model


def test_a_model_is_itself_and_no_other() -> None:
    one, other = (tiny_model(5, decoder_input="encoder", block_sizes=(4, 8)) for _ in range(2))
    prompts = [random_ids(seed, 24) for seed in range(2)]
    assert differences(one, other, prompts) == (0.0, 0.0)
    with torch.no_grad():
        other.lm_head.weight[7] += 1.0
    logits, entropies = differences(one, other, prompts)
    assert logits > 1e-2 and entropies == 0.0
    # Engines may fuse a model's layers, whose weights are then copies: they come last.
    runs = greedy(one, prompts, 12)
    assert {len(ids) for own in runs.values() for ids, _ in own} == {12}
    assert greedy(tiny_model(5, decoder_input="encoder", block_sizes=(4, 8)), prompts, 12) == runs
    assert greedy(other, prompts, 12) != runs
