"""Figures of a checkpoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.reference import generate
from models.training.evaluate import evaluate, first_lines, parses
from models.vocabulary import encode
from tests.models.training.toys import toy_model, toy_sequences

PROMPT = 'def double(x):\n    """Twice x."""\n'


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("    return 2 * x\n", True),
        ("\n    for y in x:", True),
        ("    try:", True),
        ("    # twice", True),
        ("    return 2 *", False),
        ("    >>> double(2)", False),
        ("        return x", False),
        ("", False),
        ("\n\n", False),
    ],
)
def test_parses(line: str, fits: bool) -> None:
    assert parses(PROMPT, line) is fits


def test_first_lines_are_those_of_plain_greedy_decoding() -> None:
    model = toy_model().eval()
    prompts = ["a = 1\n", "def f(x):\n    return"]
    lines = first_lines(model, prompts, longest=6)
    for prompt, line in zip(prompts, lines, strict=True):
        ids = generate(model, encode(prompt.encode())).ids[:6]
        expected = bytes(i - 4 for i in ids).decode("utf-8", "replace")
        assert line == expected.split("\n")[0] or expected.startswith(line)


def test_evaluate_an_ignorant_model() -> None:
    model = toy_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.patcher.lm_head.weight.zero_()
    ids, _ = toy_sequences(3)
    figures = evaluate(model, ids.astype(np.uint16), batch=2)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(260), abs=1e-3)
    assert figures["patcher_bits_per_byte"] == pytest.approx(math.log2(260), abs=1e-3)
    assert figures["masked_accuracy"]["B=4"]["t=1.0"] == 0.0
    assert len(figures["by_position"]["B=16"]) == 16
    assert figures["leading_correct"]["B=8"] == 0.0
