"""Passes with masks of grammars in one C call give what the host's steps give, one after another."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fastblt.kernels.cpu.native import library
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams, StructuredOutput, Utf8
from tests.server.harness import MODELS, model, random_params, run, settings

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

#: Followed in the engine's thread, and by a process.
STRUCTURES = (
    StructuredOutput.regex("([a-z]{1,6} ){5,40}"),
    StructuredOutput.grammar('start: e\ne: t | e "+" t\nt: NUM | "(" e ")"\nNUM: /[0-9]+/\n'),
)
METHODS = (
    DecodingParams(DecodingMethod.BLT),
    DecodingParams(DecodingMethod.BLT_S, draft_length=3),
    DecodingParams(DecodingMethod.BLT_S, draft_length=8),
    DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    DecodingParams(DecodingMethod.BLT_DSV, draft_length=16, block_size=4),
)


def _is_masked(params: SamplingParams) -> bool:
    constrained = params.structured_output is not None or params.utf8 == Utf8.STRICT
    reports = params.logprobs is not None or params.prompt_logprobs is not None or params.return_patches
    return constrained and not reports and not params.penalizes


@given(st.integers(0, 2**32))
@examples(max_examples=8, deadline=None)
def test_masked_passes_in_a_call_are_those_of_the_host(seed: int) -> None:
    rng = random.Random(seed)
    which, count = rng.choice(MODELS), rng.choice((1, 3, 9))
    requests = []
    for at in range(count):
        params = replace(random_params(rng, decoding=rng.choice(METHODS)), stop=(), utf8=rng.choice(list(Utf8)))
        if rng.random() < 0.8:
            params = replace(params, structured_output=rng.choice(STRUCTURES))
        prompt = [1] + [rng.randrange(4, 260) for _ in range(rng.choice((0, 1, 7, 60)))]
        requests.append(Request(f"r{at}", prompt, params, 0.0))
    methods = {request.request_id: request.params.decoding.method for request in requests}
    results = []
    for fused in (False, True):
        passes = {"max_pass_rows": 4096, "max_passes_per_beat": 64 if fused else 1}
        engine = Engine(model(which), settings(max_running=count, prefix_cache=False, **passes))
        fused_steps = engine._runner.fused_steps
        assert fused_steps is not None
        if not fused:
            engine._runner.fused_steps = None
        with patch.object(fused_steps, "run_plans", wraps=fused_steps.run_plans) as calls:
            results.append(run(engine, requests, [0] * count))
        assert engine.balanced()
        in_calls = {s.request.request_id for call in calls.call_args_list for s, _ in call.args[0] if s.masked}
        # Every byte of BLT is one, but those behind long prompts, which may be all.
        singles = [r for r in requests if r.params.decoding.method == DecodingMethod.BLT and len(r.prompt_ids) < 40]
        assert in_calls >= {r.request_id for r in singles if _is_masked(r.params)} if fused else not in_calls
    host, calls_ = results
    for name, one in host.items():
        assert calls_[name].ids == one.ids
        assert calls_[name].reason == one.reason
        if methods[name] in (DecodingMethod.BLT, DecodingMethod.BLT_S):
            # How much of a block a process has masks for in time is no function of the request.
            assert calls_[name].ledger.rounds == one.ledger.rounds
            assert calls_[name].ledger.accepted == one.ledger.accepted
