"""Devices by name, and what becomes of one that fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fastblt.models.blt import Blt
from fastblt.server.engine import load
from fastblt.server.engine.cache import kv_caches
from fastblt.server.engine.device.devices import DeviceLostError, device_of, dtype_of, out_of_memory
from fastblt.server.engine.engine import Engine
from fastblt.server.llm import LLM
from fastblt.server.request import Request, SamplingParams
from tests.server.harness import model, run, settings
from tests.tiny import random_ids


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As if there were two GPUs; the devices that were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="leave --device out"):
        LLM(device="cuda")


def test_devices_by_name(two_gpus: list[torch.device]) -> None:
    assert [device_of(name) for name in ("cpu", "cuda", "cuda:1")] == [
        torch.device(name) for name in ("cpu", "cuda:0", "cuda:1")
    ]
    for name, says in (("cuda:2", "has 2 GPUs"), ("gpu", "give cpu, cuda"), ("", "give cpu, cuda")):
        with pytest.raises(ValueError, match=says):
            device_of(name)
    assert [dtype_of(None, torch.device(name)) for name in ("cpu", "cuda")] == [torch.float32, torch.bfloat16]
    with pytest.raises(ValueError, match="dtype must be float32"):
        dtype_of("int8", torch.device("cpu"))


def test_a_second_gpu_becomes_the_current_one(two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched, and graphs captured, on the current device."""
    monkeypatch.setattr(load, "merge", lambda *_, **__: None)
    there = SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.bfloat16)
    load.prepare(cast(Blt, there), settings(deterministic=False))
    assert two_gpus == [torch.device("cuda:1")]


def test_a_gpu_s_caches_take_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 140 << 30))
    taken = kv_caches._default_bytes(torch.device("cuda:1"))
    assert taken == 86 << 30
    assert kv_caches._default_bytes(torch.device("cpu")) == kv_caches._machine_bytes() // 8


def request(name: str) -> Request:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return Request(name, random_ids(1, 20), params, 0.0)


def accelerator_error(code: int) -> Exception:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = code  # type: ignore[attr-defined]
    return error


def test_a_lost_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No later call succeeds, so to fail request after request would be all that such an engine does."""
    engine = Engine(model(0), settings())
    engine.add(request("a"))

    def broken(*_: Any) -> None:
        raise accelerator_error(700)

    monkeypatch.setattr(engine._runner, "decode", broken)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        for _ in range(20):
            engine.step()


def test_a_device_without_memory_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert out_of_memory(accelerator_error(2)) and not out_of_memory(accelerator_error(700))
    engine = Engine(model(0), settings())
    real, failed = engine._runner.decode, [accelerator_error(2)]

    def once(*given: Any) -> Any:
        if failed:
            raise failed.pop()
        return real(*given)

    monkeypatch.setattr(engine._runner, "decode", once)
    done = run(engine, [request("a")])["a"]
    assert done.error is None and engine.stats().preemptions == 1
