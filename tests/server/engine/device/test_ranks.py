"""Tensor parallelism: two ranks give the bytes of one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fastblt.models.blt import Blt
from fastblt.models.checkpoint import load_checkpoint, save_checkpoint
from fastblt.models.config import ConfigError, StackConfig
from fastblt.models.packed import is_packed
from fastblt.server.engine.device.ranks import Leader, RankLostError, leader_of, spread
from fastblt.server.engine.engine import Engine
from fastblt.server.llm import LLM
from fastblt.server.request import DecodingMethod, DecodingParams, Request, SamplingParams
from fastblt.server.settings import PRETRAINED, EngineSettings
from tests.server.api.running import until
from tests.server.cli.test_cli import SMALL, serving
from tests.server.harness import run, settings
from tests.tiny import tiny_model

#: Grouped heads with a projection of the vectors, and heads of their own, both decoder inputs.
WIDE = StackConfig(96, 3, 6, 2, 160, 500000.0)
EVEN = StackConfig(64, 2, 4, 4, 96, 500000.0)


def shipped() -> Blt:
    return load_checkpoint(PRETRAINED)


def random_wide() -> Blt:
    return tiny_model(11, block_sizes=(4, 8), decoder_input="embedding", global_=WIDE)


def random_even() -> Blt:
    return tiny_model(12, block_sizes=(4, 8), decoder_input="encoder", global_=EVEN)


MODELS = {"shipped": shipped, "wide": random_wide, "even": random_even}


@contextmanager
def ranks(model: Blt, how: EngineSettings, kept: str | None = None) -> Iterator[Leader]:
    """Two ranks, of which this process is the first, around `model`, which loses its global transformer."""
    spread(model, replace(how, tensor_parallel_size=2), threads=1, kept=kept)
    leader = leader_of(model)
    assert leader is not None
    try:
        yield leader
    finally:
        leader.close()


def requests() -> list[Request]:
    """Greedy requests of all methods; some begin alike, within a page, so that pages are shared and copied."""
    rng = random.Random(5)
    head = [1, *(rng.randrange(36, 126) for _ in range(70))]
    methods = (
        DecodingParams(DecodingMethod.BLT),
        DecodingParams(DecodingMethod.BLT_S, draft_length=8),
        DecodingParams(DecodingMethod.BLT_D, block_size=8),
        DecodingParams(DecodingMethod.BLT_DV, block_size=8),
    )
    found = []
    for number in range(8):
        params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, decoding=methods[number % 4])
        tail = [rng.randrange(36, 126) for _ in range(5 * number)]
        found.append(Request(f"r{number}", head + tail, params, time.monotonic()))
    return found


@pytest.mark.parametrize(
    ("name", "deterministic"), [("shipped", False), ("wide", False), ("even", False), ("shipped", True)]
)
def test_two_ranks_give_the_bytes_of_one(name: str, deterministic: bool) -> None:
    how = settings(deterministic=deterministic, max_running=4)
    model = MODELS[name]()
    # One after the other for half of them: the later ones hit what the earlier ones left.
    arrivals = [0, 0, 0, 0, 200, 200, 400, 400]
    one = run(Engine(model, how), requests(), arrivals)
    with ranks(model, how) as leader:
        engine = Engine(model, how)
        assert engine._caches.groups["global"].layers[0].shape[2] * 2 == model.config.global_.num_kv_heads
        split = sum(weight.numel() for weight in leader.transformer.parameters())
        assert split < 0.7 * engine._context.parameters.global_
        two = run(engine, requests(), arrivals)
    assert engine.stats().prefix_hits > 0
    assert {key: done.ids for key, done in two.items()} == {key: done.ids for key, done in one.items()}
    assert {key: done.ledger for key, done in two.items()} == {key: done.ledger for key, done in one.items()}


def test_ranks_keep_narrow_weights(tmp_path: Path) -> None:
    save_checkpoint(random_even(), tmp_path)
    how = settings(deterministic=True, max_running=4, weights="bfloat16", model=str(tmp_path))
    one = run(Engine.load(how), requests())
    model = load_checkpoint(tmp_path, weights="bfloat16", pack=False)
    with ranks(model, how, "bfloat16") as leader:
        two = run(Engine(model, how), requests())
        assert is_packed(leader.transformer)
    assert {key: done.ids for key, done in two.items()} == {key: done.ids for key, done in one.items()}


def test_a_lost_rank_ends_the_engine() -> None:
    model = random_even()
    with ranks(model, settings()) as leader:
        engine = Engine(model, settings())
        [request, *_] = requests()
        engine.add(request)
        engine.step()
        os.kill(leader._processes[0].pid, signal.SIGKILL)
        leader._processes[0].wait()
        with pytest.raises(RankLostError):
            for _ in range(200):
                engine.step()


def test_heads_that_cannot_be_split() -> None:
    model = tiny_model(13, global_=replace(WIDE, num_kv_heads=3))
    with pytest.raises(ConfigError, match=r"num_kv_heads \(3\); use another size"):
        spread(model, replace(settings(), tensor_parallel_size=2), threads=1)


def test_a_server_on_two_ranks(tmp_path: Path) -> None:
    model = random_even()
    save_checkpoint(model, tmp_path / "model")
    body = {"prompt": "Two of us.", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    [alone] = LLM(str(tmp_path / "model"), cache_bytes=2**25, max_model_len=2048).generate("Two of us.", params)
    with serving(tmp_path, str(tmp_path / "model"), *SMALL, "--tensor-parallel-size", "2") as served:
        until(lambda: served.status() == 200, 60)
        [choice] = served.http.post("/v1/completions", json=body).json()["choices"]
        assert choice["token_ids"] == alone.ids
        [engine] = children(served.process.pid)
        [other] = children(engine)
        os.kill(engine, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{other}").exists())


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    return [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()]
