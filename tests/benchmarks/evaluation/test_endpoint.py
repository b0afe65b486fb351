"""The client side of every evaluation, against real servers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastblt.benchmarks.evaluation.endpoint import Endpoint, EndpointError, Target, together
from fastblt.models.checkpoint import save_checkpoint
from fastblt.server.settings import HttpSettings
from tests.benchmarks.evaluation.conftest import ready
from tests.server.api.running import MODEL, tiny_settings
from tests.tiny import tiny_model

KEY = "a-key"


@pytest.fixture(scope="module")
def small(checkpoint: str) -> Iterator[str]:
    """A server with a key that runs one request and lets one wait."""
    settings = tiny_settings(checkpoint, max_running=1, max_waiting=1)
    with ready(settings, HttpSettings(api_keys=(KEY,), shutdown_timeout=0.0)) as url:
        yield url


async def test_what_a_server_says_of_its_model(small: str) -> None:
    for base in (small, f"{small}/", f"{small}/v1"):
        async with Endpoint(base, KEY) as endpoint:
            served = await endpoint.served()
            assert served.name == MODEL and served.block_sizes == (4, 8) and served.max_model_len > 1000


async def test_other_weights_have_another_fingerprint(small: str, url: str, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(4, block_sizes=(4, 8)), tmp_path)
    with ready(tiny_settings(str(tmp_path))) as other:
        found = []
        for base, key in ((small, KEY), (url, None), (other, None)):
            async with Endpoint(base, key) as endpoint:
                found.append(await endpoint.served())
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert found[0].name == found[2].name


async def test_a_full_queue_is_waited_for(small: str) -> None:
    async with Endpoint(small, KEY, concurrency=5) as endpoint:
        answers = await together(
            endpoint.complete("a", max_tokens=20, temperature=0, ignore_eos=True) for _ in range(5)
        )
        assert [answer.bytes for answer in answers] == [20] * 5
        assert len({answer.data for answer in answers}) == 1 and len(answers[0].data) == 20
        assert all(answer.started < answer.ended for answer in answers)
        assert await endpoint.processor_seconds()


async def test_no_more_than_concurrency_are_under_way(small: str) -> None:
    """With two at a time this server is never full: a refusal would be seen as time lost waiting, a second each."""
    async with Endpoint(small, KEY, concurrency=1) as endpoint:
        answers = await together(endpoint.complete("a", max_tokens=8) for _ in range(3))
        spans = sorted((answer.started, answer.ended) for answer in answers)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


async def test_a_score_is_of_every_byte(small: str) -> None:
    async with Endpoint(small, KEY) as endpoint:
        scores = await endpoint.score([1, 101, 102, 103])
        assert len(scores) == 3 and all(score < 0 for score in scores)


@pytest.mark.parametrize(
    ("key", "body", "message"),
    [
        (None, {}, "401"),
        ("wrong", {}, "401"),
        (KEY, {"max_tokens": -1}, "400.*max_tokens"),
        (KEY, {"decoding": {"method": "blt-d", "block_size": 7}}, "400.*7"),
        (KEY, {"model": "another"}, "404"),
    ],
)
async def test_refusals_say_why(small: str, key: str | None, body: dict[str, object], message: str) -> None:
    async with Endpoint(small, key) as endpoint:
        with pytest.raises(EndpointError, match=message):
            await together(endpoint.complete("a", **body) for _ in range(2))


def test_a_target_starts_a_server_and_ends_it(checkpoint: str) -> None:
    async def ask() -> str:
        async with Target(None, checkpoint, concurrency=2, device="cpu", dtype="float32").open() as endpoint:
            assert (await endpoint.complete("a", max_tokens=4)).bytes <= 4
            return endpoint.base_url

    url = asyncio.run(ask())

    async def again() -> None:
        async with Endpoint(url) as endpoint:
            await endpoint.served()

    with pytest.raises(EndpointError, match="cannot ask"):
        asyncio.run(again())


def test_a_checkpoint_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"), Target(None, str(tmp_path)).running():
        pass


@pytest.mark.parametrize(("device", "dtype", "message"), [("abacus", None, "abacus"), ("cpu", "float7", "float7")])
def test_a_server_is_started_on_the_device_asked_for(
    checkpoint: str, device: str, dtype: str | None, message: str
) -> None:
    target = Target(None, checkpoint, device=device, dtype=dtype)
    with pytest.raises(RuntimeError, match=message), target.running():
        pass
