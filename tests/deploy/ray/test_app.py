"""Two replicas on a real Ray Serve: the same API, affinity, and what follows when replicas and engines are killed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra `ray`")

from prometheus_client.parser import text_string_to_metric_families
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from fastblt.benchmarks.checks.replicas import Kill, Options, load, serving
from fastblt.deploy.ray.app import build
from fastblt.server.llm import LLM
from fastblt.server.request import SamplingParams
from tests.server.api.running import save_tiny, until

ENGINE = {"cache_bytes": 2**25, "max_running": 8, "max_model_len": 2048, "threads": 1, "deterministic": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(Path(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def url(checkpoint: str) -> Iterator[str]:
    with serving(Options(replicas=2, model=checkpoint, engine=ENGINE), cpus=2) as url:
        yield url


def test_serve_yaml_is_what_build_takes() -> None:
    """By the function that `serve run` and `serve deploy` call."""
    [described] = yaml.safe_load((Path(__file__).parents[3] / "deploy/ray/serve.yaml").read_text())["applications"]
    assert described["import_path"] == f"{build.__module__}:{build.__name__}"
    assert isinstance(call_user_app_builder_with_args_if_necessary(build, described["args"]), Application)
    with pytest.raises(ValueError, match="replicas"):
        call_user_app_builder_with_args_if_necessary(build, {"replicas": 0})


def samples(url: str, name: str) -> dict[str, float]:
    """Values of a metric by replica, all other labels added up."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name == name:
                replica = sample.labels["replica"]
                values[replica] = values.get(replica, 0.0) + sample.value
    return values


def test_the_same_api(url: str, checkpoint: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/ready").status_code == 200
        body = {"prompt": "Hello", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        [alone] = LLM(checkpoint, **ENGINE).generate(
            "Hello", SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        )
        answers = [http.post("/v1/completions", json=body) for _ in range(4)]
        assert all(a.json()["choices"][0]["token_ids"] == alone.ids for a in answers)
        # One prompt, one cache; many prompts, both.
        assert len({a.headers["x-replica"] for a in answers}) == 1
        other = [http.post("/v1/completions", json=body | {"prompt": f"{n} {n}", "max_tokens": 1}) for n in range(16)]
        assert len({a.headers["x-replica"] for a in other}) == 2
        wrong = http.post("/v1/completions", json=body | {"temperature": -1})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "temperature"
        headers = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=b"x" * 9_000_000, headers=headers).status_code == 413
        assert http.get("/nowhere").status_code == 404
    assert sum(samples(url, "fastblt_prefix_cache_hits_total").values()) > 0


def test_a_client_that_leaves(url: str) -> None:
    # Slow on purpose.
    body = {"prompt": "Go on", "n": 8, "max_tokens": 1900, "ignore_eos": True, "stream": True, "logprobs": 5}
    body["decoding"] = {"method": "blt"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_raw())
    until(lambda: sum(samples(url, "fastblt_requests_aborted_total").values()) == 8)
    until(lambda: sum(samples(url, "fastblt_num_requests_running").values()) == 0)


def test_a_replica_killed_under_load_comes_back(url: str) -> None:
    kill = Kill()
    result = asyncio.run(load(url, 40, 8, 200, kill))
    ends = result.report()
    assert set(ends["ends"]) <= {"complete", "replica_lost"} and ends["not retryable"] == 0, ends  # type: ignore[call-overload]
    assert len(result.outcomes) == 40 and sum(o.end == "complete" for o in result.outcomes) >= 32
    kill.await_return(2)
    again = asyncio.run(load(url, 16, 8, 8))
    assert [o.end for o in again.outcomes] == ["complete"] * 16
    assert len({o.replica for o in again.outcomes}) == 2


def test_a_replica_without_its_engine_is_replaced(url: str) -> None:
    """Our health is Ray's."""
    kill = Kill(engine=True)
    kill()
    kill.await_return(2)
    assert all(o.end == "complete" for o in asyncio.run(load(url, 8, 8, 8)).outcomes)
