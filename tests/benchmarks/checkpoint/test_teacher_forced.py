"""Drafts along a given text, against the slow decoders' drafts from each of its prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastblt.benchmarks.checkpoint.teacher_forced import Drafter, Rounds, blocks, drafts, know
from fastblt.models.accounting import ModuleParameters
from fastblt.models.blt import Blt
from fastblt.models.reference import _Decoder, generate
from fastblt.models.reference_options import DecodingOptions
from fastblt.models.reference_selection import SamplingOptions
from tests.models.training.toys import toy_model

GREEDY = SamplingOptions(max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Blt:
    return Blt.requires_grad_(toy_model().eval(), False)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    ids = torch.randint(4, 260, (90,), generator=torch.Generator().manual_seed(1))
    ids[0] = 1
    return ids


PLACES = np.array([2, 3, 17, 40, 41, 42, 63, 70])


@pytest.mark.parametrize("paper", [False, True])
def test_diffusion_drafts(model: Blt, text: torch.Tensor, paper: bool) -> None:
    made = drafts(model, know(model, text), Drafter("blt-dv", 8, paper), PLACES)
    options = DecodingOptions("blt-dv", block_size=8, unmasking="one_step", paper_accounting=paper)
    for place, draft in zip(PLACES, made, strict=True):
        assert draft.tolist() == _Decoder(model, text[:place].tolist(), GREEDY, options)._draft_block(8)


@pytest.mark.parametrize("paper", [False, True])
def test_self_speculation_on_the_text_it_drafts(model: Blt, text: torch.Tensor, paper: bool) -> None:
    """A draft that goes on as its text does is what the slow decoder drafts, to the first byte that does not."""
    options = DecodingOptions("blt-s", draft_length=6, paper_accounting=paper)
    for place in (2, 17, 41):
        expected = _Decoder(model, text[:place].tolist(), GREEDY, options)._draft_alone(6)
        ids = torch.cat([text[:place], torch.tensor(expected)])
        made = drafts(model, know(model, ids), Drafter("blt-s", 6, paper), np.array([place]))
        assert made[0].tolist() == expected


def test_blocks(model: Blt, text: torch.Tensor) -> None:
    made = blocks(model, know(model, text), 8, PLACES, 0.02)
    options = DecodingOptions("blt-d", block_size=8, confidence_threshold=0.02)
    for place, block in zip(PLACES, made, strict=True):
        one = SamplingOptions(max_tokens=8, ignore_eos=True)
        assert tuple(block.tolist()) == generate(model, text[:place].tolist(), one, options).ids


def test_rounds_on_the_models_own_text_are_those_of_decoding(model: Blt, text: torch.Tensor) -> None:
    prompt = text[:40].tolist()
    params = SamplingOptions(max_tokens=60, ignore_eos=True)
    out = generate(model, prompt, params, DecodingOptions("blt-dv", block_size=4, unmasking="one_step"))
    # The last rounds of decoding have shorter drafts, so the text goes on beyond where the rounds are counted.
    ids = torch.tensor(prompt + list(generate(model, prompt, SamplingOptions(80, ignore_eos=True)).ids))
    rounds = Rounds()
    rounds.go(model, know(model, ids[:104]), Drafter("blt-dv", 4), 41)
    assert ids[:100].tolist() == prompt + list(out.ids)
    assert abs(rounds.rounds - out.rounds) <= 1
    assert rounds.bytes == rounds.accepted + rounds.rounds >= 59
    assert rounds.plain.decoder == rounds.bytes
    assert rounds.passes.decoder == 2 * rounds.rounds
    assert rounds.weights(ModuleParameters.of(model.config)) > 0


def test_noise_is_shared(model: Blt, text: torch.Tensor) -> None:
    greedy, drawn = know(model, text), know(model, text, 0.8)
    assert (greedy.choices != drawn.choices).any()
    assert torch.equal(drawn.choices, know(model, text, 0.8).choices)
