from __future__ import annotations

import copy

import torch

from benchmarks.widened import differences, greedy
from models.blt import Blt
from tests.tiny import random_ids


def test_a_model_is_itself_and_no_other(model: Blt) -> None:
    other = copy.deepcopy(model)
    prompts = [random_ids(seed, 24) for seed in range(2)]
    assert differences(model, other, prompts) == (0.0, 0.0)
    runs = greedy(model, prompts, 12)
    assert greedy(other, prompts, 12) == runs
    assert {len(ids) for own in runs.values() for ids, _ in own} == {12}
    with torch.no_grad():
        other.lm_head.weight[7] += 1.0
    logits, entropies = differences(model, other, prompts)
    assert logits > 1e-2 and entropies == 0.0
