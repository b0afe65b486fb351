"""The deterministic engine on a device, greedy and sampled, each method once, against the model on the CPU."""

from __future__ import annotations

import copy
import random
import time
from functools import cache

import pytest
import torch

from fastblt.kernels.noise import gumbel, mix_seed
from fastblt.models.blt import Blt
from fastblt.server.engine.engine import Engine
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from tests.server.harness import run, settings
from tests.tiny import tiny_model

BYTES = 40
#: Below this distance two candidates, or an entropy and the threshold, are too close to be told apart.
CLOSE = 1e-4
METHODS = {
    "blt": DecodingParams(DecodingMethod.BLT),
    "blt-s": DecodingParams(DecodingMethod.BLT_S, draft_length=6),
    "blt-d": DecodingParams(DecodingMethod.BLT_D, block_size=8),
    "blt-dv": DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    "blt-dsv": DecodingParams(DecodingMethod.BLT_DSV, block_size=4, draft_length=16),
}


@cache
def model() -> Blt:
    return tiny_model(3, block_sizes=(4, 8), decoder_input="encoder")


def requests(temperature: float) -> list[Request]:
    rng = random.Random(5)
    made = []
    for index, (name, decoding) in enumerate(METHODS.items()):
        params = SamplingParams(
            max_tokens=BYTES, decoding=decoding, seed=index, ignore_eos=True, temperature=temperature
        )
        prompt = [1, *(rng.randrange(4, 260) for _ in range(20 + index))]
        made.append(Request(name, prompt, params, time.monotonic()))
    return made


def outputs(device: torch.device, temperature: float) -> dict[str, list[int]]:
    engine = Engine(copy.deepcopy(model()).to(device), settings())
    return {name: done.ids for name, done in run(engine, requests(temperature)).items()}


@torch.inference_mode()
def candidates(request: Request, produced: list[int]) -> tuple[list[int], list[float]]:
    """The byte that the whole-sequence model would produce at each place, and how far the next best stands behind.

    From the first entropy on that is too close to the threshold nothing is sure: distance 0.
    """
    ids = [*request.prompt_ids, *produced]
    first, params = len(request.prompt_ids), request.params
    out = model()(torch.tensor([ids]))
    scores = out.logits[0, first - 1 : -1].clone()
    scores[:, :4] = -torch.inf
    if params.temperature > 0:
        positions = torch.arange(first, len(ids))
        assert params.seed is not None
        seeds = torch.full_like(positions, mix_seed(params.seed, 0))
        scores = (scores / params.temperature).log_softmax(-1) + gumbel(seeds, positions)
    best = scores.topk(2, dim=-1)
    distances = best.values[:, 0] - best.values[:, 1]
    close = (out.entropies[0] - model().config.patching_threshold).abs() < CLOSE
    unsure = close.cumsum(0)[first - 1 : -1] > 0
    return best.indices[:, 0].tolist(), distances.masked_fill(unsure, 0.0).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_method(device: torch.device, temperature: float) -> None:
    found = outputs(device, temperature)
    for request in requests(temperature):
        produced = found[request.request_id]
        assert len(produced) == BYTES
        if request.request_id == "blt-d":
            continue  # not BLT's bytes
        expected, distances = candidates(request, produced)
        sure = [distance > CLOSE for distance in distances]
        assert sum(sure) > 0.8 * BYTES
        assert [p for p, s in zip(produced, sure, strict=True) if s] == [
            e for e, s in zip(expected, sure, strict=True) if s
        ]
    assert outputs(device, temperature) == found
    assert outputs(torch.device("cpu"), temperature)["blt-d"] == found["blt-d"]
