"""Blocks filled in one call are those of a pass for each step, and are accounted for as these."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import set_threads
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import BYTE_OFFSET
from fastblt.server.engine.engine import Engine
from fastblt.server.request import (
    DecodingMethod,
    DecodingParams,
    EntropyRule,
    Request,
    SamplingParams,
    Unmasking,
    Utf8,
)
from fastblt.server.settings import PRETRAINED
from tests.server.harness import MODELS, Finished, model, random_params, run, settings

# Asked of another file: code that a compiler refuses must fail here, not skip.
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

RULES = (
    {"unmasking": Unmasking.CONFIDENCE, "confidence_threshold": 0.05},
    {"unmasking": Unmasking.CONFIDENCE, "confidence_threshold": 0.7},
    {"unmasking": Unmasking.CONFIDENCE, "confidence_threshold": 0.9, "max_steps": 3},
    {"unmasking": Unmasking.ENTROPY, "entropy_bound": 4.0},
    {"unmasking": Unmasking.ENTROPY, "entropy_bound": 12.0, "entropy_rule": EntropyRule.EXCLUSIVE_MAX},
    {"unmasking": Unmasking.ENTROPY, "entropy_bound": 2.0, "max_steps": 1},
    {"unmasking": Unmasking.ONE_STEP},
)


def requests_of(rng: random.Random, count: int) -> list[Request]:
    """Requests for blocks, some with masks or with what makes a call of all steps impossible; a fifth for bytes."""
    made = []
    for at in range(count):
        prompt = [1] + [rng.randrange(4, 260) for _ in range(rng.choice((0, 1, 7, 40, 90)))]
        method = rng.choice((DecodingMethod.BLT_D, DecodingMethod.BLT_DV, DecodingMethod.BLT_DSV))
        decoding = DecodingParams(method, block_size=rng.choice((4, 8)), **rng.choice(RULES))
        if method == DecodingMethod.BLT_D and rng.random() < 0.3:
            decoding = replace(decoding, align_blocks=True)
        elif method == DecodingMethod.BLT_DSV:
            decoding = replace(decoding, draft_length=rng.choice((1, 3, 8, 16, 32)))
        elif method == DecodingMethod.BLT_DV and rng.random() < 0.3:
            decoding = replace(decoding, paper_accounting=True)
        if rng.random() < 0.2:
            decoding = DecodingParams(DecodingMethod.BLT)
        params = random_params(rng, decoding=decoding)
        if decoding.method == DecodingMethod.BLT:
            # Behind a stop string single bytes may go on in vain.
            params = replace(params, stop=())
        if rng.random() < 0.2:
            params = replace(params, logprobs=2)
        if rng.random() < 0.2:
            params = replace(params, utf8=Utf8.STRICT, stop=())
        made.append(Request(f"r{at}", prompt, params, 0.0))
    return made


@given(st.integers(0, 2**32))
@examples(max_examples=10, deadline=None)
def test_all_steps_in_a_call_are_those_of_single_passes(seed: int) -> None:
    rng = random.Random(seed)
    which, count = rng.choice(MODELS), rng.choice((1, 3, 9, 20))
    requests = requests_of(rng, count)
    arrivals = [rng.choice((0, 0, 0, 3)) for _ in requests]
    done: list[dict[str, Finished]] = []
    calls: list[int] = []
    try:
        # Passes; a step in a call; all steps in one, which one thread and several make.
        for passes, most, threads in ((True, 1, 1), (False, 1, 1), (False, 64, 1), (False, 64, 3)):
            given_ = {"max_pass_rows": 4096, "max_passes_per_beat": most, "prefix_cache": False}
            engine = Engine(model(which), settings(max_running=count, threads=threads, **given_))
            assert engine._runner.fused_steps is not None
            if passes:
                engine._runner.fused_steps = None
            with patch.object(engine, "step", wraps=engine.step) as step:
                done.append(run(engine, requests, arrivals))
            calls.append(step.call_count)
            assert engine.balanced()
    finally:
        set_threads(None)
    single, *others = done
    requests_by_name = {request.request_id: request for request in requests}
    for other in others:
        for name, result in single.items():
            assert other[name].ids == result.ids
            assert other[name].reason == result.reason
            one, many = dict(vars(result.ledger)), dict(vars(other[name].ledger))
            if result.reason == "stop":
                # A call may scan and encode, or leave out, bytes behind which the text turns out to end, and behind a
                # stop string draft in vain; of how many it is known whether they begin a patch depends on it.
                # A whole filtered draft is up to 33 passes.
                filtered = requests_by_name[name].params.decoding.method == DecodingMethod.BLT_DSV
                assert abs(one["patcher"] - many["patcher"]) <= 1
                assert abs(one["encoder"] - many["encoder"]) <= (33 if filtered else 2)
                assert 0 <= many["decoder"] - one["decoder"] <= (33 if filtered else 8)
                if not requests_by_name[name].params.stop:
                    assert many["decoder"] == one["decoder"]
                for ledger in (one, many):
                    for key in ("patcher", "encoder", "decoder", "patched_bytes", "patches", "gb", "gb_paper"):
                        del ledger[key]
            assert many == one
    assert calls[0] == calls[1] and calls[2] == calls[3], "threads change nothing"


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("method", (DecodingMethod.BLT_DV, DecodingMethod.BLT_D, DecodingMethod.BLT_S))
def test_nothing_between_a_block_and_what_reads_it(method: DecodingMethod, which: int) -> None:
    """Entropy model and encoder have calls of their own for the prompt, and for a last byte without a draft before it;
    and the encoder where drafted rows do not begin as its states."""
    asked = {"draft_length": 8} if method == DecodingMethod.BLT_S else {"block_size": 8}
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, decoding=DecodingParams(method, **asked))
    engine = Engine(model(which), settings())
    runner = engine._runner
    with (
        patch.object(runner, "scan", wraps=runner.scan) as scan,
        patch.object(runner, "encode", wraps=runner.encode) as encode,
        patch.object(runner, "decode", wraps=runner.decode) as decode,
    ):
        done = run(engine, [Request("r", [1, *range(60, 90)], params, 0.0)])["r"]
    rounds = done.ledger.rounds
    assert rounds > 5
    assert scan.call_count <= 2
    # The prompt, the first draft, verifications that go on with the next draft, and the last byte.
    assert decode.call_count <= rounds + 3
    # A draft of single rows that begin as ids leaves the encoder to its verification.
    left = rounds if method == DecodingMethod.BLT_S and which % 2 else 0
    assert left < encode.call_count <= 2 + left


@pytest.mark.parametrize("rule", ({"unmasking": Unmasking.ONE_STEP}, RULES[1], RULES[2]))
def test_drafts_up_to_the_longest_text(rule: dict) -> None:
    """A verification near the end of the longest text goes on with a shorter draft, or with none."""
    texts, ledgers = [], []
    for most in (1, 64, 3):
        engine = Engine(model(0), settings(max_model_len=200, max_passes_per_beat=most))
        prompt = [1, *range(10, 10 + engine.max_model_len - 41)]
        decoding = DecodingParams(DecodingMethod.BLT_DV, block_size=8, **rule)
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, decoding=decoding)
        done = run(engine, [Request("r", prompt, params, 0.0)])["r"]
        texts.append(done.ids)
        ledgers.append(vars(done.ledger))
        assert engine.balanced()
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 40
    assert ledgers[0] == ledgers[1] == ledgers[2]


def test_the_steps_that_fixed_bytes() -> None:
    """What a request for patches, whose steps are passes, is told is what the calls of others do."""
    decoding = DecodingParams(DecodingMethod.BLT_D, block_size=8, unmasking=Unmasking.ENTROPY, entropy_bound=9.0)
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=3, ignore_eos=True, decoding=decoding)
    engine = Engine(model(0), settings())
    assert engine._runner.fused_steps is not None
    fixed: list[int] = []
    fill = engine._runner._forward.decode_steps

    def watched(*args: object, **kwargs: object) -> object:
        filled = fill(*args, **kwargs)  # type: ignore[arg-type]
        fixed.extend(filled.made.fixed[0].tolist())
        return filled

    engine._runner._forward.decode_steps = watched  # type: ignore[assignment, method-assign]
    prompt = [1, *range(60, 90)]
    first = run(engine, [Request("r", prompt, params, 0.0)])["r"]
    assert first.ledger.steps > first.ledger.rounds == 5
    told = run(engine, [Request("r", prompt, replace(params, return_patches=True), 0.0)])["r"]
    assert told.ids == first.ids and told.patches is not None
    assert list(told.patches.steps) == fixed[:40]


@pytest.mark.parametrize("method", (DecodingMethod.BLT_D, DecodingMethod.BLT_DV))
@pytest.mark.parametrize("temperature", (0.0, 0.8))
def test_the_shipped_checkpoint(method: DecodingMethod, temperature: float) -> None:
    """Texts and stored keys, values and states, bit for bit."""
    shipped = load_checkpoint(str(PRETRAINED))
    decoding = DecodingParams(method, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.5)
    params = SamplingParams(max_tokens=300, temperature=temperature, seed=5, ignore_eos=True, decoding=decoding)
    found = []
    for passes in (True, False):
        engine = Engine(shipped, settings(max_model_len=1024, deterministic=True))
        if passes:
            engine._runner.fused_steps = None
        engine.add(Request("r", [1, *(BYTE_OFFSET + byte for byte in b"def mean(values):\n")], params, 0.0))
        sequence = engine._sequences["r"]
        while len(sequence.output.ids) < 100 or sequence.decoded < 110:
            engine.step()
        stored = {}
        for name in ("patcher", "encoder", "decoder"):
            group = engine._caches.groups[name]
            pages = group.table[sequence.state_index]
            slots = [int(pages[p // group.page_size]) * group.page_size + p % group.page_size for p in range(110)]
            stored |= {f"{name} {at}": layer[slots].clone() for at, layer in enumerate(group.layers)}
        found.append((sequence.ids[:110], stored))
    (ids, one), (others, other) = found
    assert ids == others
    for name, rows in one.items():
        assert torch.equal(rows, other[name]), name
