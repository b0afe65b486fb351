"""The whole engine through Triton: one request of each method in one batch, byte for byte as through torch."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

import fastblt.kernels.backend
from fastblt.models.blt import Blt
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams, Unmasking
from tests.server.harness import run, settings
from tests.tiny import shallow_model

BYTES = 6
METHODS = {
    "blt": DecodingParams(DecodingMethod.BLT),
    "blt-s": DecodingParams(DecodingMethod.BLT_S, draft_length=3),
    "blt-d": DecodingParams(
        DecodingMethod.BLT_D, block_size=8, unmasking=Unmasking.CONFIDENCE, confidence_threshold=0.1
    ),
    "blt-dv": DecodingParams(DecodingMethod.BLT_DV, block_size=8, unmasking=Unmasking.ENTROPY, entropy_bound=8.0),
    "blt-dsv": DecodingParams(DecodingMethod.BLT_DSV, block_size=4, draft_length=8),
}
OPTIONS = ({"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.0}, {"temperature": 1.0, "repetition_penalty": 1.2})


def outputs(model: Blt) -> dict[str, list[int]]:
    rng = random.Random(5)
    requests = []
    for index, (name, decoding) in enumerate(METHODS.items()):
        options = {"seed": index, "ignore_eos": True} | OPTIONS[index % len(OPTIONS)]
        params = SamplingParams(max_tokens=BYTES, decoding=decoding, **options)  # type: ignore[arg-type]
        prompt = [1, *(rng.randrange(4, 260) for _ in range(9 + index))]
        requests.append(Request(name, prompt, params, time.monotonic()))
    done = run(Engine(model, settings()), requests)
    return {name: finished.ids for name, finished in done.items()}


def test_every_method_gives_the_torch_path_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shallow_model(3, decoder_input="encoder", window=16)
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "torch")
    expected = outputs(model)
    assert all(len(ids) == BYTES for ids in expected.values())
    monkeypatch.setattr(fastblt.kernels.backend, "_FORCED", "triton")
    launched = set()
    launch = GridExecutor.__call__

    def noted(self: GridExecutor, *args: Any, **options: Any) -> None:
        launched.add(self.fn.__name__)
        launch(self, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    assert outputs(model) == expected
    modules = ("begin", "add_norm", "swiglu", "write", "attend", "cross", "finish", "hash", "entropy")
    upstream = ("peak", "pool", "norm_many", "store")
    # The penalized request of BLT-D goes step by step, the others by rounds.
    names = (*modules, *upstream, "linear", "select", "unmask", "place", "settle")
    assert launched == {f"{name}_kernel" for name in names}
