"""Several bytes of a request in one call are those of one call each, and are accounted for as these."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from fastblt.kernels.cpu.native import library
from fastblt.kernels.cpu.threads import set_threads
from fastblt.models.checkpoint import load_checkpoint
from fastblt.models.vocabulary import BYTE_OFFSET
from fastblt.server.engine.engine import Engine
from fastblt.server.engine.runner.samples import Result
from fastblt.server.engine.sequence import Planned
from fastblt.server.request import DecodingMethod, DecodingParams, Ledger, Request, SamplingParams
from fastblt.server.settings import PRETRAINED
from tests.server.harness import MODELS, Finished, model, random_params, run, settings

# Asked of another file: code that a compiler refuses must fail here, not skip.
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

METHODS = (DecodingMethod.BLT, DecodingMethod.BLT_S, DecodingMethod.AUTO)


def requests_of(rng: random.Random, count: int) -> list[Request]:
    """Requests that may go on by themselves: without penalties, scores or constraints, and without stop strings, behind
    which a text may go on in vain."""
    made = []
    for at in range(count):
        prompt = [1] + [rng.randrange(4, 260) for _ in range(rng.choice((0, 1, 7, 40, 90)))]
        decoding = DecodingParams(rng.choice(METHODS[:2]), draft_length=rng.choice((1, 3, 8, 32)))
        if decoding.method == DecodingMethod.BLT:
            decoding = DecodingParams(DecodingMethod.BLT)
        params = replace(
            random_params(rng, decoding=decoding),
            stop=(),
            stop_token_ids=(),
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logit_bias={},
        )
        made.append(Request(f"r{at}", prompt, params, 0.0))
    return made


def counted(ledger: Ledger) -> dict[str, float]:
    return dict(vars(ledger))


@given(st.integers(0, 2**32))
@examples(max_examples=15, deadline=None)
def test_many_bytes_a_call_are_those_of_single_calls(seed: int) -> None:
    rng = random.Random(seed)
    which, count = rng.choice(MODELS), rng.choice((1, 3, 9, 20))
    requests = requests_of(rng, count)
    arrivals = [rng.choice((0, 0, 0, 3)) for _ in requests]
    done: list[dict[str, Finished]] = []
    calls: list[int] = []
    try:
        # With five passes a call drafts end within one.
        for most, threads in ((1, 1), (64, 1), (64, 3), (5, 1)):
            # Prompts in one piece: what of them is computed, and when, depends on who runs beside them.
            passes = {"max_pass_rows": 4096, "max_passes_per_beat": most, "prefix_cache": False}
            engine = Engine(model(which), settings(max_running=count, threads=threads, **passes))
            assert engine._runner.fused_steps
            with patch.object(engine, "step", wraps=engine.step) as step:
                done.append(run(engine, requests, arrivals))
            calls.append(step.call_count)
    finally:
        set_threads(None)
    single, *many = done
    for other in many:
        for name, result in single.items():
            assert other[name].ids == result.ids
            assert other[name].reason == result.reason
            one, many_ = counted(result.ledger), counted(other[name].ledger)
            if result.reason == "stop":
                # The byte that ends a text is scanned and encoded by a call of its own, which cannot know that it will.
                assert all(one.pop(name) - many_.pop(name) in (0, 1) for name in ("patcher", "encoder"))
                assert one.pop("gb") >= many_.pop("gb")
            assert many_ == one
    assert calls[1] == calls[2], "threads change nothing"


@pytest.mark.parametrize("which", (0, 1))
def test_a_draft_is_one_call_and_a_patch_is_one(which: int) -> None:
    engine = Engine(model(which), settings(threads=1))
    assert engine._runner.fused_steps
    plans: list[tuple[bool, int]] = []
    decode = engine._runner.decode

    def watched(planned: list[Planned]) -> list[Result]:
        results = decode(planned)
        for (_, plan), result in zip(planned, results, strict=True):
            plans.append((plan.draft, len(result.ids)))
            # A verification goes on with the next draft.
            if result.next_draft is not None:
                plans.append((True, len(result.next_draft.ids)))
        return results

    engine._runner.decode = watched  # type: ignore[method-assign]
    params = random_params(
        random.Random(1), max_tokens=60, temperature=0.0, min_tokens=60, ignore_eos=True, stop=(), stop_token_ids=(),
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias={},
        decoding=DecodingParams(DecodingMethod.BLT_S, draft_length=8),
    )  # fmt: skip
    done = run(engine, [Request("r", [1, *range(60, 90)], params, 0.0)])
    drafts = [length for draft, length in plans if draft]
    # The last ones are shorter, where less is left.
    assert drafts[:3] == [8] * 3 and len(drafts) == done["r"].ledger.rounds


@pytest.mark.parametrize("method", METHODS[:2])
def test_what_is_stored_is_bit_equal(method: DecodingMethod) -> None:
    """The shipped checkpoint's keys, values and states of every byte, whichever call computed them."""
    shipped = load_checkpoint(str(PRETRAINED))
    decoding = DecodingParams(method, draft_length=8 if method == DecodingMethod.BLT_S else None)
    params = SamplingParams(max_tokens=300, temperature=0.8, seed=5, ignore_eos=True, decoding=decoding)
    stored: list[dict[str, Tensor]] = []
    for most in (1, 64):
        engine = Engine(shipped, settings(max_model_len=1024, max_passes_per_beat=most, deterministic=True))
        engine.add(Request("r", [1, *(BYTE_OFFSET + byte for byte in b"def mean(values):\n")], params, 0.0))
        while len(engine._sequences["r"].output.ids) < 60 or engine._sequences["r"].decoded < 70:
            engine.step()
        row, found = engine._sequences["r"].state_index, {}
        for name in ("patcher", "encoder", "decoder"):
            group = engine._caches.groups[name]
            slots = [
                int(group.table[row, p // group.page_size]) * group.page_size + p % group.page_size for p in range(70)
            ]
            found |= {f"{name} {at}": layer[slots].clone() for at, layer in enumerate(group.layers)}
        stored.append(found)
    for name, rows in stored[0].items():
        assert torch.equal(rows, stored[1][name]), name


@pytest.mark.parametrize("paper", (False, True))
def test_steps_up_to_the_longest_text(paper: bool) -> None:
    """Drafts under the paper's accounting go on past what is left."""
    texts = []
    for most in (1, 64):
        engine = Engine(model(0), settings(max_model_len=200, max_passes_per_beat=most))
        prompt = [1, *range(10, 10 + engine.max_model_len - 41)]
        decoding = DecodingParams(DecodingMethod.BLT_S, draft_length=32, paper_accounting=paper)
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, decoding=decoding)
        texts.append(run(engine, [Request("r", prompt, params, 0.0)])["r"].ids)
    assert texts[0] == texts[1] and len(texts[0]) == 40
