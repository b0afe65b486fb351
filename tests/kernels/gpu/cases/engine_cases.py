"""The whole engine through Triton: requests of every method in chunks, preempted, and with prefix hits, byte for byte
as each alone through torch; the verified methods as BLT."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

import fastblt.kernels.backend
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams, Unmasking
from tests.server.harness import restless, run, settings
from tests.tiny import shallow_model

BYTES = 5
PROMPT = [1, *(random.Random(4).randrange(4, 260) for _ in range(9))]
METHODS = {
    "blt": DecodingParams(DecodingMethod.BLT),
    "blt-s": DecodingParams(DecodingMethod.BLT_S, draft_length=3),
    "blt-d": DecodingParams(
        DecodingMethod.BLT_D, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.1
    ),
    "blt-dv": DecodingParams(DecodingMethod.BLT_DV, block_size=8, unmasking=Unmasking.ENTROPY, entropy_bound=8.0),
    "blt-dsv": DecodingParams(DecodingMethod.BLT_DSV, block_size=4, draft_length=8),
}


def requests() -> list[Request]:
    """The verified methods go on behind one prompt, with one seed; a request of BLT-D with a penalty has its own."""
    rng = random.Random(5)
    made = []
    for name, decoding in METHODS.items():
        options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
        if name == "blt-d":
            options = {"temperature": 1.0, "repetition_penalty": 1.2}
        params = SamplingParams(max_tokens=BYTES, seed=3, ignore_eos=True, decoding=decoding, **options)
        prompt = PROMPT if name != "blt-d" else [1, *(rng.randrange(4, 260) for _ in range(6))]
        made.append(Request(name, prompt, params, time.monotonic()))
    return made


def test_every_method_gives_the_torch_path_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shallow_model(3, decoder_input="encoder", window=16)
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "torch")
    expected = {}
    for request in requests():
        expected |= run(Engine(model, settings(prefix_cache=False)), [request])
    assert all(len(done.ids) == BYTES for done in expected.values())
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "triton")
    launched = set()
    launch = GridExecutor.__call__

    def noted(self: GridExecutor, *args: Any, **options: Any) -> None:
        launched.add(self.fn.__name__)
        launch(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    engine = restless(Engine(model, settings(page_size=4, max_pass_rows=8)), 9)
    found = run(engine, requests())
    assert {name: done.ids for name, done in found.items()} == {name: done.ids for name, done in expected.items()}
    assert all(found[name].ids == found["blt"].ids for name in found if name != "blt-d")
    stats = engine.stats()
    assert stats.preemptions and stats.prefix_hits and stats.ledger.decoder > BYTES
    modules = ("begin", "add_norm", "swiglu", "write", "attend", "cross", "finish", "hash", "entropy")
    upstream = ("peak", "pool", "norm_many", "store")
    # The penalized request of BLT-D goes step by step, the others by rounds.
    names = (*modules, *upstream, "linear", "select", "unmask", "place", "settle", "turn", "next_rows", "row_draws")
    assert launched == {f"{name}_kernel" for name in names}
