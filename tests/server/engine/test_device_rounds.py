"""A round on a device apart: the plans and results of the C calls, one wait, few copies, no graph but those of the
start."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import fastblt.kernels.backend
from fastblt.kernels.cpu.native import library
from fastblt.server.engine.device import drafting, rounds
from fastblt.server.engine.device.rounds import PlanRounds
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams, Unmasking
from tests.server.engine.late import late_engine
from tests.server.harness import MODELS, model, random_decoding, random_params, run, settings

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

#: What a request's ledger counts of its rounds.
COUNTS = ("rounds", "steps", "drafted", "accepted", "proposed", "passed", "bytes", "global_", "decoder")
METHODS = {
    "blt": DecodingParams(DecodingMethod.BLT),
    "blt-s": DecodingParams(DecodingMethod.BLT_S, draft_length=8),
    "blt-dv": DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    "blt-dsv": DecodingParams(DecodingMethod.BLT_DSV, block_size=4, draft_length=16),
    "blt-d": DecodingParams(
        DecodingMethod.BLT_D, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.6
    ),
}


def requests_of(rng: random.Random, count: int) -> list[Request]:
    """Requests of any method whose rounds ask the host nothing."""
    made = []
    for at in range(count):
        prompt = [1, *(rng.randrange(4, 260) for _ in range(rng.choice((0, 1, 7, 40))))]
        params = replace(
            random_params(rng, decoding=random_decoding(rng)), stop=(), repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, logit_bias={},
        )  # fmt: skip
        made.append(Request(f"r{at}", prompt, params, 0.0))
    return made


@given(st.integers(0, 2**32))
@examples(max_examples=10, deadline=None)
def test_the_results_and_counts_of_the_c_calls(seed: int) -> None:
    rng = random.Random(seed)
    which = rng.choice(MODELS)
    requests = requests_of(rng, rng.choice((1, 3, 6)))
    how = settings(max_pass_rows=4096, prefix_cache=False)
    expected = run(Engine(model(which), how), requests)
    with pytest.MonkeyPatch.context() as patch:
        # As far as C goes: to the end of every patch, block and draft.
        patch.setattr(rounds, "MOST_STEPS", 64)
        patch.setattr(rounds, "MOST_BYTES", 64)
        patch.setattr(drafting, "MOST_STEPS", 64)
        engine = late_engine(patch, model(which), how)
        steps = engine._runner.fused_steps
        assert steps is not None and isinstance(steps._decoder_steps, PlanRounds)
        steps._decoder_steps.whole = True
        found = run(engine, requests)
    for name, done in expected.items():
        assert (found[name].ids, found[name].reason) == (done.ids, done.reason), name
        own, theirs = vars(found[name].ledger), vars(done.ledger)
        assert {count: own[count] for count in COUNTS} == {count: theirs[count] for count in COUNTS}, name


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("which", [0, 1])
def test_one_wait_a_round(name: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "apart")
    engine = Engine(model(which), settings(deterministic=False))
    runner = engine._runner
    with torch.inference_mode():
        graphs = runner.capture(lambda text: None)
    assert graphs <= 64
    params = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True, decoding=METHODS[name])
    engine.add(Request("r", [1, *range(60, 90)], params, 0.0))
    sequence = engine._sequences["r"]
    while len(sequence.output.ids) < 20:
        engine.step()
    ledger, before = sequence.ledger, (runner.copies, runner._staging.copies, sequence.ledger.rounds)
    steps, made = ledger.steps, len(sequence.output.ids)
    while len(sequence.output.ids) < 90:
        engine.step()
    waits, copies, done = runner.copies - before[0], runner._staging.copies - before[1], ledger.rounds - before[2]
    if name == "blt":
        # A few bytes for each, unless a patch ends before.
        assert waits < 0.7 * (len(sequence.output.ids) - made)
    elif name == "blt-d":
        # Where steps go on in another call, and the scan behind the last.
        assert waits <= sum((done, math.ceil((ledger.steps - steps) / 4), 1))
    else:
        assert waits <= done + 1
    # What the host does not wait for (encoder, upstream pass, page tables) goes along with what it does.
    assert copies <= waits + 1
    assert runner._passes is not None and len(runner._passes) == graphs, "captured while a request waited"
