"""Engines on narrow weights: the bytes of the same weights in fp32, and lossless methods lossless."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastblt.kernels.cpu.linear import Storage
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from tests.models.test_packed import kinds, narrowed
from tests.server.harness import run, settings

METHODS = {
    "blt": DecodingParams(DecodingMethod.BLT),
    "blt-s": DecodingParams(DecodingMethod.BLT_S, draft_length=6),
    "blt-dv": DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    "blt-dsv": DecodingParams(DecodingMethod.BLT_DSV, block_size=4, draft_length=8),
    "auto": DecodingParams(DecodingMethod.AUTO),
}


def requests(temperature: float = 0.0) -> list[Request]:
    """Three prompts by every method, all at once."""
    rng, found = random.Random(3), []
    for number in range(3):
        prompt = [1, *(rng.randrange(36, 126) for _ in range(3 + 60 * number))]
        for name, decoding in METHODS.items():
            params = SamplingParams(
                max_tokens=24, temperature=temperature, seed=number, ignore_eos=True, decoding=decoding
            )
            found.append(Request(f"{name} {number}", prompt, params, time.monotonic()))
    return found


def outputs(engine: Engine, temperature: float = 0.0) -> dict[str, list[int]]:
    return {name: done.ids for name, done in run(engine, requests(temperature)).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("narrow")
    model = narrowed(21, Storage.BFLOAT16)
    assert model.config.block_sizes
    save_checkpoint(model, found)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_methods_are_lossless(folder: Path, weights: str, temperature: float) -> None:
    how = settings(deterministic=True, max_running=16)
    model = load_checkpoint(folder, weights=weights)
    assert Storage(weights) in kinds(model)
    done = outputs(Engine(model, how), temperature)
    for name, ids in done.items():
        assert ids == done[f"blt {name[-1]}"], name
    alone = {}
    for request in requests(temperature)[:6:2]:
        alone |= {name: own.ids for name, own in run(Engine(model, how), [request]).items()}
    assert alone == {name: done[name] for name in alone}, "a request depends on its batch"


def test_narrow_weights_give_the_bytes_and_less_to_read(folder: Path) -> None:
    how = settings(deterministic=True, max_running=16)
    wide = run(Engine(load_checkpoint(folder, weights="float32"), how), requests())
    narrow = run(Engine.load(replace(how, model=str(folder), weights="bfloat16")), requests())
    assert {name: done.ids for name, done in narrow.items()} == {name: done.ids for name, done in wide.items()}
    assert all(done.ledger.gb < wide[name].ledger.gb for name, done in narrow.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "int4"}, "weights must be auto, float32"),
        ({"weights": "int8", "dtype": "bfloat16"}, "int8 need a CPU and dtype float32"),
    ],
)
def test_weights_that_cannot_be(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.load(settings(**change))
