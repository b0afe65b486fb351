"""BLT-DSV: its drafts are those of BLT-S, and its passes those that docs/methods.md says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastblt.models.checkpoint import load_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Ledger, Request, SamplingParams, Unmasking
from fastblt.server.settings import PRETRAINED
from tests.server.harness import Finished, model, run, settings

TEXT = b'def mean(values):\n    """Return the arithmetic mean of the values."""\n    total = 0\n'


def finished(engine: Engine, decoding: DecodingParams, temperature: float, prompt: bytes = TEXT) -> Finished:
    params = SamplingParams(
        max_tokens=90, temperature=temperature, seed=5, ignore_eos=True, decoding=decoding
    )  # fmt: skip
    return run(engine, [Request("r", [1, *(byte + 4 for byte in prompt)], params, 0.0)])["r"]


def behind_the_first_byte(ledger: Ledger) -> int:
    """Decoder passes without the prompt's."""
    return ledger.decoder - 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("length", "block"), [(8, 4), (16, 8), (32, 8), (32, 16), (3, 4), (2, 4), (1, 8)])
def test_drafts_are_those_of_blt_s_and_every_byte_that_passes_saves_a_pass(
    length: int, block: int, temperature: float
) -> None:
    engine = Engine(
        load_checkpoint(str(PRETRAINED)), settings(max_model_len=1024, max_pass_rows=512, prefix_cache=False)
    )
    alone = finished(engine, DecodingParams(DecodingMethod.BLT_S, draft_length=length), temperature)
    filtered = finished(engine, DecodingParams(DecodingMethod.BLT_DSV, block, length), temperature)
    plain = finished(engine, DecodingParams(DecodingMethod.BLT), temperature)
    assert filtered.ids == alone.ids == plain.ids
    ours, theirs = filtered.ledger, alone.ledger
    for name in ("rounds", "drafted", "accepted", "kept", "global_", "patcher"):
        assert getattr(ours, name) == getattr(theirs, name), name
    # A last byte needs no draft, and its pass is no round.
    last = 90 - 1 - theirs.accepted - theirs.rounds
    assert last in (0, 1)
    assert behind_the_first_byte(theirs) == theirs.drafted + theirs.rounds + last
    assert behind_the_first_byte(ours) == ours.drafted - ours.passed + ours.rounds + last
    assert 0 <= ours.passed <= ours.proposed and (ours.proposed > 0) == (length > 2)
    if length > 8:
        # The shipped model's blocks are worth something.
        # The shipped model's blocks are worth something.
        assert ours.passed > ours.proposed / 16


@pytest.mark.parametrize("threshold", [0.05, 0.7])
def test_blocks_of_several_steps(threshold: float) -> None:
    """Steps of a block come to its passes; the bytes stay those of BLT."""
    for which in (0, 1):
        engine = Engine(model(which), settings())
        decoding = DecodingParams(
            DecodingMethod.BLT_DSV, 8, 6, unmasking=Unmasking.CONFIDENCE, confidence_threshold=threshold
        )
        done = finished(engine, decoding, 0.7, TEXT[:40])
        assert done.ids == finished(engine, DecodingParams(DecodingMethod.BLT), 0.7, TEXT[:40]).ids
        one_step = finished(engine, replace(decoding, unmasking=None, confidence_threshold=None), 0.7, TEXT[:40])
        assert done.ids == one_step.ids and done.ledger.steps >= one_step.ledger.steps > 0
