"""Over HTTP: a tiny temperature is greedy, whatever method and code; and no error is the model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastblt.server.process.client import EngineClient
from fastblt.server.request import DecodingMethod
from tests.server.api.running import RunningServer, save_tiny, tiny_settings

TINY = (1e-46, 1e-45, 1e-40, 1e-38, 1e-30, 1e-20, 1e-10, 1e-6)


@pytest.fixture(scope="module", params=["C", "torch", "device"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """By C code; by torch's versions of all kernels; by the program of a GPU, with a CPU's kernels."""
    name, value = {"C": ("", ""), "torch": ("FASTBLT_NATIVE", "0"), "device": ("FASTBLT_KERNELS", "apart")}[
        request.param
    ]
    with pytest.MonkeyPatch.context() as environment:
        if name:
            environment.setenv(name, value)
        client = EngineClient(tiny_settings(save_tiny(Path(tmp_path_factory.mktemp("tiny")))))
        with RunningServer(client) as server:
            yield server


@pytest.mark.parametrize("method", DecodingMethod)
def test_tiny_temperatures_are_greedy(server: RunningServer, method: DecodingMethod) -> None:
    body = {"prompt": "One two ", "max_tokens": 24, "logprobs": 1, "seed": 5, "decoding": {"method": method}}
    body |= {"ignore_eos": True, "return_token_ids": True}
    wanted = server.complete(**body, temperature=0)["choices"][0]
    for temperature in TINY:
        [choice] = server.complete(**body, temperature=temperature)["choices"]
        assert choice["token_ids"] == wanted["token_ids"], temperature
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted["logprobs"]["token_logprobs"], abs=1e-4)
    assert server.metric("fastblt_corrupted_requests_total") == 0
