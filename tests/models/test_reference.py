"""The reference decoders: lossless methods, counts that are the paper's, and rows that see what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastblt.models.blt import Blt
from fastblt.models.reference import _block_attention, _Decoder, generate, patch_margins
from fastblt.models.reference_options import DecodingOptions, Nfe
from fastblt.models.reference_selection import SamplingOptions, select
from fastblt.models.vocabulary import EOS_ID, MASK_ID
from tests.tiny import random_ids, tiny_config, tiny_model

GREEDY = SamplingOptions(max_tokens=24, ignore_eos=True)
SAMPLED = SamplingOptions(
    max_tokens=24, temperature=0.9, top_k=60, top_p=0.95, min_p=0.01, repetition_penalty=1.2,
    presence_penalty=0.2, frequency_penalty=0.1, logit_bias={77: 2.0}, seed=2**63 + 5, choice=1,
)  # fmt: skip
DRAFTERS = [
    DecodingOptions("blt-s", draft_length=1),
    DecodingOptions("blt-s", draft_length=5),
    DecodingOptions("blt-s", draft_length=4, paper_accounting=True),
    DecodingOptions("blt-dv", block_size=1),
    DecodingOptions("blt-dv", block_size=4, confidence_threshold=0.3),
    DecodingOptions("blt-dv", block_size=8, unmasking="one_step", paper_accounting=True),
    DecodingOptions("blt-dv", block_size=8, unmasking="entropy", entropy_bound=6.0, max_steps=3),
    DecodingOptions("blt-dsv", draft_length=1, block_size=4),
    DecodingOptions("blt-dsv", draft_length=9, block_size=4, unmasking="one_step"),
    DecodingOptions("blt-dsv", draft_length=16, block_size=8, confidence_threshold=0.3),
]


def diffusion_model(seed: int, **overrides: Any) -> Blt:
    return tiny_model(seed, block_sizes=(4, 8), **overrides)


def every_byte_a_patch(seed: int) -> Blt:
    """A model whose upstream runs in every pass, so that a pass that may be left out never is."""
    return diffusion_model(seed, patching_threshold=-1.0)


def logits_after(model: Blt, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder_input", ["encoder", "embedding"])
@pytest.mark.parametrize("seed", [31, 32])
def test_drafts_never_change_a_byte(seed: int, decoder_input: str, params: SamplingOptions) -> None:
    model = diffusion_model(seed, decoder_input=decoder_input)
    prompt = random_ids(seed, 17)
    plain = generate(model, prompt, params)
    assert len(plain.ids) == 24 or plain.finish_reason == "stop"
    # Seeds where no decision is nearer than rounding.
    assert min(*plain.margins, *patch_margins(model, prompt + list(plain.ids))) > 1e-4
    accepted = 0
    for options in DRAFTERS:
        found = generate(model, prompt, params, options)
        assert (found.ids, found.finish_reason) == (plain.ids, plain.finish_reason), options
        assert np.allclose(found.logprobs, plain.logprobs, atol=1e-4)
        assert found.accepted <= found.drafted
        accepted += found.accepted
    assert accepted > 0


@pytest.mark.parametrize("method", ["blt", "blt-s", "blt-dv", "blt-dsv", "blt-d"])
@pytest.mark.parametrize("max_tokens", [0, 1, 2, 9])
def test_cut_at_max_tokens(method: str, max_tokens: int) -> None:
    model = diffusion_model(33)
    params = replace(GREEDY, max_tokens=max_tokens)
    found = generate(model, random_ids(1, 9), params, method)
    longer = generate(model, random_ids(1, 9), replace(params, max_tokens=12), method)
    assert found.finish_reason == "length" and found.ids == longer.ids[:max_tokens]
    assert len(found.logprobs) == len(found.margins) == max_tokens


@pytest.mark.parametrize("method", ["blt", "blt-s", "blt-dv", "blt-dsv", "blt-d"])
def test_stop_at_eos(method: str) -> None:
    model = diffusion_model(34)
    prompt = random_ids(2, 9)
    params = SamplingOptions(max_tokens=40, temperature=1.0, logit_bias={EOS_ID: 6.0}, seed=3)
    found = generate(model, prompt, params, method)
    assert found.finish_reason == "stop" and EOS_ID not in found.ids and len(found.ids) < 40
    assert len(generate(model, prompt, replace(params, min_tokens=20, seed=4), method).ids) >= 20
    forced = generate(model, prompt, replace(params, ignore_eos=True), method)
    assert forced.finish_reason == "length" and EOS_ID not in forced.ids


def test_plain_blt_is_one_select_a_pass() -> None:
    model = tiny_model(35)
    ids = random_ids(3, 12)
    found = generate(model, ids[1:], GREEDY)  # BOS is put in front
    x = list(ids)
    for produced in found.ids:
        assert (
            select(logits_after(model, x).numpy(), GREEDY, ids, x[len(ids) :], len(x), len(x) - len(ids)).id == produced
        )
        x.append(produced)
    with torch.no_grad():
        starts = model(torch.tensor([x])).starts[0].tolist()
    assert found.nfe == Nfe(24, 24, 1 + sum(starts[len(ids) + 1 : len(x)]), 24)
    assert found.prefill == Nfe(1, 1, 1, 1)
    assert (found.rounds, found.drafted, found.accepted, found.steps) == (0, 0, 0, ())


def test_blt_s_counts_of_the_paper() -> None:
    model = diffusion_model(36)
    k = 5
    options = DecodingOptions("blt-s", draft_length=k, paper_accounting=True)
    found = generate(model, random_ids(4, 20), replace(GREEDY, max_tokens=40), options)
    spent = found.nfe
    assert spent.decoder - found.prefill.decoder == found.rounds * (k + 1)
    assert spent.global_ - found.prefill.global_ == found.rounds * 2
    assert found.drafted == found.rounds * k
    # Every round gives what it accepted and one byte; the prompt's pass gives the first.
    assert len(found.ids) + found.wasted == 1 + found.rounds + found.accepted


def test_blt_s_counts_of_ours() -> None:
    model = every_byte_a_patch(37)
    found = generate(model, random_ids(4, 20), replace(GREEDY, max_tokens=40), DecodingOptions("blt-s", draft_length=5))
    assert found.nfe.global_ - found.prefill.global_ == found.rounds
    assert found.nfe.decoder - found.prefill.decoder == found.drafted + found.rounds
    assert found.wasted == 0 and len(found.ids) == 1 + found.rounds + found.accepted
    # Rounds near the end draft no more than what can still be emitted.
    assert found.drafted < 5 * found.rounds
    # Where no patch closes, the upstream does not run.
    still = diffusion_model(37, patching_threshold=99.0, max_patch_length=None)
    assert generate(still, random_ids(4, 20), GREEDY, "blt-s").nfe.global_ == 1


def test_blt_dv_counts() -> None:
    model = every_byte_a_patch(38)
    params = replace(GREEDY, max_tokens=30)
    for paper in (False, True):
        options = DecodingOptions("blt-dv", block_size=6, confidence_threshold=0.3, paper_accounting=paper)
        found = generate(model, random_ids(5, 20), params, options)
        assert found.nfe.decoder - found.prefill.decoder == sum(found.steps) + found.rounds
        assert found.nfe.global_ - found.prefill.global_ == found.rounds * (2 if paper else 1)
        assert len(found.steps) == found.rounds
        single = generate(model, random_ids(5, 20), params, replace(options, unmasking="one_step"))
        assert set(single.steps) <= {0, 1} and single.nfe.decoder <= 1 + 2 * single.rounds


@pytest.mark.parametrize("size", [1, 4, 8])
def test_blt_d_counts(size: int) -> None:
    model = diffusion_model(39)
    params = replace(GREEDY, max_tokens=21)
    found = generate(model, random_ids(6, 15), params, DecodingOptions("blt-d", block_size=size))
    assert found.nfe.global_ == found.nfe.encoder == found.rounds == math.ceil(21 / size)
    assert found.nfe.decoder == sum(found.steps) and found.wasted == found.rounds * size - 21
    assert all(1 <= steps <= size for steps in found.steps)
    single = generate(model, random_ids(6, 15), params, DecodingOptions("blt-d", block_size=size, unmasking="one_step"))
    assert single.nfe.decoder == single.rounds
    short = DecodingOptions("blt-d", block_size=size, confidence_threshold=1.0, max_steps=2)
    assert set(generate(model, random_ids(6, 15), params, short).steps) == {min(2, size)}
    slow = DecodingOptions("blt-d", block_size=size, confidence_threshold=1.0)
    assert set(generate(model, random_ids(6, 15), params, slow).steps) == {size}


def test_penalties_reach_into_blocks() -> None:
    model = diffusion_model(39)
    params = replace(GREEDY, max_tokens=16, presence_penalty=100.0)
    # One position a step: every byte knows those that were filled before it, on either side.
    found = generate(model, random_ids(6, 15), params, DecodingOptions("blt-d", confidence_threshold=1.0))
    assert len(set(found.ids)) == 16
    # Positions of one step do not see each other.
    again = generate(model, random_ids(6, 15), params, DecodingOptions("blt-d", unmasking="one_step"))
    assert len(set(again.ids)) < 16 and not set(again.ids[:8]) & set(again.ids[8:])


def test_aligned_blocks_start_patches() -> None:
    model = diffusion_model(40)
    prompt = random_ids(7, 16)
    options = DecodingOptions("blt-d", block_size=4, align_blocks=True)
    found = generate(model, prompt, replace(GREEDY, max_tokens=40), options)
    ids = prompt + list(found.ids)
    with torch.no_grad():
        starts = model(torch.tensor([ids])).starts[0].tolist()
    # Walk along: a byte is that of BLT until a patch starts, and then four are a block's.
    position, blocks = len(prompt), 0
    while position < len(ids):
        if starts[position]:
            position, blocks = position + 4, blocks + 1
        else:
            logits = logits_after(model, ids[:position]).numpy()
            assert select(logits, GREEDY, prompt, ids[len(prompt) : position], position, 1).id == ids[position]
            position += 1
    assert blocks == found.rounds > 0
    assert found.nfe.global_ < found.nfe.decoder


def test_a_block_without_alignment_starts_where_the_last_ended() -> None:
    # One step of a block, worked out with the modules: its latent is that of the open patch, closed by force.
    model = diffusion_model(41, max_patch_length=None, window=6)
    prompt = random_ids(8, 20)
    decoder = _Decoder(model, prompt, GREEDY, DecodingOptions("blt-d", block_size=3, unmasking="one_step"))
    with torch.no_grad():
        seen = model(torch.tensor([prompt]))
        forced = seen.starts.clone()
        forced[0, len(prompt)] = True
        closed = model(torch.tensor([prompt]), starts=forced)
        assert not seen.starts[0, len(prompt)]
        # The clean rows, the last one included, go on reading closed patches.
        read = decoder._read_by_clean_rows(seen, len(prompt))
        rows = decoder._decode(prompt, [*read, *[closed.latents[0, -1]] * 3], [MASK_ID] * 3)[-3:]
    expected = [select(row.numpy(), GREEDY, prompt, [], 20 + i, i).id for i, row in enumerate(rows)]
    found = generate(model, prompt, replace(GREEDY, max_tokens=3), decoder.options)
    assert list(found.ids) == expected


@pytest.mark.parametrize("window", [None, 4, 9])
def test_clean_rows_of_the_own_decoder_equal_the_networks(window: int | None) -> None:
    model = diffusion_model(42, window=window)
    ids = random_ids(9, 25)
    decoder = _Decoder(model, ids, GREEDY, DecodingOptions())
    with torch.no_grad():
        seen = model(torch.tensor([ids]))
        latents = decoder._read_by_clean_rows(seen, len(ids))
        alone = decoder._decode(ids, latents)
        beside = decoder._decode(ids, latents + [latents[0]] * 4, [MASK_ID, 50, 60, MASK_ID])
        other = decoder._decode(ids, latents + [latents[2]] * 4, [70, MASK_ID, 80, 90])
    assert (alone - seen.logits[0]).abs().max() < 1e-4
    # No clean row sees a block.
    assert (beside[: len(ids)] - alone).abs().max() < 1e-4
    assert (beside[len(ids) :] - other[len(ids) :]).abs().max() > 1e-2


@pytest.mark.parametrize("window", [None, 1, 3])
def test_what_rows_see(window: int | None) -> None:
    # Values that name their row: the mean over what is seen tells which rows were.
    config = tiny_config(1, window=window)
    config = replace(config, decoder=replace(config.decoder, num_heads=1, num_kv_heads=1, hidden_size=16))
    model = Blt(replace(config, encoder=config.decoder))
    clean, block = 5, 3
    attend = _block_attention(model, clean, block, torch.device("cpu"))
    same = torch.zeros(1, clean + block, 1, 16)
    values = torch.eye(clean + block, 16)[None, :, None]
    seen = attend(0, same, same, values)[0, :, 0, : clean + block] > 0
    width = window or 99
    for row in range(clean + block):
        low, high = (max(0, row - width + 1), row + 1) if row < clean else (max(0, clean - width + 1), clean + block)
        assert seen[row].tolist() == [low <= key < high for key in range(clean + block)]


def test_the_pending_byte_gives_the_first_drafted_one() -> None:
    model = diffusion_model(45)
    prompt = random_ids(11, 18)
    own = []
    for length in range(4, len(prompt)):
        decoder = _Decoder(model, prompt[:length], GREEDY, DecodingOptions("blt-dv", unmasking="one_step"))
        with torch.no_grad():
            block, alone = decoder._draft_block(4), decoder._draft_alone(1)
            latents = decoder._draft_latents()
            masked = decoder._denoise(latents + [latents[-1]] * 4, 4, first_is_next_byte=False)
        assert block[0] == alone[0]
        assert block[1:] == [selected.id for selected in masked[1:]]
        own.append(masked[0].id == block[0])
    assert not all(own)


def test_draft_latents() -> None:
    # Ours: the newest patch closed without the pending byte. The paper's: the last one with it, open or not.
    model = diffusion_model(43, max_patch_length=None)
    prompt = random_ids(10, 22)
    for length in range(5, len(prompt)):
        ids = prompt[:length]
        with torch.no_grad():
            seen = model(torch.tensor([ids]))
        open_patch = int(seen.starts[0, :length].sum()) - 1
        without = int(seen.starts[0, :length].sum()) - 2
        for paper, expected in ((False, without), (True, open_patch)):
            decoder = _Decoder(model, ids, GREEDY, DecodingOptions("blt-s", paper_accounting=paper))
            with torch.no_grad():
                latents = decoder._draft_latents()
            assert len(latents) == length
            assert torch.allclose(latents[-1], seen.latents[0, expected], atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        generate(tiny_model(1), [1], GREEDY, "auto")
    with pytest.raises(ValueError, match="needs a checkpoint with a diffusion head"):
        generate(tiny_model(1, block_sizes=()), [1], GREEDY, "blt-d")
    with pytest.raises(ValueError, match="unmasking must be one of"):
        generate(tiny_model(1), [1], GREEDY, DecodingOptions(unmasking="random"))


def test_from_bos_alone() -> None:
    model = diffusion_model(44)
    plain = generate(model, [1], GREEDY)
    for options in DRAFTERS:
        assert generate(model, [], GREEDY, options).ids == plain.ids
