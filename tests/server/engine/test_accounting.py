"""What a request's ledger and patch report say, against the whole-sequence model and against the output."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings

from fastblt.models.accounting import ModuleParameters, gb, gb_paper
from fastblt.models.vocabulary import encode
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Ledger, Request, SamplingParams, Unmasking
from tests.server.harness import (
    MODELS,
    Finished,
    model,
    random_decoding,
    random_params,
    random_request,
    run,
    settings,
    with_method,
)

seeds = strategies.integers(0, 2**32)
few = hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VERIFIED = (DecodingMethod.BLT_S, DecodingMethod.BLT_DV)


@torch.no_grad()
def whole(which: int, request: Request, done: Finished) -> tuple[list[int], list[float]]:
    """Offsets of the patches that start in the output, and the entropies before each of its bytes."""
    out = model(which)(torch.tensor([request.prompt_ids + done.ids]))
    first, count = len(request.prompt_ids), len(done.ids)
    starts = out.starts[0, first : first + count].nonzero().flatten().tolist()
    return starts, out.entropies[0, first - 1 : first - 1 + count].tolist()


@few
@given(seeds)
def test_reports_are_those_of_the_whole_sequence(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    requests = [random_request(rng, f"r{i}", return_patches=True) for i in range(5)]
    done = run(Engine(model(which), settings(max_pass_rows=rng.choice((16, 64)))), requests)
    for request in requests:
        result = done[request.request_id]
        report, ledger = result.patches, result.ledger
        starts, entropies = whole(which, request, result)
        known = ledger.patched_bytes
        assert report.starts == [start for start in starts if start < known]
        assert report.entropies[:known] == pytest.approx(entropies[:known], abs=1e-4)
        assert report.entropies[known:] == [None] * (len(result.ids) - known)
        assert ledger.bytes == len(result.ids) == len(report.steps) == len(report.entropies)
        assert ledger.patches == len(report.starts)
        decoding = request.params.decoding
        if decoding.method == DecodingMethod.BLT_D:
            assert decoding.block_size is not None
            assert known > len(result.ids) - decoding.block_size
            assert all(1 <= step <= (decoding.max_steps or decoding.block_size) for step in report.steps)
        else:
            assert known == len(result.ids) and set(report.steps) <= {1}


@few
@given(seeds)
def test_verified_methods_report_the_patches_of_blt(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    blt = DecodingParams(DecodingMethod.BLT)
    base = random_request(rng, "blt", random_params(rng, decoding=blt, return_patches=True))
    requests = [base]
    while len(requests) < 5:
        decoding = random_decoding(rng)
        if decoding.method in VERIFIED:
            requests.append(with_method(base, f"v{len(requests)}", decoding))
    done = run(Engine(model(which), settings()), requests)
    expected = done["blt"]
    for request in requests[1:]:
        result = done[request.request_id]
        assert result.patches.starts == expected.patches.starts
        assert result.patches.entropies == pytest.approx(expected.patches.entropies, abs=1e-4)
        assert result.ledger.bytes_per_patch == expected.ledger.bytes_per_patch
        assert (result.ledger.bytes, result.ledger.patches) == (expected.ledger.bytes, expected.ledger.patches)
        assert result.ledger.kept <= min(result.ledger.accepted, len(result.ids))


def test_blt_d_s_steps_are_those_of_its_blocks() -> None:
    rng = random.Random(3)
    decoding = DecodingParams(
        DecodingMethod.BLT_D, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.3
    )
    params = random_params(rng, decoding=decoding, max_tokens=64, min_tokens=64, stop=(), return_patches=True)
    done = run(Engine(model(0), settings()), [random_request(rng, "d", params)])["d"]
    blocks = [done.patches.steps[at : at + 8] for at in range(0, 64, 8)]
    assert len(blocks) == done.ledger.rounds
    # Every step fixes at least one byte, and they add up.
    assert all(set(block) == set(range(1, max(block) + 1)) for block in blocks)
    assert sum(max(block) for block in blocks) == done.ledger.steps
    # Unless asked for, nothing is collected.
    plain = run(Engine(model(0), settings()), [random_request(rng, "p", replace(params, return_patches=False))])["p"]
    assert plain.deltas[-1].patches is None


def test_engine_ledger_counts_drafts_by_position() -> None:
    rng = random.Random(7)
    decodings = [
        DecodingParams(DecodingMethod.BLT_S, draft_length=5),
        DecodingParams(DecodingMethod.BLT_DV, block_size=4),
        DecodingParams(DecodingMethod.BLT),
    ]
    requests = [
        random_request(rng, f"r{i}", random_params(rng, decoding=decoding, max_tokens=40, min_tokens=40, stop=()))
        for i, decoding in enumerate(decodings)
    ]
    engine = Engine(model(1), settings())
    done = run(engine, requests)
    stats = engine.stats()
    drafted, accepted = stats.drafted_by_position, stats.accepted_by_position
    assert len(drafted) == len(accepted) == 32
    assert sum(drafted) == stats.ledger.drafted > 0 and sum(accepted) == stats.ledger.accepted > 0
    assert all(a >= b for a, b in pairwise(drafted)) and all(a >= b for a, b in pairwise(accepted))
    assert drafted[0] == stats.drafts == stats.ledger.rounds and not any(drafted[5:])
    assert stats.bytes_prompt == sum(len(request.prompt_ids) - 1 for request in requests)
    # Passes are shared; what the requests gave is not.
    total = Ledger()
    for result in done.values():
        total.add(result.ledger)
    for name in ("rounds", "steps", "drafted", "accepted", "kept", "wasted", "bytes", "patched_bytes", "patches"):
        assert getattr(stats.ledger, name) == getattr(total, name), name
    assert 0 < stats.ledger.decoder < total.decoder and 0 < stats.ledger.gb < total.gb


def test_gigabytes_follow_from_the_passes() -> None:
    rng = random.Random(1)
    done = run(Engine(model(0), settings()), [random_request(rng, "r")])["r"]
    parameters = ModuleParameters.of(model(0).config)
    assert done.ledger.gb_paper == gb_paper(parameters, done.ledger.decoder, done.ledger.global_) > 0
    assert done.ledger.gb == gb(parameters, done.ledger, 4) > 0


def test_kept_bytes_are_those_of_the_output() -> None:
    """A bias makes every byte the same, so every draft is accepted, until a stop string cuts one."""
    stop = b"a" * 30
    for decoding in (
        DecodingParams(DecodingMethod.BLT_S, draft_length=8),
        DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    ):
        params = SamplingParams(
            max_tokens=200, temperature=0.0, logit_bias={encode(b"a")[0]: 100.0}, stop=(stop,), decoding=decoding
        )
        for included in (False, True):
            request = Request("r", [1, 70, 71], replace(params, include_stop_str_in_output=included), 0.0)
            done = run(Engine(model(0), settings()), [request])["r"]
            assert done.reason == "stop" and len(done.ids) == (30 if included else 0)
            assert done.ledger.drafted == done.ledger.accepted > done.ledger.kept >= 0
            assert done.ledger.kept <= len(done.ids)
            assert done.ledger.wasted > 0


def test_the_decoding_that_ran_comes_with_the_end() -> None:
    rng = random.Random(2)
    asked = DecodingParams(DecodingMethod.BLT_S)
    done = run(Engine(model(0), settings()), [random_request(rng, "r", random_params(rng, decoding=asked))])["r"]
    assert done.deltas[-1].decoding == DecodingParams(DecodingMethod.BLT_S, draft_length=8, paper_accounting=False)
    assert all(delta.decoding is None for delta in done.deltas[:-1])
