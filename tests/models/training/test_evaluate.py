"""Figures of a checkpoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastblt.models.training.evaluate import evaluate
from tests.models.training.toys import toy_model, toy_sequences


def test_evaluate_an_ignorant_model() -> None:
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.patcher.lm_head.weight.zero_()
    ids, _ = toy_sequences(3)
    figures = evaluate(model, ids.astype(np.uint16), batch=2)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(260), abs=1e-3)
    assert figures["patcher_bits_per_byte"] == pytest.approx(math.log2(260), abs=1e-3)
    assert figures["masked_accuracy"]["patch"]["B=4"]["t=1.0"] == 0.0
    assert len(figures["by_position"]["forced"]["B=16"]) == 16
    assert figures["leading_correct"]["closed"]["B=8"] == 0.0
